"""Weighted sum of a token's expert rows, one warpgroup a token.

The sum runs over the token's choices in their order, in f32, with one cast at the end, so the
result does not depend on scheduling. Only local pairs are read; a token without one gets zeros.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels import launch


def combine(
    expert_outputs: BFloat16[Array, "M H"],
    topk_weights: Float[Array, "T k"],
    pair_row: Int32[Array, "T k"],
    *,
    interpret=None,
) -> BFloat16[Array, "T H"]:
    """`out[t] = sum over local k of topk_weights[t, k] * expert_outputs[pair_row[t, k]]`.

    Args:
        expert_outputs: `bf16[M, H]`, H a multiple of 128.
        topk_weights: `f32[T, k]`.
        pair_row: `i32[T, k]`, -1 where the pair is not local.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `bf16[T, H]`.
    """
    num_tokens = pair_row.shape[0]
    hidden_size = expert_outputs.shape[1]
    kernel = launch.kernel(
        _kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, hidden_size), jnp.bfloat16),
        grid=(num_tokens,),
        grid_names=("token",),
        kernel_name="moe_combine",
        interpret=interpret,
    )
    return kernel(expert_outputs, topk_weights, pair_row)


def _kernel(expert_gmem, weight_gmem, pair_row_gmem, out_gmem):
    token = lax.axis_index("token")
    hidden_size = out_gmem.shape[1]
    layout = plgpu.Layout.WG_STRIDED((hidden_size,), math.gcd(hidden_size // 128, 8))
    total = plgpu.layout_cast(jnp.zeros((hidden_size,), jnp.float32), layout)
    for k in range(pair_row_gmem.shape[1]):
        row, weight = pair_row_gmem[token, k], weight_gmem[token, k]

        def add(total, row=row, weight=weight):
            values = plgpu.load(expert_gmem.at[row], layout=layout)
            return total + values.astype(jnp.float32) * weight

        total = lax.cond(row >= 0, add, lambda total: total, total)
    out_gmem[token] = total.astype(jnp.bfloat16)
