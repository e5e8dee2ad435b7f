"""Loads the Hopper operators of sglang-kernel, without importing that package.

Only one shared library of the 615 MB wheel is needed, so a machine may carry just that file and
name it in `JAX_MOE_SGL_LIBRARY`; otherwise the installed package is searched.
"""

import ctypes
import functools
import os
from importlib import util
from pathlib import Path
from typing import Any

from interop.solutions.packages import hopper_unavailable

PATH_VARIABLE = "JAX_MOE_SGL_LIBRARY"
_LIBRARY = Path("sm90", "common_ops.abi3.so")
# The library does not say where these lie; with RTLD_GLOBAL it finds the ones of torch.
_CUDA_LIBRARIES = ("libcudart.so.13", "libnvrtc.so.13", "libcublasLt.so.13", "libcublas.so.13")


def find() -> Path | None:
    """Path of the operator library, or None."""
    named = os.environ.get(PATH_VARIABLE)
    if named:
        return Path(named) if Path(named).is_file() else None
    package = util.find_spec("sgl_kernel")
    for folder in (package.submodule_search_locations or ()) if package else ():
        if (Path(folder) / _LIBRARY).is_file():
            return Path(folder) / _LIBRARY
    return None


def unavailable_reason() -> str | None:
    """Why the operators cannot be used here, or None."""
    if find() is not None:
        return hopper_unavailable()
    named = os.environ.get(PATH_VARIABLE)
    if named:
        return f"{PATH_VARIABLE} names no file: {named}"
    return f"package sglang-kernel is not installed and {PATH_VARIABLE} is not set"


@functools.cache
def load() -> Any:
    """Loads the library once per process.

    Returns:
        The operator namespace `torch.ops.sgl_kernel`.

    Raises:
        RuntimeError: the library is missing or cannot be loaded; says which.
    """
    import torch

    path = find()
    if path is None:
        raise RuntimeError(unavailable_reason())
    for name in _CUDA_LIBRARIES:
        _load_globally(name, Path(torch.__file__).parents[1] / "nvidia")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise RuntimeError(f"{path}: {error}") from error
    return torch.ops.sgl_kernel


def _load_globally(name: str, root: Path) -> None:
    """By name where the loader knows it (torch loaded it), else from torch's package folders."""
    for candidate in (name, *sorted(map(str, root.glob(f"**/{name}")))):
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
    raise RuntimeError(f"{name}: not found by the loader or under {root}")
