"""A folder of safetensors files as Hugging Face lays them out: the index, headers, bytes.

Nothing is mapped: bytes are read to where they belong (`preadv`). A file that shrinks while it is
read is then an error that names the tensor, where a map would kill the process; and reading into
memory that is used again spares the page faults of a map.
"""

import math
import os
import reprlib
import stat
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, Never, Self

import ml_dtypes
import numpy as np

from jax_moe.io.files import folder_name, found_at, kind, parse_utf8, shown
from jax_moe.io.safetensors_header import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
MAX_JSON_BYTES = 2**28
DTYPES: Mapping[str, Any] = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
"""What the loaders read, in the format's names."""


class Shard:
    """An open safetensors file.

    It stays open as long as the object lives, so a file that is put in its place changes nothing
    here.

    Args:
        path: The file. It may be a symlink, as the files of a hub cache are.

    Raises:
        ValueError: No regular file, not readable, or its header is refused.

    Attributes:
        where: The path, for errors.
        tensors: What the header says, by name.
        metadata: The header's free text.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.where = shown(path)
        self._descriptor = _open(path)
        weakref.finalize(self, os.close, self._descriptor)
        try:
            header = read_header(self._descriptor, self.where)
        except OSError as error:
            raise ValueError(f"{self.where}: cannot be read: {error.strerror}") from None
        self.tensors: Mapping[str, TensorInfo] = header.tensors
        self.metadata: Mapping[str, str] = header.metadata
        self._data_begin = header.data_begin

    def __reduce__(self) -> Never:
        raise TypeError(f"{self.where}: an open file cannot be copied or pickled; open it again")

    def tensor(self, name: str) -> "Tensor":
        """One of its tensors.

        Raises:
            ValueError: There is none of that name.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.where}: {name!r}: no such tensor")
        return Tensor(name, self, self.tensors[name])

    def read_into(self, begin: int, target: memoryview) -> bool:
        """Reads bytes of the data, from any thread.

        Args:
            begin: The first byte, counted from the begin of the data.
            target: Writable bytes; as many are read.

        Returns:
            Whether the file held that many.

        Raises:
            OSError: It cannot be read.
        """
        at = self._data_begin + begin
        while len(target):  # one call reads at most 2 GiB
            count = os.preadv(self._descriptor, [target], at)
            if not count:
                return False
            target, at = target[count:], at + count
        return True


