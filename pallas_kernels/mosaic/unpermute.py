"""Weighted sum of a token's expert rows: a warpgroup per token or, of few, per part of a token.

    many tokens   H columns per warpgroup      local rows one by one: memory bound all the same
    few tokens    1024 columns per warpgroup   local rows loaded together: the latency of one row

The sum runs over the token's choices in their order, in f32, with one cast at the end, so the
result does not depend on scheduling. Only local pairs are read; a token without one gets zeros,
or is left alone where another kernel has written them (`zero_rows`).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels.mosaic import launch

_FEW_TOKENS = 64  # parts and whole rows: 4.4 and 4.8 us at T=55, 5.3 and 4.8 at T=80
_ROWS_AT_ONCE = 8


def unpermute(
    expert_outputs: Float[Array, "M H"],
    topk_weights: Float[Array, "T k"],
    pair_row: Int32[Array, "T k"],
    *,
    zeroed: BFloat16[Array, "T H"] | None = None,
    output_dtype: str = "bfloat16",
    interpret=None,
) -> Float[Array, "T H"]:
    """`out[t] = sum over local k of topk_weights[t, k] * expert_outputs[pair_row[t, k]]`.

    Args:
        expert_outputs: `bf16[M, H]` or `f32[M, H]`, H a multiple of 128.
        topk_weights: `f32[T, k]`.
        pair_row: `i32[T, k]`, -1 where the pair is not local.
        zeroed: The result as far as it is known, from `zero_rows`; written in place.
        output_dtype: "bfloat16", or "float32" where sums of several ranks are added up.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `bf16[T, H]` or `f32[T, H]`.
    """
    if zeroed is not None:
        return _sum_into(zeroed, expert_outputs, topk_weights, pair_row, interpret)
    num_tokens = pair_row.shape[0]
    hidden_size = expert_outputs.shape[1]
    few = num_tokens <= _FEW_TOKENS
    vector = _vector(expert_outputs)
    kernel = launch.kernel(
        _sum_part if few else _sum_row,
        out_type=jax.ShapeDtypeStruct((num_tokens, hidden_size), output_dtype),
        grid=(hidden_size // (128 * vector) if few else 1, num_tokens),
        grid_names=("part", "token"),  # CUDA allows 2^31 of the last
        kernel_name="moe_unpermute",
        interpret=interpret,
    )
    return kernel(expert_outputs, topk_weights, pair_row)


def _vector(rows) -> int:
    """Neighbouring elements per thread: 16 bytes where the columns allow it."""
    return math.gcd(rows.shape[1] // 128, 16 // rows.dtype.itemsize)


def _sum_into(zeroed, expert_outputs, topk_weights, pair_row, interpret):
    """Sums of the tokens with a local pair, the others are those of `zeroed`."""
    kernel = launch.kernel(
        _sum_row_if_local,
        out_type=(),
        grid=(pair_row.shape[0],),
        grid_names=("token",),
        kernel_name="moe_unpermute_local",
        interpret=interpret,
    )
    return launch.in_place(lambda out: kernel(expert_outputs, topk_weights, pair_row, out), zeroed)


def _sum_row_if_local(expert_gmem, weight_gmem, pair_row_gmem, out_gmem):
    rows, _ = _pairs(lax.axis_index("token"), pair_row_gmem, weight_gmem)

    @pl.when(functools.reduce(lax.max, rows) >= 0)
    def _sum():
        _sum_row(expert_gmem, weight_gmem, pair_row_gmem, out_gmem)


def _sum_row(expert_gmem, weight_gmem, pair_row_gmem, out_gmem):
    token = lax.axis_index("token")
    hidden_size = out_gmem.shape[1]
    layout = plgpu.Layout.WG_STRIDED((hidden_size,), _vector(expert_gmem))
    total = plgpu.layout_cast(jnp.zeros((hidden_size,), jnp.float32), layout)
    rows, weights = _pairs(token, pair_row_gmem, weight_gmem)
    for row, weight in zip(rows, weights, strict=True):

        def add(total, row=row, weight=weight):
            values = plgpu.load(expert_gmem.at[row], layout=layout)
            return total + values.astype(jnp.float32) * weight

        total = lax.cond(row >= 0, add, lambda total: total, total)
    out_gmem[token] = total.astype(out_gmem.dtype)


def _sum_part(expert_gmem, weight_gmem, pair_row_gmem, out_gmem):
    token, part = lax.axis_index("token"), lax.axis_index("part")
    vector = _vector(expert_gmem)
    shape = (128 * vector,)
    columns = pl.ds(part * shape[0], shape[0])
    layout = plgpu.Layout.WG_STRIDED(shape, vector)
    rows, weights = _pairs(token, pair_row_gmem, weight_gmem)
    largest = functools.reduce(lax.max, rows)

    def add_rows(total):
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            pairs = list(zip(rows, weights, strict=True))[start:][:_ROWS_AT_ONCE]
            # Without a branch: where a row is not local, the largest one is read.
            places = [_smaller_unsigned(row, largest) for row, _ in pairs]
            loaded = [plgpu.load(expert_gmem.at[row, columns], layout=layout) for row in places]
            for (row, weight), values in zip(pairs, loaded, strict=True):
                added = total + values.astype(jnp.float32) * weight
                local = lax.broadcast(row, shape) >= 0
                total = jnp.where(local, added, total)
        return total

    total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
    total = lax.cond(largest >= 0, add_rows, lambda total: total, total)
    out_gmem[token, columns] = total.astype(out_gmem.dtype)


def _smaller_unsigned(row, largest):
    """`row`, but `largest` for -1, which as an unsigned number is above all rows."""
    return lax.min(row.astype(jnp.uint32), largest.astype(jnp.uint32)).astype(jnp.int32)


def _pairs(token, pair_row_gmem, weight_gmem):
    """Row and weight of each of the token's choices, read before any is used."""
    top_k = pair_row_gmem.shape[1]
    rows = [pair_row_gmem[token, k] for k in range(top_k)]
    return rows, [weight_gmem[token, k] for k in range(top_k)]
