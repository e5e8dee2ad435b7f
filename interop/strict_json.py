"""JSON objects from files that nobody vouches for."""

import json
from typing import Any


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parses one JSON object, refusing what `json.loads` lets pass.

    Args:
        text: The object, UTF-8 if bytes.
        where: What to call it in errors, such as "file:line".

    Returns:
        The object.

    Raises:
        ValueError: Malformed, not an object, a key that appears twice, NaN or Infinity.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key appears twice")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number")
