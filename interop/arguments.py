"""Types of command-line arguments, which refuse what cannot be meant."""

import argparse
import contextlib
import math
from collections.abc import Callable
from pathlib import Path

from pallas_kernels.tuning.command import positive as positive


def up_to(most: int) -> Callable[[str], int]:
    """The type of an argument that is a positive integer of at most `most`."""

    def checked(text: str) -> int:
        digits = text if text.isdecimal() and len(text) <= len(str(most)) else "0"
        if not 1 <= int(digits) <= most:
            raise argparse.ArgumentTypeError(
                f"expected a positive integer of at most {most}, got {text!r}"
            )
        return int(digits)

    return checked


def natural(text: str) -> int:
    """The type of an argument that is an integer of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or a positive integer, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """The type of an argument that is a number in 0..1."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in 0..1, got {text!r}")
    return found


def folder_name(text: str) -> Path:
    """The type of an argument that is a folder, which may not be there."""
    if not text:  # pathlib's current directory, which nobody means by it
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"expected a path, got {text!r}: that user has no home"
        ) from None


def comma_separated(text: str) -> tuple[str, ...]:
    """The type of an argument that is names, separated by commas."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return found


def finite(text: str) -> float:
    """The type of an argument that is a finite number of 0 or more."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of 0 or more, got {text!r}")
    return found


def positive_finite(text: str) -> float:
    """The type of an argument that is a finite number of more than 0."""
    with contextlib.suppress(argparse.ArgumentTypeError):
        if found := finite(text):
            return found
    raise argparse.ArgumentTypeError(f"expected a finite number of more than 0, got {text!r}")
