"""Weighted sum of each token's local rows: f32 in between, one cast, no atomics."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.shapes import cdiv
from pallas_kernels.triton.launch import Launch

_BLOCK_H = 1024  # 16 bytes of bf16 for each of 128 threads


@triton.jit
def unpermute_kernel(
    expert_outputs,
    topk_weights,
    pair_row,
    output,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program sums one token's rows in BLOCK_H columns, in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(pair_row + token * TOP_K + choice)
        weight = tl.load(topk_weights + token * TOP_K + choice)
        # Masked, not multiplied by zero: what is not local may be NaN, and costs no traffic.
        local = (columns < H) & (row >= 0)
        values = tl.load(expert_outputs + row.to(tl.int64) * H + columns, mask=local, other=0.0)
        total += tl.where(local, values.to(tl.float32) * weight, 0.0)
    tl.store(output + token * H + columns, total.to(output.dtype.element_ty), mask=columns < H)


def launch(
    expert_outputs: Any, topk_weights: Any, pair_row: Any, *, output_dtype: str = "bfloat16"
) -> Launch:
    """The launch that adds bf16 or f32[M,H] rows to [T,H].

    Args:
        expert_outputs: bf16 or f32[M,H].
        topk_weights: f32[T,k].
        pair_row: i32[T,k], the row of each pair; -1 where it is not local.
        output_dtype: Of the result: "bfloat16", or "float32" for sums over several ranks.
    """
    num_tokens, top_k = pair_row.shape
    hidden_size = expert_outputs.shape[1]
    block_h = min(_BLOCK_H, triton.next_power_of_2(hidden_size))
    return Launch(
        kernel=unpermute_kernel,
        inputs=(expert_outputs, topk_weights, pair_row),
        scalars=(),
        outputs=(jax.ShapeDtypeStruct((num_tokens, hidden_size), jnp.dtype(output_dtype)),),
        grid=(num_tokens, cdiv(hidden_size, block_h)),
        constants={"H": hidden_size, "TOP_K": top_k, "BLOCK_H": block_h},
    )
