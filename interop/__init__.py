"""The bridge to PyTorch: DLPack conversion, a torch entry point, the peers, and flashinfer-bench.

Importing this package imports neither torch nor jax; its members do, on first use.
"""

import importlib
from typing import Any

_HOMES = {
    "to_jax": "interop.dlpack",
    "to_torch": "interop.dlpack",
    "torch_moe": "interop.torch_api",
    "TorchMoE": "interop.torch_api",
    "TorchMoEWeights": "interop.torch_api",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interop' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
