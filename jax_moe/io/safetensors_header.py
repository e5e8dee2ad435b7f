"""A strict look at a safetensors header before anything is loaded by it."""

import math
import os
import reprlib
from typing import Any, NamedTuple

from jax_moe.io.files import parse_utf8

MAX_HEADER_BYTES = 2**20
MAX_SHARD_HEADER_BYTES = 100_000_000
"""What the format itself allows; `read_header` reads nothing else of a file."""

_LFS_POINTER = b"version "
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

_TOO_LARGE = 2**63
_RANGE = "from 0 to 2^63 - 1"


class TensorInfo(NamedTuple):
    """What the header says of one tensor; `begin` and `end` are bytes into the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """A file's header: its tensors, its free text, and the byte at which the data begins."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_begin: int


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
    length = _header_length(content[:8], len(content), MAX_HEADER_BYTES, where)
    return _parse(content[8 : 8 + length], len(content) - 8 - length, where).tensors


def read_header(descriptor: int, where: str) -> Header:
    """`check_header` of an open file of any size: only the header is read.

    Args:
        descriptor: The open file.
        where: Its name, for errors.

    Returns:
        The header.

    Raises:
        ValueError: As for `check_header`, or the file ends while it is read.
        OSError: It cannot be read.
    """
    size = os.fstat(descriptor).st_size
    length = _header_length(os.pread(descriptor, 8, 0), size, MAX_SHARD_HEADER_BYTES, where)
    header = os.pread(descriptor, length, 8)
    if len(header) < length:
        raise ValueError(f"{where}: truncated: the file ends within its header")
    return _parse(header, size - 8 - length, where)


def _header_length(head: bytes, file_bytes: int, limit: int, where: str) -> int:
    if len(head) < 8:
        raise ValueError(f"{where}: truncated: {len(head)} bytes, not even a header length")
    if head == _LFS_POINTER:  # what a clone without Git LFS leaves in place of the file
        raise ValueError(f"{where}: a pointer of Git LFS, not the file: `git lfs pull` fetches it")
    length = int.from_bytes(head, "little")
    if length > min(limit, file_bytes - 8):
        raise ValueError(f"{where}: header of {length} bytes in a file of {file_bytes}")
    return length


def _parse(header: bytes, data_bytes: int, where: str) -> Header:
    entries = parse_utf8(header, f"{where}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        found = reprlib.repr(metadata)
        raise ValueError(f"{where}: '__metadata__': expected an object of strings, got {found}")
    tensors = {name: _entry(entry, f"{where}: {name!r}") for name, entry in entries.items()}
    end, last = 0, "header"
    # By end too: an empty tensor begins where its neighbour does, in whatever order they are named.
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            problem = "overlaps another tensor" if tensor.begin < end else "leaves a hole before it"
            raise ValueError(f"{where}: {name!r}: data at {tensor.begin} {problem}")
        end, last = tensor.end, repr(name)
    if end != data_bytes:
        raise ValueError(
            f"{where}: tensors take {end} bytes, the file holds {data_bytes} (up to {last})"
        )
    return Header(tensors, metadata, 8 + len(header))


def _entry(entry: Any, where: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        found = reprlib.repr(entry)
        raise ValueError(f"{where}: expected exactly dtype, shape and data_offsets, got {found}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        known, found = ", ".join(_DTYPE_BITS), reprlib.repr(dtype)
        raise ValueError(f"{where}: dtype: expected one of {known}, got {found}")
    if not _sizes(shape) or len(shape) > 8:
        found = reprlib.repr(shape)
        raise ValueError(f"{where}: shape: expected at most 8 integers {_RANGE}, got {found}")
    if not _sizes(offsets) or len(offsets) != 2:
        found = reprlib.repr(offsets)
        raise ValueError(f"{where}: data_offsets: expected two integers {_RANGE}, got {found}")
    bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{where}: shape: expected whole bytes of {dtype}, got {shape}")
    if offsets[1] - offsets[0] != bits // 8:
        raise ValueError(
            f"{where}: data_offsets: expected {bits // 8} bytes between them, which {dtype}{shape} "
            f"takes, got {offsets}"
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _TOO_LARGE
        for value in values
    )
