"""Why an optional package or the GPU it needs is missing: one line, never an exception."""

import functools
import os
import shutil
from importlib import util
from pathlib import Path

from interop import torch_problem


@functools.cache
def missing(package: str, distribution: str) -> str | None:
    """None if `package` can be imported, else a line that names what to install."""
    if util.find_spec(package) is not None:
        return None
    return f"package {distribution} is not installed"


def nvcc_unavailable() -> str | None:
    """Why a package cannot compile its kernels with nvcc here, or None."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named or shutil.which("nvcc") or Path("/usr/local/cuda").exists():
        return None
    return "needs nvcc to compile its kernels: CUDA_HOME is not set"


def torch_unavailable() -> str | None:
    """Why PyTorch cannot be used, or None."""
    return torch_problem()


@functools.cache
def hopper_unavailable() -> str | None:
    """Why PyTorch cannot run kernels for Hopper here, or None."""
    reason = torch_unavailable()
    if reason is not None:
        return reason
    import torch

    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"needs compute capability 9.0 (Hopper), got {major}.{minor}"
    return None
