"""Tables of tilings that a user measured: JSON in the user's cache folder, checked when read.

One file for each kind of GPU and each set of kernels. A file is data: every field must have the
name and the type of the configuration's own, and what does not fit this device, this JAX or this
package is ignored with a warning that says why.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels.files import cache_folder, write_atomically

SCHEMA = 1
"""Raise it when the file's form changes, or the kernels so much that old measurements mislead."""

SWITCH = "JAX_MOE_TUNING"
"""The environment variable that makes everyone use the shipped tables when it is "off"."""

_MAX_BYTES = 2**20
_MAX_INTEGER = 2**31 - 1


class Pair[C](NamedTuple):
    """Tilings of the two matmuls; both have the plan's `block_m`."""

    up_projection: C
    down_projection: C


type Table[C] = Mapping[int, Pair[C]]
"""`block_m` to tilings."""

type Check[C] = Callable[[str, C], None]
"""`check(role, config)` raises if the kernel cannot be built; a role is a field of `Pair`."""


def choose[C](kernels: str, device_kind: str, shipped: Table[C], check: Check[C]) -> Table[C]:
    """The user's table if there is a valid one, else the shipped one; warns of an invalid one.

    Args:
        kernels: Name of the set of kernels.
        device_kind: This machine's GPU, as JAX calls it.
        shipped: The table that comes with the package.
        check: Refuses what cannot be built.
    """
    if os.environ.get(SWITCH) == "off":
        return shipped
    try:
        path = path_of(kernels, device_kind)
    except RuntimeError:  # no home folder, so no cache
        return shipped
    try:
        return read(path, kernels, device_kind, shipped, check)
    except FileNotFoundError:
        return shipped
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        warnings.warn(f"{path}: ignored, the shipped tilings are used: {reason}", stacklevel=2)
        return shipped


def path_of(kernels: str, device_kind: str) -> Path:
    """Where the table for a kind of GPU lies."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_kind).strip("-")
    return cache_folder() / "tuning" / f"{kernels}-{name}.json"


def read[C](
    path: Path, kernels: str, device_kind: str, shipped: Table[C], check: Check[C]
) -> Table[C]:
    """Reads a table.

    Args:
        path: The file.
        kernels: Name of the set of kernels.
        device_kind: The GPU's, as JAX calls it.
        shipped: The table that comes with the package: its keys and types are the valid ones.
        check: Refuses what cannot be built.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no valid table for this device and these versions; says why.
    """
    try:
        content = json.loads(_text(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")
    for name, wanted in _header(kernels, device_kind, shipped).items():
        if content.get(name) != wanted:
            raise ValueError(f"{name}: expected {wanted!r}, got {content.get(name)!r:.100}")
    rows = _fields("table", content.get("table"), [str(block_m) for block_m in shipped])
    table = {}
    for block_m, pair in shipped.items():
        where = f"table.{block_m}"
        roles = _fields(where, rows[str(block_m)], Pair._fields)
        found = [
            _config(type(config), roles[role], f"{where}.{role}")
            for role, config in pair._asdict().items()
        ]
        table[block_m] = Pair(*found)
        for role, config in zip(Pair._fields, found, strict=True):
            _check(config, getattr(pair, role), role, block_m, check)
    return table


def write[C](path: Path, kernels: str, device_kind: str, table: Table[C], measured: Any) -> None:
    """Replaces a table atomically; of two writers at once one wins whole.

    Args:
        path: The file.
        kernels: Name of the set of kernels.
        device_kind: The GPU that was measured.
        table: The tilings.
        measured: What was measured, as JSON; kept for people, not read back.

    Raises:
        OSError: The file cannot be written.
    """
    rows = {
        str(block_m): {role: dataclasses.asdict(config) for role, config in pair._asdict().items()}
        for block_m, pair in table.items()
    }
    content = _header(kernels, device_kind, table) | {"table": rows, "measured": measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def _header(kernels: str, device_kind: str, table: Table[Any]) -> dict[str, Any]:
    """What must be equal for a file to count."""
    config = next(iter(table.values())).up_projection
    return {
        "schema": SCHEMA,
        "kernels": kernels,
        "device": device_kind,
        "jax": jax.__version__,
        "fields": [field.name for field in dataclasses.fields(config)],
    }


def _text(path: Path) -> str:
    """The content of a regular file; a link, a pipe or a device is none."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("expected a regular file")
        if status.st_size > _MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes, more than {_MAX_BYTES}")
        with open(handle, encoding="utf-8", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def _fields(where: str, value: Any, names: typing.Iterable[str]) -> dict[str, Any]:
    """The value, if it is an object with exactly these names."""
    wanted = sorted(names)
    found = sorted(value) if isinstance(value, dict) else value
    if found != wanted:
        raise ValueError(f"{where}: expected the fields {wanted}, got {found!r:.100}")
    return value


def _config[C](kind: type[C], value: Any, where: str) -> C:
    """A configuration of plain fields, each checked against its annotation."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = _fields(where, value, names)
    typed = {name: _typed(values[name], hints[name], f"{where}.{name}") for name in names}
    try:
        return kind(**typed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _typed(value: Any, hint: Any, where: str) -> Any:
    """JSON's value as an annotation says: bool, int, None, a tuple of such, or a choice of them."""
    if typing.get_origin(hint) is typing.Literal:
        if isinstance(value, str) and value in typing.get_args(hint):
            return value
        raise ValueError(
            f"{where}: expected one of {list(typing.get_args(hint))}, got {value!r:.100}"
        )
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = typing.get_args(hint)
        if value is None and type(None) in choices:
            return None
        hint = next(choice for choice in choices if choice is not type(None))
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list):
            return tuple(_typed(item, typing.get_args(hint)[0], where) for item in value)
    elif type(value) is hint and (hint is bool or abs(value) <= _MAX_INTEGER):
        return value
    raise ValueError(f"{where}: expected {hint}, got {value!r:.100}")


def _check[C](config: C, shipped: C, role: str, block_m: int, check: Check[C]) -> None:
    where = f"table.{block_m}.{role}"
    if getattr(config, "block_m") != block_m:  # noqa: B009
        raise ValueError(f"{where}.block_m: expected {block_m}")
    if config == shipped:
        return
    try:
        check(role, config)
    except Exception as error:  # whatever stops the kernel from being built
        raise ValueError(f"{where}: {error!s:.300}") from None
