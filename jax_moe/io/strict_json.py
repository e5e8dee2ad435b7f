"""JSON objects from files that nobody vouches for, and checks of what they hold."""

import json
import reprlib
from collections.abc import Mapping
from typing import Any


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parses one JSON object, refusing what `json.loads` lets pass.

    Args:
        text: The object; bytes may be UTF-8, 16 or 32, which `interop.files.parse_utf8` narrows.
        where: What to call it in errors, such as "file:line".

    Returns:
        The object.

    Raises:
        ValueError: Malformed, not an object, a key that appears twice, NaN or Infinity.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not valid JSON: its bytes are no text") from None
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def check_fields(
    value: Any, required: tuple[str, ...], optional: tuple[str, ...], where: str
) -> Mapping[str, Any]:
    """Checks that a parsed value is an object with the required keys and no unknown ones.

    Args:
        value: What was parsed.
        required: Keys that must be there.
        optional: Keys that may be there.
        where: What to call it in errors.

    Returns:
        The value.

    Raises:
        ValueError: No object, or a key is missing or unknown.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
    missing = [key for key in required if key not in value]
    unknown = [key for key in value if key not in (*required, *optional)]
    if missing or unknown:
        problem = f"missing {missing[0]!r}" if missing else f"unknown key {unknown[0]!r}"
        raise ValueError(f"{where}: {problem}")
    return value


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
        raise ValueError(f"{where}: expected one line of printable text, got {found}")
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
        raise ValueError(f"{where}: expected a number in {low:g}..{high:g}, got {found}")
    return float(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key appears twice")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number")
