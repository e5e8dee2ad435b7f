"""What the commands of this package share.

A command that measures for minutes makes the folder of its results first, so that nothing is
measured that cannot be written.
"""

import argparse
from pathlib import Path

from bench import run_folder


def folder(text: str) -> Path:
    """The type of an argument that is a folder to write into; it is made, with its parents."""
    if not text:  # pathlib's current directory, which nobody means by it
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    try:
        path = Path(text).expanduser()
        run_folder.make_writable(path)
    except (RuntimeError, ValueError) as error:  # the first: no such user
        raise argparse.ArgumentTypeError(str(error)) from None
    return path
