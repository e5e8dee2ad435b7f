"""Checks of single values from a folder that nobody vouches for, before a document shows them."""

import reprlib
from typing import Any


def one_line(value: Any, where: str) -> str:
    """Checks a text that a document shows.

    Args:
        value: What was parsed.
        where: What to call it in errors.

    Returns:
        The value.

    Raises:
        ValueError: No text, empty, or with line breaks, control characters or lone surrogates.
    """
    if not isinstance(value, str) or not value or not value.isprintable():
        found = reprlib.repr(value)
        raise ValueError(f"{where}: expected one line of printable text, found {found}")
    return value


def number(value: Any, low: float, high: float, where: str) -> float:
    """Checks a number and its range.

    Args:
        value: What was parsed.
        low: The least that it may be.
        high: The most that it may be.
        where: What to call it in errors.

    Returns:
        The value.

    Raises:
        ValueError: No number, or out of the range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared before it is converted: an int may be beyond any float.
    if not is_number or not low <= value <= high:
        found = reprlib.repr(value)
        raise ValueError(f"{where}: expected a number in {low:g}..{high:g}, found {found}")
    return float(value)