class Tensor(NamedTuple):
    """A tensor in a shard."""

    name: str
    shard: Shard
    info: TensorInfo

    @property
    def where(self) -> str:
        """File and name, for errors."""
        return f"{self.shard.where}: {self.name!r}"

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.info.end - self.info.begin

    @property
    def row_bytes(self) -> int:
        """Bytes along the last axis."""
        return self.nbytes // max(math.prod(self.info.shape[:-1]), 1)

    def check(self, dtypes: tuple[str, ...], shape: tuple[int, ...], why: str = "") -> "Tensor":
        """Checks dtype and shape.

        Args:
            dtypes: The dtypes it may have, in the format's names.
            shape: The shape it must have.
            why: What the error adds after the expected shape.

        Returns:
            The same tensor.

        Raises:
            ValueError: Another dtype or shape; names file and tensor.
        """
        if self.info.dtype not in dtypes or self.info.shape != shape:
            raise ValueError(
                f"{self.where}: expected {' or '.join(dtypes)} {list(shape)}{why}, "
                f"got {self.info.dtype} {list(self.info.shape)}"
            )
        return self

    def read_into(self, begin: int, target: memoryview) -> None:
        """Reads some of its bytes, from any thread.

        Args:
            begin: The first byte, counted from the begin of the tensor.
            target: Writable bytes; as many are read.

        Raises:
            ValueError: The file ended, or cannot be read; names file and tensor.
        """
        try:
            complete = self.shard.read_into(self.info.begin + begin, target)
        except OSError as error:
            raise ValueError(f"{self.where}: cannot be read: {error.strerror}") from None
        if not complete:
            raise ValueError(f"{self.where}: the file was truncated while it was read")

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Reads a small tensor, of one of the dtypes of `DTYPES`.

        Args:
            first: The first index along axis 0.
            count: How many there; None for all.

        Returns:
            The array, as stored.

        Raises:
            ValueError: As for `read_into`.
        """
        shape = self.info.shape if count is None else (count, *self.info.shape[1:])
        array = np.empty(shape, DTYPES[self.info.dtype])
        step = self.nbytes // max(self.info.shape[0], 1)
        self.read_into(first * step, memoryview(array.view(np.uint8).reshape(-1)))
        return array


class Checkpoint:
    """A checkpoint's folder: one index, shards that are opened when they are needed.

    The loaders take a folder's path as well; make this once where you load many layers, so that
    the index and the headers are parsed once. A copy, also one that was pickled, opens the folder
    anew.

    Args:
        folder: It holds `model.safetensors.index.json` and the shards which that names, or a single
            `model.safetensors`; and `config.json`. Files may be symlinks to anywhere, as in the
            cache of the hub; the names in the index are those of files in the folder.

    Raises:
        TypeError: `folder` is no path.
        ValueError: No such folder, neither an index nor a single file, malformed, or the index
            names anything but a file in the folder.

    Attributes:
        index: Path of the file that lists the tensors, for errors.
        weight_map: Tensor name to file name.
        config: `config.json`; empty if there is none.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = folder_name("folder", folder)
        self._shards: dict[str, Shard] = {}
        if not os.path.isdir(self._folder):
            found = found_at(self._folder)
            raise ValueError(
                f"folder: {shown(folder)}: expected the folder of a checkpoint, got {found}"
            )
        self.index = shown(self._path(INDEX))
        if os.path.lexists(self._path(INDEX)):
            index = _read_json(self._path(INDEX))
            self.weight_map = _checked_map(index.get("weight_map"), self.index)
        elif os.path.lexists(self._path(SINGLE)):
            self.index = shown(self._path(SINGLE))
            self.weight_map = dict.fromkeys(self._shard(SINGLE).tensors, SINGLE)
        else:
            raise ValueError(f"{shown(folder)}: expected {INDEX} or {SINGLE} in it, got neither")
        has_config = os.path.lexists(self._path(CONFIG))
        self.config: dict[str, Any] = _read_json(self._path(CONFIG)) if has_config else {}

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (os.path.abspath(self._folder),)

    @property
    def config_path(self) -> str:
        """Path of `config.json`, for errors."""
        return shown(self._path(CONFIG))

    def tensor(self, name: str) -> Tensor:
        """Finds a tensor and opens its shard.

        Raises:
            ValueError: The index does not list it, its shard does not hold it, or the shard is
                refused.
        """
        if name not in self.weight_map:
            raise ValueError(f"{self.index}: {name!r}: missing")
        return self._shard(self.weight_map[name]).tensor(name)

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _shard(self, file: str) -> Shard:
        if file not in self._shards:
            self._shards[file] = Shard(self._path(file))
        return self._shards[file]


def _open(path: str | os.PathLike[str]) -> int:
    """Opens a regular file, symlinks followed; a pipe would block, so it is never waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"{shown(path)}: cannot be opened: {error.strerror}") from None
    except ValueError as error:  # a NUL in the path
        raise ValueError(f"{shown(path)}: cannot be opened: {error}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ValueError(f"{shown(path)}: expected a regular file, got {kind(mode)}")
    return descriptor


def _read_json(path: str) -> dict[str, Any]:
    with open(_open(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{shown(path)}: {size} bytes, more than {MAX_JSON_BYTES}")
        try:
            content = file.read(size)  # not more: Python would allocate it
        except OSError as error:
            raise ValueError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    return parse_utf8(content, shown(path))


def _checked_map(weight_map: Any, where: str) -> dict[str, str]:
    if not isinstance(weight_map, dict) or not weight_map:
        found = reprlib.repr(weight_map)
        raise ValueError(f"{where}: expected a weight_map with tensors in it, got {found}")
    accepted: set[str] = set()
    for name, file in weight_map.items():
        if isinstance(file, str) and file in accepted:
            continue
        if not isinstance(file, str) or not _is_file_name(file):
            raise ValueError(
                f"{where}: {name!r}: expected the name of a .safetensors file in this folder, "
                f"without '/' or '..', got {file!r:.200}"
            )
        accepted.add(file)
    return weight_map


def _is_file_name(name: str) -> bool:
    plain = name.isprintable() and not any(part in name for part in ("/", "\\", ".."))
    return plain and name.endswith(".safetensors") and len(name) < 256
