"""The bridge to PyTorch: DLPack conversion, a torch entry point, the peers, and flashinfer-bench.

Importing this package imports neither torch nor jax; its members do, on first use.
"""

import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from typing import TYPE_CHECKING, Any

from pallas_kernels import interruption

if TYPE_CHECKING:
    from interop.dlpack import to_jax as to_jax
    from interop.dlpack import to_torch as to_torch
    from interop.torch_api import TorchMoE as TorchMoE
    from interop.torch_api import torch_moe as torch_moe
    from interop.torch_api import torch_moe_routed as torch_moe_routed

TORCH = ("2.11", "2.14")
"""The oldest and newest PyTorch that the bridge is tested with: it calls functions not public."""

_HOMES = {
    "to_jax": "interop.dlpack",
    "to_torch": "interop.dlpack",
    "torch_moe": "interop.torch_api",
    "torch_moe_routed": "interop.torch_api",
    "TorchMoE": "interop.torch_api",
}

__all__ = sorted(_HOMES)

interruption.before_imports(__name__)

_RENAMED = {"TorchMoEWeights": "jax_moe.ExpertWeights"}
"""Public names of version 0.1 and what they are called now; they go with 0.3."""


def torch_problem() -> str | None:
    """Why PyTorch cannot be used, in one line, or None."""
    missing = "package torch is not installed"
    if importlib.util.find_spec("torch") is None:
        return missing
    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return missing
    oldest, newest = map(_minor, TORCH)
    if oldest <= _minor(found) <= newest:
        return None
    return f"needs torch {' to '.join(TORCH)}, got {found}"


def _minor(version: str) -> list[int]:
    """[2, 11] of "2.11.0+cu130"."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name, "jax_moe" if name in _RENAMED else None)
    if home is None:
        raise AttributeError(f"module 'interop' has no attribute {name!r}")
    if problem := torch_problem():
        raise ImportError(f"interop.{name}: {problem}")
    if name in _RENAMED:
        warnings.warn(
            f"interop.{name} is now called {_RENAMED[name]}; the old name goes with 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
    module = importlib.import_module(home)
    return getattr(module, _RENAMED.get(name, name).rpartition(".")[2])


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
