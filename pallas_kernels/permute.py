"""Copies activation rows and their scales into expert-major order, one warpgroup a token.

A token's row is read once and written to each of its local pairs' rows; tokens without a local
expert cost one look at `pair_row`. Padding rows are left unwritten.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float8e4m3fn, Int32

from pallas_kernels import launch, layouts
from pallas_kernels.indexed_memory import load_at, store_at
from pallas_kernels.shapes import round_up


def permute_rows(
    hidden_states: Float8e4m3fn[Array, "T H"],
    hidden_states_scale: Float[Array, "H/128 T"],
    pair_row: Int32[Array, "T k"],
    *,
    num_rows: int,
    interpret=None,
) -> tuple[Float8e4m3fn[Array, "M H"], Float[Array, "H/128 M"]]:
    """Scatters rows to `pair_row`.

    Args:
        hidden_states: `e4m3[T, H]`, H a multiple of 128.
        hidden_states_scale: `f32[H/128, T]`.
        pair_row: `i32[T, k]`, row of each pair, -1 for none; rows are distinct.
        num_rows: M.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `e4m3[M, H]` and `f32[H/128, M]`; rows that no pair names are unwritten.
    """
    num_tokens, hidden_size = hidden_states.shape
    kernel = launch.kernel(
        functools.partial(_kernel, interpret=interpret),
        out_type=(
            jax.ShapeDtypeStruct((num_rows, hidden_size), hidden_states.dtype),
            jax.ShapeDtypeStruct((hidden_states_scale.shape[0], num_rows), jnp.float32),
        ),
        grid=(num_tokens,),
        grid_names=("token",),
        kernel_name="moe_permute_rows",
        interpret=interpret,
    )
    return kernel(hidden_states, hidden_states_scale, pair_row)


def _kernel(x_gmem, scale_gmem, pair_row_gmem, rows_gmem, row_scale_gmem, *, interpret):
    token = lax.axis_index("token")
    num_tokens, hidden_size = x_gmem.shape
    num_rows = rows_gmem.shape[0]
    num_blocks = scale_gmem.shape[0]
    rows = [pair_row_gmem[token, k] for k in range(pair_row_gmem.shape[1])]

    @pl.when(functools.reduce(lax.max, rows) >= 0)
    def _copy():
        vector = plgpu.Layout.WG_STRIDED((hidden_size,), math.gcd(hidden_size // 128, 16))
        values = plgpu.load(x_gmem.at[token], layout=vector)
        size = round_up(num_blocks, 128)
        column = plgpu.Layout.WG_STRIDED((size,), 1)
        block = layouts.iota((size,), 0, column)
        in_range = block < num_blocks
        at = functools.partial(load_at, layout=column, interpret=interpret)
        scales = at(scale_gmem, lax.min(block, jnp.int32(num_blocks - 1)) * num_tokens + token)
        for row in rows:

            @pl.when(row >= 0)
            def _store(row=row):
                rows_gmem[row] = values
                store_at(
                    row_scale_gmem, block * num_rows + row, scales, in_range,
                    layout=column, interpret=interpret,
                )  # fmt: skip
