"""Which table of tilings a call gets: the user's own, else one that is shipped.

The tuners write a user's tables into the cache folder, a file for each set of kernels, kind of GPU
and sizes. What does not fit this device, this JAX or this package is ignored with a warning that
says why.
"""

from __future__ import annotations

import functools
import os
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import jax

from pallas_kernels.files import cache_folder, kind
from pallas_kernels.tuning import table_format
from pallas_kernels.tuning.table_format import DEEPSEEK_V3, Kernels, Key, Sizes, Table

SWITCH = "JAX_MOE_TUNING"
"""The environment variable that makes everyone use the shipped tables when it is "off".

Anything else is ignored with a warning, as a table that does not fit is.
"""

_MAX_BYTES = 2**20


class Gpu(NamedTuple):
    """What tables are looked up for.

    Attributes:
        compute_capability: As JAX writes it ("9.0"), of the table that serves the GPU if its kind
            has none of its own.
        kind: As JAX calls it ("NVIDIA H200"); None for a GPU that is only compiled for.
    """

    compute_capability: str
    kind: str | None = None

    @property
    def architecture(self) -> str:
        """Such as "sm_90"."""
        return f"sm_{self.compute_capability.replace('.', '')}"


class Chosen[C](NamedTuple):
    """A table and whether it comes with the package."""

    table: Table[C]
    is_shipped: bool


@functools.cache
def choose[C](kernels: Kernels[C], gpu: Gpu, sizes: Sizes) -> Chosen[C]:
    """The table for a GPU and the sizes of a rank, read once per process.

    Tried in this order: the user's, the shipped one of this kind of GPU, the shipped one of its
    compute capability; and if there is none for these sizes, the same three for DeepSeek-V3's.

    Args:
        kernels: Whose tables.
        gpu: Compiled for.
        sizes: Of a rank.

    Raises:
        LookupError: The package has no table for that compute capability.
    """
    for key_sizes in dict.fromkeys((sizes, DEEPSEEK_V3)):
        if (own := _own(kernels, gpu, key_sizes)) is not None:
            return Chosen(own, is_shipped=False)
        if (table := shipped(kernels, gpu, key_sizes)) is not None:
            return Chosen(table, is_shipped=True)
    return Chosen(nearest_shipped(kernels, gpu, sizes), is_shipped=True)


def shipped[C](kernels: Kernels[C], gpu: Gpu, sizes: Sizes) -> Table[C] | None:
    """The package's table for exactly these sizes: the GPU's own, else its capability's."""
    for device in filter(None, (gpu.kind, gpu.architecture)):
        if (table := table_format.shipped(kernels, device, sizes)) is not None:
            return table
    return None


def nearest_shipped[C](kernels: Kernels[C], gpu: Gpu, sizes: Sizes) -> Table[C]:
    """The package's table for these sizes, else for DeepSeek-V3's.

    Raises:
        LookupError: The package has no table for that compute capability.
    """
    for candidate in (sizes, DEEPSEEK_V3):
        if (table := shipped(kernels, gpu, candidate)) is not None:
            return table
    raise LookupError(f"no shipped tilings of {kernels.name} for {gpu.architecture}")


def folder() -> Path:
    """Where users' tables lie.

    Raises:
        RuntimeError: The user has no home folder.
    """
    return cache_folder() / "tuning"


def path_of(kernels: str, device_kind: str, sizes: Sizes) -> Path:
    """Where the user's table lies.

    Raises:
        RuntimeError: The user has no home folder.
    """
    return folder() / Key(kernels, device_kind, sizes).file_name


def read[C](path: Path, kernels: Kernels[C], gpu: Gpu, sizes: Sizes) -> Table[C]:
    """Reads a user's table.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no valid table for this GPU, these sizes and this JAX, or has a tiling
            that cannot be built; says why.
    """
    key = Key(kernels.name, gpu.kind or gpu.architecture, sizes)
    table = table_format.parse(_text(path), kernels, key, jax.__version__)
    known = nearest_shipped(kernels, gpu, sizes)
    for block_m, pair in table.items():
        for role, config in pair._asdict().items():
            if config == getattr(known[block_m], role):  # those have been built by tests
                continue
            try:
                kernels.check(role, config, sizes)
            except Exception as error:  # whatever stops the kernel from being built
                raise ValueError(f"table.{block_m}.{role}: {error!s:.300}") from None
    return table


def _own[C](kernels: Kernels[C], gpu: Gpu, sizes: Sizes) -> Table[C] | None:
    """The user's table if there is a valid one; warns of an invalid one."""
    said = os.environ.get(SWITCH, "")
    if gpu.kind is None or said == "off":
        return None
    if said:
        warnings.warn(f"{SWITCH}: ignored: expected 'off' or nothing, got {said!r}", stacklevel=4)
    try:
        path = path_of(kernels.name, gpu.kind, sizes)
    except RuntimeError:  # no home folder, so no cache
        return None
    try:
        return read(path, kernels, gpu, sizes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        warnings.warn(f"{path}: ignored, the shipped tilings are used: {reason}", stacklevel=4)
        return None


def _text(path: Path) -> str:
    """The content of a regular file; a link, a pipe or a device is none."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"expected a regular file, got {kind(status.st_mode)}")
        if status.st_size > _MAX_BYTES:
            raise ValueError(f"expected at most {_MAX_BYTES} bytes, got {status.st_size}")
        with open(handle, encoding="utf-8", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)
