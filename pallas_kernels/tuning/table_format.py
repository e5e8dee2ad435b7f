"""Tables of tilings as JSON: their form, and the ones that come with the package.

A table belongs to a set of kernels, a GPU and the sizes of a rank, and says for each `block_m` how
both matmuls are tiled. Its file is data: every field must have the name and the type of the
configuration's own. `tables/` beside this module holds those that are shipped, for one kind of GPU
as JAX calls it ("NVIDIA H100 80GB HBM3") or for all GPUs of a compute capability ("sm_90").
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels.files import write_atomically

SCHEMA = 2
"""Raise it when the file's form changes, or the kernels so much that old measurements mislead."""

FOLDER = resources.files("pallas_kernels.tuning") / "tables"
"""Where the shipped tables lie."""

_MAX_INTEGER = 2**31 - 1


class Pair[C](NamedTuple):
    """Tilings of the two matmuls; both have the plan's `block_m`."""

    up_projection: C
    down_projection: C


type Table[C] = Mapping[int, Pair[C]]
"""`block_m` to tilings."""


class Sizes(NamedTuple):
    """The sizes of one rank that a table is made for: H, I and E_local."""

    hidden_size: int
    intermediate_size: int
    num_local_experts: int


DEEPSEEK_V3 = Sizes(7168, 2048, 32)
"""The sizes whose table serves all sizes that have none of their own."""

type Check[C] = Callable[[str, C, Sizes], None]
"""`check(role, config, sizes)` raises if that kernel cannot be built; a role is a `Pair` field."""


@dataclasses.dataclass(frozen=True)
class Kernels[C]:
    """A set of kernels that share tables.

    Attributes:
        name: In file names and headers.
        config: The type of a tiling: a dataclass of plain fields, `block_m` among them.
        block_ms: What a table must have a row for.
        check: Refuses what cannot be built.
    """

    name: str
    config: type[C]
    block_ms: tuple[int, ...]
    check: Check[C]


class Key(NamedTuple):
    """What a table is for.

    Attributes:
        kernels: Name of the set of kernels.
        device: A kind of GPU as JAX calls it, or "sm_90" for a compute capability.
        sizes: Of a rank.
    """

    kernels: str
    device: str
    sizes: Sizes

    @property
    def file_name(self) -> str:
        """Such as "mosaic-sm_90-h7168-i2048-e32.json"."""
        device = re.sub(r"[^A-Za-z0-9_]+", "-", self.device).strip("-")
        hidden, intermediate, experts = self.sizes
        return f"{self.kernels}-{device}-h{hidden}-i{intermediate}-e{experts}.json"


def shipped[C](kernels: Kernels[C], device: str, sizes: Sizes) -> Table[C] | None:
    """The table of the package for exactly this device and these sizes, or None."""
    key = Key(kernels.name, device, sizes)
    file = FOLDER / key.file_name
    if not file.is_file():
        return None
    return parse(file.read_text("utf-8"), kernels, key)


def parse[C](text: str, kernels: Kernels[C], key: Key, jax_version: str | None = None) -> Table[C]:
    """The table in a file's text; nothing is built to see whether it can be.

    Args:
        text: JSON.
        kernels: Whose table it must be.
        key: What it must be for.
        jax_version: With which JAX it must have been measured; None takes any.

    Raises:
        ValueError: It is no valid table of that kind; says why.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    wanted = _header(key) | ({"jax": jax_version} if jax_version else {})
    for name, value in wanted.items():
        if content.get(name) != value:
            raise ValueError(f"{name}: expected {value!r}, got {content.get(name)!r:.100}")
    rows = _fields("table", content.get("table"), map(str, kernels.block_ms))
    return {m: _pair(kernels.config, m, rows[str(m)], f"table.{m}") for m in kernels.block_ms}


def write(path: Path, key: Key, table: Table[Any], measured: Any, note: str = "") -> None:
    """Replaces a table atomically; of two writers at once one wins whole.

    Args:
        path: The file.
        key: What the table is for.
        table: The tilings.
        measured: What was measured, as JSON; kept for people, not read back.
        note: For people as well.

    Raises:
        OSError: The file cannot be written.
    """
    rows = {
        str(block_m): {role: dataclasses.asdict(config) for role, config in pair._asdict().items()}
        for block_m, pair in table.items()
    }
    content = _header(key) | {"jax": jax.__version__, "note": note}
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(_text(content | {"table": rows, "measured": measured}) + "\n")


def _text(value: Any, indent: str = "") -> str:
    """JSON with a line for each tiling: what holds no other object stays on one line."""
    inner = f",\n{indent} "
    if isinstance(value, dict) and any(map(_holds_objects, value.values())):
        items = [f"{json.dumps(key)}: {_text(item, indent + ' ')}" for key, item in value.items()]
        return f"{{{inner[1:]}{inner.join(items)}\n{indent}}}"
    if isinstance(value, list) and _holds_objects(value):
        items = [_text(item, indent + " ") for item in value]
        return f"[{inner[1:]}{inner.join(items)}\n{indent}]"
    return json.dumps(value)


def _holds_objects(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_holds_objects, value)))


def _header(key: Key) -> dict[str, Any]:
    """What must be equal for a file to count."""
    return {
        "schema": SCHEMA,
        "kernels": key.kernels,
        "device": key.device,
        **key.sizes._asdict(),
    }


def _fields(where: str, value: Any, names: Iterable[str]) -> dict[str, Any]:
    """The value, if it is an object with exactly these names."""
    wanted = sorted(names)
    came = sorted(value) if isinstance(value, dict) else value
    if came != wanted:
        raise ValueError(f"{where}: expected the fields {wanted}, got {came!r:.100}")
    return value


def _pair[C](kind: type[C], block_m: int, value: Any, where: str) -> Pair[C]:
    roles = _fields(where, value, Pair._fields)
    pair = Pair(*(_config(kind, roles[role], f"{where}.{role}") for role in Pair._fields))
    for role, config in pair._asdict().items():
        if config.block_m != block_m:
            raise ValueError(f"{where}.{role}.block_m: expected {block_m}, got {config.block_m}")
    return pair


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
    """JSON's value as an annotation says: bool, int, str, None, a tuple or a choice of such."""
    origin, hints = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if isinstance(value, str) and value in hints:
            return value
        raise ValueError(f"{where}: expected one of {list(hints)}, got {value!r:.100}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in hints:
            return None
        return _typed(value, next(one for one in hints if one is not type(None)), where)
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_typed(item, hints[0], where) for item in value)
    elif type(value) is hint and (hint in (bool, str) or abs(value) <= _MAX_INTEGER):
        return value
    raise ValueError(f"{where}: expected {hint}, got {value!r:.100}")
