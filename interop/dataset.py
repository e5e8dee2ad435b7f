"""Reads workloads and routing blobs of a flashinfer-trace folder that nobody vouches for.

    FOLDER/workloads/**/<definition>.jsonl     one workload a line
    FOLDER/blob/.../*.safetensors              `routing_logits` and `routing_bias`

Only the default definition has routing tensors; the others draw all of their inputs.

Nothing outside of the folder is opened, whatever a path says or a symlink points to. Everything is
checked before it is used; what does not fit is a `ValueError` that names the file and the entry.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float32

from interop import definitions
from interop.definitions import Definition
from interop.workloads import Workload
from jax_moe.io.files import confined_files, data_set_root, read_bytes, read_lines, shown
from jax_moe.io.safetensors_header import check_header
from jax_moe.io.strict_json import check_fields, number

MAX_TOKENS = 2**20
MAX_LINE_BYTES = 2**20
_MAX_FACTOR = float(np.finfo(np.float32).max)
_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
_UUID = re.compile(r"[0-9A-Za-z-]{1,64}")
STAND_IN = "stand_in_"
"""How the name of a routing blob begins that was drawn, and not captured from a model."""

_BLOBS = ("routing_logits", "routing_bias")


class BlobRef(NamedTuple):
    """A tensor in a safetensors file: the path as written in the workload, and the tensor's key."""

    path: str
    tensor_key: str


class DatasetWorkload(NamedTuple):
    """One line of the workload file, checked; the files it names are not yet opened.

    Attributes:
        workload: Its `blob` is empty where nothing comes from a file.
        routed_scaling_factor: Factor of all weights.
        blobs: Where the inputs that come from a file lie, by name.
    """

    workload: Workload
    routed_scaling_factor: float
    blobs: Mapping[str, BlobRef]


def definition_of(root: Path) -> Definition:
    """The definition that a data set is of: the first known one with workloads there.

    Args:
        root: The data set, resolved.

    Returns:
        The default one if there are workloads of none.

    Raises:
        ValueError: The folder of workloads leads out of the data set.
    """
    for one in definitions.ALL:
        if confined_files(root, "workloads", f"{one.name}.jsonl"):
            return one
    return definitions.DEFAULT


def input_types(definition: Definition) -> dict[str, str]:
    """How workloads give each input: "random", "scalar" or "safetensors"."""
    return {
        name: "scalar"
        if one["shape"] is None
        else "safetensors"
        if definition.is_default and name in _BLOBS
        else "random"
        for name, one in definition.record["inputs"].items()
    }


def read_workloads(
    folder: str | Path, definition: Definition = definitions.DEFAULT
) -> tuple[DatasetWorkload, ...]:
    """Reads a definition's workload file of a data set folder.

    Args:
        folder: The data set's root.
        definition: Whose.

    Returns:
        The workloads in the file's order.

    Raises:
        ValueError: The folder or file is missing, leaves the folder, or a line does not fit.
    """
    root = data_set_root(folder)
    name = definition.name
    found = confined_files(root, "workloads", f"{name}.jsonl")
    if not found:
        raise ValueError(f"{shown(root)}: no workloads/**/{name}.jsonl in this data set")
    rows: dict[str, DatasetWorkload] = {}
    for path in found:
        for where, line in read_lines(root, path, MAX_LINE_BYTES):
            row = _workload(line, definition, where)
            if row.workload.uuid in rows:
                raise ValueError(f"{where}: uuid {row.workload.uuid} appears twice")
            rows[row.workload.uuid] = row
    return tuple(rows.values())


def stand_ins(rows: Iterable[Workload]) -> str:
    """What is to be said of the routing blobs of a data set that are stand-ins; empty if none is.

    Args:
        rows: Its workloads.
    """
    rows = list(rows)
    count = sum(row.blob.startswith(STAND_IN) for row in rows)
    of = "" if count == len(rows) else f" for {count} of the {len(rows)} workloads"
    return f"stand-ins, not the published blobs{of}" if count else ""


def read_routing(
    folder: str | Path, row: DatasetWorkload
) -> tuple[Float32[np.ndarray, "T 256"], BFloat16[np.ndarray, " 256"]]:
    """Reads the routing tensors of a workload of the default definition.

    Args:
        folder: The data set's root, as for `read_workloads`.
        row: From `read_workloads`.

    Returns:
        `routing_logits` f32[T,256] and `routing_bias` bf16[256].

    Raises:
        ValueError: A file is missing, leaves the folder, is broken, or holds something else.
    """
    root = data_set_root(folder)
    experts = definitions.DEFAULT.num_experts
    shape = (row.workload.num_tokens, experts)
    where = f"workload {row.workload.uuid}"
    logits = _tensor(root, row.blobs["routing_logits"], "F32", shape, f"{where}: routing_logits")
    bias = _tensor(root, row.blobs["routing_bias"], "BF16", (experts,), f"{where}: routing_bias")
    return logits, bias


def digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each workload's routing and scalars, by uuid; without those that cannot be read.

    Args:
        folder: The data set's root, as for `read_workloads`, of the default definition.
    """
    found = {}
    for row in read_workloads(folder):
        with contextlib.suppress(ValueError):  # said where it is measured
            tensors = read_routing(folder, row)
            scalars = f"{row.workload.local_expert_offset} {row.routed_scaling_factor}"
            content = b"".join(one.tobytes() for one in tensors) + scalars.encode()
            found[row.workload.uuid] = hashlib.sha256(content).hexdigest()
    return found


def _workload(line: dict[str, Any], definition: Definition, where: str) -> DatasetWorkload:
    check_fields(line, ("definition", "workload"), ("solution", "evaluation"), where)
    if line["definition"] != definition.name:
        raise ValueError(f"{where}: definition {line['definition']!r} is not {definition.name!r}")
    row = check_fields(line["workload"], ("uuid", "axes", "inputs"), (), f"{where}: workload")
    if not isinstance(row["uuid"], str) or not _UUID.fullmatch(row["uuid"]):
        raise ValueError(f"{where}: uuid: expected letters, digits and dashes, got {row['uuid']!r}")
    axes = check_fields(row["axes"], ("seq_len",), (), f"{where}: axes")
    tokens = _integer(axes["seq_len"], 0, MAX_TOKENS, f"{where}: seq_len")
    types = input_types(definition)
    inputs = check_fields(row["inputs"], tuple(types), (), f"{where}: inputs")
    scalars, blobs = dict(definition.scalars), {}
    for name, kind in types.items():
        entry = f"{where}: {name}"
        if kind == "scalar":
            scalars[name] = _scalar(inputs[name], entry)
        elif kind == "safetensors":
            blobs[name] = _blob(inputs[name], entry)
        elif check_fields(inputs[name], ("type",), (), entry)["type"] != "random":
            raise ValueError(f"{entry}: expected type 'random', got {inputs[name]['type']!r}")
    last = definition.num_experts - definition.num_local_experts
    offset = _integer(scalars["local_expert_offset"], 0, last, f"{where}: local_expert_offset")
    factor = number(
        scalars["routed_scaling_factor"],
        -_MAX_FACTOR,
        _MAX_FACTOR,
        f"{where}: routed_scaling_factor",
    )
    blob = Path(blobs["routing_logits"].path).name if blobs else ""
    return DatasetWorkload(Workload(row["uuid"], tokens, offset, blob), factor, blobs)


def _integer(value: Any, low: int, high: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{where}: expected an integer in {low}..{high}, got {value!r}")
    return value


def _scalar(spec: Any, where: str) -> Any:
    check_fields(spec, ("type", "value"), (), where)
    if spec["type"] != "scalar":
        raise ValueError(f"{where}: expected type 'scalar', got {spec['type']!r}")
    return spec["value"]


def _blob(spec: Any, where: str) -> BlobRef:
    check_fields(spec, ("type", "path", "tensor_key"), (), where)
    path, key = spec["path"], spec["tensor_key"]
    if spec["type"] != "safetensors":
        raise ValueError(f"{where}: expected type 'safetensors', got {spec['type']!r}")
    if not isinstance(path, str) or not isinstance(key, str):
        kinds = f"{type(path).__name__} and {type(key).__name__}"
        raise ValueError(f"{where}: expected text for path and tensor_key, got {kinds}")
    if Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
        raise ValueError(f"{where}: expected a relative path without '..', got {path!r}")
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: expected a path of Unicode text, got {shown(path)}") from None
    return BlobRef(path, key)


def _tensor(root: Path, ref: BlobRef, dtype: str, shape: tuple[int, ...], entry: str) -> np.ndarray:
    path = root / ref.path
    try:
        content = read_bytes(root, path)
        tensors = check_header(content, shown(path))
    except ValueError as error:
        raise ValueError(f"{entry}: {error}") from None
    where = f"{entry}: {shown(path)}: {ref.tensor_key!r}"
    if ref.tensor_key not in tensors:
        raise ValueError(f"{where}: no such tensor; the file holds {sorted(tensors)}")
    found = tensors[ref.tensor_key]
    if (found.dtype, found.shape) != (dtype, shape):
        raise ValueError(
            f"{where}: expected {dtype}{list(shape)}, got {found.dtype}{list(found.shape)}"
        )
    import safetensors  # of the extra bench; the rest of this module does without

    try:
        loaded = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where}: {error}") from None
    return np.frombuffer(loaded[ref.tensor_key]["data"], _DTYPES[dtype]).reshape(shape)
