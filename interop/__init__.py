"""The bridge to PyTorch: DLPack conversion, a torch entry point, the peers, and flashinfer-bench.

Importing this package imports neither torch nor jax; its members do, on first use.
"""

import importlib
import importlib.metadata
import importlib.util
from typing import Any

TORCH = "2.11"
"""The PyTorch that the bridge is written for: it calls two functions that are not public."""

_HOMES = {
    "to_jax": "interop.dlpack",
    "to_torch": "interop.dlpack",
    "torch_moe": "interop.torch_api",
    "TorchMoE": "interop.torch_api",
    "TorchMoEWeights": "interop.torch_api",
}

__all__ = sorted(_HOMES)


def torch_problem() -> str | None:
    """Why PyTorch cannot be used, in one line, or None."""
    missing = "package torch is not installed"
    if importlib.util.find_spec("torch") is None:
        return missing
    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return missing
    return None if found.startswith(f"{TORCH}.") else f"needs torch {TORCH}, got {found}"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interop' has no attribute {name!r}")
    if problem := torch_problem():
        raise ImportError(f"interop.{name}: {problem}")
    return getattr(importlib.import_module(_HOMES[name]), name)
