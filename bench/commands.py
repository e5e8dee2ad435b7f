"""What the commands of this package share.

A command that measures for minutes makes the folder of its results first, so that nothing is
measured that cannot be written.
"""

import argparse
from pathlib import Path

from bench import run_folder
from jax_moe.io.files import naming, shown


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


def file(text: str) -> Path:
    """The type of an argument that is a file to write, in a folder that exists."""
    if not text:
        raise argparse.ArgumentTypeError("expected a file, got an empty name")
    try:
        path = Path(text).expanduser()
        with naming(path):
            is_folder, has_folder = path.is_dir(), path.parent.is_dir()
        if is_folder:
            raise ValueError(f"expected a file, got the folder {shown(path)}")
        if not has_folder:
            raise ValueError(f"expected a path in a folder that exists, got {shown(path)}")
        run_folder.make_writable(path.parent)
    except (RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path
