"""Records read back from JSON, whose values have the types that their fields are declared with."""

import functools
import types
import typing
from typing import Any


def record(kind: Any, fields: dict[str, Any]) -> Any:
    """Makes a record of its fields.

    Args:
        kind: A named tuple or a dataclass.
        fields: By name; those that `kind` gives a value may be left out.

    Returns:
        The record.

    Raises:
        TypeError: A field is missing, unknown or of another type; names it.
    """
    hints = _hints(kind)
    for name, value in fields.items():
        if name in hints and not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", hints[name])
            raise TypeError(f"{kind.__name__}.{name}: expected {wanted}, got {value!r}")
    return kind(**fields)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, typing.TypeAliasType):
        hint = hint.__value__
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:  # of any number of one type
        return isinstance(value, tuple) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if isinstance(value, bool):  # an int to Python
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)
