"""FP8 block-scaled mixture of experts for JAX.

`apply` is one expert-parallel rank of the layer, router included, on whichever backend the device
supports (`describe` says which):

    >>> import jax, jax.numpy as jnp, jax_moe
    >>> T, E, E_local, H, I = 5, 16, 4, 256, 128      # tokens, experts, local experts, sizes
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> config = jax_moe.MoEConfig(top_k=4, n_group=4, topk_group=2)
    >>> e4m3 = lambda key, *shape: jax.random.normal(key, shape).astype(jnp.float8_e4m3fn)
    >>> out = jax_moe.apply(
    ...     jax.random.normal(keys[0], (T, E)), jnp.zeros(E, jnp.bfloat16),
    ...     jax.random.normal(keys[1], (T, H), jnp.bfloat16), None,
    ...     e4m3(keys[2], E_local, 2 * I, H), jnp.full((E_local, 2 * I // 128, H // 128), 0.05),
    ...     e4m3(keys[3], E_local, H, I), jnp.full((E_local, H // 128, I // 128), 0.05),
    ...     0, 2.5, config=config)
    >>> out.shape, out.dtype
    ((5, 256), dtype(bfloat16))

Over several devices, `expert_parallel` is the layer as a function of global arrays, and
`apply_expert_parallel` (`apply_routed_expert_parallel`) what it calls inside of `jax.shard_map`:
tokens travel to the ranks that hold their experts, and their outputs come home.

    >>> mesh = jax.make_mesh((1,), ("expert",))     # one rank; more devices, more ranks
    >>> layer = jax_moe.expert_parallel(mesh, "expert", config=config)

`describe_exchange` says how tokens travel on a mesh, `partition_specs` how the arguments lie on it.

`apply_routed` is the same after any router of your own: it takes `topk_ids` and `topk_weights`.
`ExpertWeights` holds a rank's weights by name (`from_gate_up` takes the order of Hugging Face).

The stages are public as well: `quantize`, `route`, `plan_groups`, `up_project`, `down_project`,
`unpermute`. `reference` and `reference_routed` are the float32 oracles, `workspace_bytes` bounds
the temporary memory. `assume_device` and `interpret_mode` compile for, or imitate, a GPU that is
not there. `jax_moe.checkpoint`, `jax_moe.nn` and `jax_moe.models` are imported on demand.
"""

import importlib
import warnings
from typing import Any

import pallas_kernels as _pallas_kernels  # noqa: F401 - before JAX, which commands may lack
from jax_moe import jax_window as _jax_window
from jax_moe.api import apply as apply
from jax_moe.api import apply_routed as apply_routed
from jax_moe.api import reference as reference
from jax_moe.api import reference_routed as reference_routed
from jax_moe.backends import describe as describe
from jax_moe.config import DEEPSEEK_V3 as DEEPSEEK_V3
from jax_moe.config import MoEConfig as MoEConfig
from jax_moe.device import assume_device as assume_device
from jax_moe.device import interpret_mode as interpret_mode
from jax_moe.parallel import apply_expert_parallel as apply_expert_parallel
from jax_moe.parallel import apply_routed_expert_parallel as apply_routed_expert_parallel
from jax_moe.parallel import describe_exchange as describe_exchange
from jax_moe.parallel import expert_parallel as expert_parallel
from jax_moe.parallel import partition_specs as partition_specs
from jax_moe.parallel import workspace_bytes as workspace_bytes
from jax_moe.stages import down_project as down_project
from jax_moe.stages import plan_groups as plan_groups
from jax_moe.stages import quantize as quantize
from jax_moe.stages import route as route
from jax_moe.stages import unpermute as unpermute
from jax_moe.stages import up_project as up_project
from jax_moe.types import ExpertWeights as ExpertWeights
from jax_moe.types import GroupPlan as GroupPlan
from jax_moe.types import LayerInputs as LayerInputs
from jax_moe.types import LayerWeights as LayerWeights
from jax_moe.types import Quantized as Quantized
from jax_moe.types import RoutedInputs as RoutedInputs
from jax_moe.types import Routing as Routing

__version__ = "0.2.0"

_jax_window.warn_outside()

_RENAMED = {
    "combine": "unpermute",
    "plan_dispatch": "plan_groups",
    "DispatchPlan": "GroupPlan",
}
"""Public names of version 0.1 and what they are called now; they go with 0.3."""

_ON_DEMAND = ("checkpoint", "models", "nn")
"""Public modules that are imported where they are first named."""


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return importlib.import_module(f"jax_moe.{name}")
    if name not in _RENAMED:
        raise AttributeError(f"module 'jax_moe' has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(
        f"jax_moe.{name} is now called jax_moe.{new}; the old name goes with 0.3",
        DeprecationWarning,
        stacklevel=2,
    )
    return globals()[new]
