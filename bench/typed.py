"""Records read back from JSON, whose values fit the fields they are of."""

import functools
import inspect
import types
import typing
from typing import Any

from jax_moe.scalars import quoted

_LEAST, _MOST = 1e-6, 1e300  # of what is measured; between them every ratio is finite


def record(kind: Any, fields: Any, *, positive: bool = False) -> Any:
    """Makes a record of its fields.

    Args:
        kind: A named tuple or a dataclass.
        fields: By name; those that `kind` gives a value may be left out.
        positive: Whether its numbers are times or rates, which cannot be 0.

    Returns:
        The record.

    Raises:
        ValueError: A field is missing, unknown, of another type or a number that cannot be: names
            it.
    """
    name_of = kind.__name__
    fields = checked_object(fields, name_of)
    parameters, hints = inspect.signature(kind).parameters, _hints(kind)
    for name, one in parameters.items():
        if one.default is one.empty and name not in fields:
            raise ValueError(f"{name_of}: no {name!r}")
    for name, value in fields.items():
        if name not in parameters:
            raise ValueError(f"{name_of}: unknown {name!r}")
        if not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", hints[name])
            raise ValueError(f"{name_of}.{name}: expected {wanted}, got {value!r}")
        least = _LEAST if positive else 0
        if _is_number(value) and not least <= value <= _MOST:
            raise ValueError(
                f"{name_of}.{name}: expected a number in {least:g}..{_MOST:g}, got {value!r}"
            )
    return kind(**fields)


def check(value: Any, hint: Any, name: str) -> None:
    """Checks a value of JSON against a type, the members of objects and lists too.

    Args:
        value: What was parsed.
        hint: A `TypedDict`, `dict[str, X]`, `list[X]`, `X | None`, a `Literal` of texts, str, bool,
            int or float. Keys that a `TypedDict` does not know may be anything.
        name: What to call the value in errors.

    Raises:
        ValueError: It is of another type, lacks a key, is a text of several lines or with control
            characters, or a number below 0; names where.
    """
    within = f"{name}: " if name else ""
    if isinstance(hint, types.UnionType):
        if value is not None:
            (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
            check(value, hint, name)
    elif typing.is_typeddict(hint):
        fields = checked_object(value, name)
        for key in sorted(_required(hint) - fields.keys()):
            raise ValueError(f"{within}no {key!r}")
        for key, kind in _hints(hint).items():
            if key in fields:
                check(fields[key], kind, within + key)
    elif typing.get_origin(hint) is dict:
        for key, one in checked_object(value, name).items():
            check(key, str, f"{within}a key")
            check(one, typing.get_args(hint)[1], within + key)
    elif typing.get_origin(hint) is list:
        for one in checked_list(value, name):
            check(one, typing.get_args(hint)[0], name)
    elif not _fits(value, hint):
        is_one_of = typing.get_origin(hint) is typing.Literal
        wanted = " or ".join(typing.get_args(hint)) if is_one_of else hint.__name__
        raise ValueError(f"{name}: expected {wanted}, got {quoted(value)}")
    elif isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{name}: expected one line of printable text, got {quoted(value)}")
    elif _is_number(value) and not 0 <= value <= _MOST:
        raise ValueError(f"{name}: expected a number in 0..{_MOST:g}, got {quoted(value)}")


def checked_object(value: Any, name: str) -> dict[str, Any]:
    """The value, if it is an object.

    Raises:
        ValueError: It is something else; calls it `name`.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, got {type(value).__name__}")
    return value


def checked_list(value: Any, name: str) -> list[Any]:
    """The value, if it is a list.

    Raises:
        ValueError: It is something else; calls it `name`.
    """
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {type(value).__name__}")
    return value


def reason(error: Exception) -> str:
    """What is wrong with a file, of an error of using its content."""
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@functools.cache
def _required(kind: Any) -> frozenset[str]:
    """Keys of a `TypedDict`; its own `__required_keys__` are wrong where annotations are texts."""
    hints = typing.get_type_hints(kind, include_extras=True) if kind.__total__ else {}
    is_optional = lambda hint: typing.get_origin(hint) is typing.NotRequired  # noqa: E731
    return frozenset(name for name, hint in hints.items() if not is_optional(hint))


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
