"""Types of command-line arguments, which refuse what cannot be meant."""

import argparse
import math

from pallas_kernels.tuning.command import positive as positive


def natural(text: str) -> int:
    """The type of an argument that is an integer of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or a positive integer, got {text!r}")
    return int(text)


def finite(text: str) -> float:
    """The type of an argument that is a finite number of 0 or more."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of 0 or more, got {text!r}")
    return found
