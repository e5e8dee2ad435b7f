"""A user's file, as a type checker sees it where the wheel is installed.

`.ci/other_environments` runs `mypy --strict` on it: an ignored error that mypy does not find is an
error, so all of these types have to arrive.
"""

from typing import assert_type

import jax
import jax.numpy as jnp

import interop
import jax_moe
from jax_moe import models
from pallas_kernels.shapes import QUANT_BLOCK

assert_type(jax_moe.__version__, str)
assert_type(jax_moe.MoEConfig(top_k=4).top_k, int)
assert_type(QUANT_BLOCK, int)
assert_type(models.get("kimi-k2").config, jax_moe.MoEConfig)
assert_type(jax_moe.describe(), str)
assert_type(interop.torch_problem(), str | None)
rows: jax_moe.Quantized = jax_moe.quantize(jnp.zeros((4, 256)))
jax_moe.MoEConfig(top_k="four")  # type: ignore[arg-type]
jax_moe.quantize()  # type: ignore[call-arg]
wrong: int = jax_moe.describe()  # type: ignore[assignment]
mesh: jax.sharding.Mesh = jax.make_mesh((1,), ("expert",))
jax_moe.expert_parallel(mesh, 1)  # type: ignore[arg-type]
