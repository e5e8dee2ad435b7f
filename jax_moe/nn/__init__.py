"""The whole mixture-of-experts layer of a model: gate, router, routed and shared experts.

layer    `moe_layer`, a pure function of a pytree of weights; `fuse_shared`
config   `LayerConfig`: sizes, router and shared experts, from a model's `config.json`
module   `DeepSeekMoE`, the same as a Flax NNX module (the extra `flax`; imported when asked for)
"""

import importlib
from typing import Any

from jax_moe.nn.config import LayerConfig as LayerConfig
from jax_moe.nn.layer import fuse_shared as fuse_shared
from jax_moe.nn.layer import moe_layer as moe_layer


def __getattr__(name: str) -> Any:
    if name not in ("module", "DeepSeekMoE", "FrozenWeight"):
        raise AttributeError(f"module 'jax_moe.nn' has no attribute {name!r}")
    try:
        module = importlib.import_module("jax_moe.nn.module")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "flax":
            raise
        raise ModuleNotFoundError(
            f"jax_moe.nn.{name}: expected the package flax (pip install 'jax-moe[flax]')",
            name="flax",
        ) from error
    return module if name == "module" else getattr(module, name)
