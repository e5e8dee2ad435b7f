"""A strict look at a safetensors header before anything is loaded by it."""

import math
from typing import Any, NamedTuple

from jax_moe.io.files import parse_utf8

MAX_HEADER_BYTES = 2**20
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """What the header says of one tensor; `begin` and `end` are bytes into the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_header(content: bytes, where: str) -> dict[str, TensorInfo]:
    """Checks that a file's header is well formed and that its tensors tile the data exactly.

    Args:
        content: The whole file.
        where: The file's name, for errors.

    Returns:
        Tensor name to its entry.

    Raises:
        ValueError: Truncated, a wrong header length, malformed JSON, an unknown key or dtype, or
            offsets that overlap, leave holes or leave the file.
    """
    if len(content) < 8:
        raise ValueError(f"{where}: truncated: {len(content)} bytes, not even a header length")
    length = int.from_bytes(content[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(content) - 8):
        raise ValueError(f"{where}: header of {length} bytes in a file of {len(content)}")
    entries = parse_utf8(content[8 : 8 + length], f"{where}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{where}: '__metadata__': expected an object of strings")
    tensors = {name: _entry(entry, f"{where}: {name!r}") for name, entry in entries.items()}
    end = 0
    # By end too: an empty tensor begins where its neighbour does, in whatever order they are named.
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            problem = "overlaps another tensor" if tensor.begin < end else "leaves a hole before it"
            raise ValueError(f"{where}: {name!r}: data at {tensor.begin} {problem}")
        end = tensor.end
    if end != len(content) - 8 - length:
        raise ValueError(
            f"{where}: tensors take {end} bytes, the file holds {len(content) - 8 - length}"
        )
    return tensors


def _entry(entry: Any, where: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ValueError(f"{where}: unknown dtype {dtype!r}")
    if not _sizes(shape) or len(shape) > 8:
        raise ValueError(f"{where}: expected a shape of non-negative integers, got {shape!r}")
    if not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{where}: expected two data_offsets, got {offsets!r}")
    size = math.prod(shape) * _DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"{where}: {dtype}{shape} takes {size} bytes, data_offsets are {offsets}")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        for value in values
    )
