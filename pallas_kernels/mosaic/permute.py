"""Copies activation rows and their scales into expert-major order: two kinds of CTA, one launch.

    scales, 2 per SM     a tile of the plan's rows times up to 14 blocks, and on to the next
    rows, 1 per token    the token's row, read once, to each of its local pairs' rows

Scales are block-major: those of a tile's rows are stored side by side, those of a token each in a
line of its own. Tokens without a local expert cost one look at `pair_row`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device
from pallas_kernels.mosaic import launch
from pallas_kernels.mosaic.indexed_memory import load_at
from pallas_kernels.types import GroupPlan, Quantized

_WARPGROUP = 128  # threads
_SCALE_CTAS = 2  # per SM
_SCALE_BLOCKS = 14  # on their way together: all are loaded before the first is stored


def permute_rows(
    tokens: Quantized, plan: GroupPlan, *, num_shared_experts: int = 0, interpret=None
) -> Quantized:
    """Rows and scales in the order of a group plan.

    Args:
        tokens: `e4m3[T, H]`, H a multiple of 128, and `f32[H/128, T]`.
        plan: Where they go; its `block_m` is a multiple of 128.
        num_shared_experts: How many of a token's last choices are the last experts, which all live
            tokens take. Their rows, the tokens in order, are left out.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `e4m3[M, H]` and `f32[H/128, M]`. Padding rows are unwritten and have the scales of any
        token; past the live tiles nothing is written.

    Raises:
        ValueError: The plan's `block_m` is no multiple of 128, M none of `block_m`, or the scales
            are more than int32 offsets reach.
    """
    num_tokens, hidden_size = tokens.values.shape
    num_rows, block_m = plan.row_token.shape[0], plan.block_m
    if block_m < 1 or block_m % _WARPGROUP:
        raise ValueError(f"plan: expected block_m a multiple of {_WARPGROUP}, got {block_m}")
    if num_rows % block_m:
        raise ValueError(f"plan: expected whole tiles of {block_m} rows, got {num_rows} rows")
    scale_ctas = _SCALE_CTAS * (device.num_sms() if interpret is None else 1)
    kernel = launch.kernel(
        functools.partial(
            _kernel,
            scale_ctas=scale_ctas,
            block_m=block_m,
            num_shared_experts=num_shared_experts,
            interpret=interpret,
        ),
        out_type=(
            jax.ShapeDtypeStruct((num_rows, hidden_size), tokens.values.dtype),
            jax.ShapeDtypeStruct((tokens.scales.shape[0], num_rows), jnp.float32),
        ),
        grid=(scale_ctas + num_tokens,),
        grid_names=("cta",),
        kernel_name="moe_permute_rows",
        interpret=interpret,
    )
    ends = plan.group_offsets if num_shared_experts else plan.num_tiles
    return Quantized(*kernel(*tokens, plan.pair_row, plan.row_token, ends))


def _kernel(
    x_gmem, scale_gmem, pair_row_gmem, row_token_gmem, ends_gmem, rows_gmem, row_scale_gmem,
    *, scale_ctas, block_m, num_shared_experts, interpret,
):  # fmt: skip
    cta = lax.axis_index("cta")

    @pl.when(cta < scale_ctas)
    def _scales():
        num_tiles = ends_gmem[0]
        if num_shared_experts:
            first_shared = ends_gmem.shape[0] - num_shared_experts
            num_tiles = lax.div(ends_gmem[first_shared], jnp.int32(block_m))
        _copy_scales(
            scale_gmem, row_token_gmem, num_tiles, row_scale_gmem,
            first=cta, step=scale_ctas, block_m=block_m, interpret=interpret,
        )  # fmt: skip

    @pl.when(cta >= scale_ctas)
    def _row():
        num_pairs = pair_row_gmem.shape[1] - num_shared_experts
        _copy_row(cta - scale_ctas, x_gmem, pair_row_gmem, rows_gmem, num_pairs)


def _copy_scales(
    scale_gmem, row_token_gmem, num_tiles, row_scale_gmem, *, first, step, block_m, interpret
):
    """Every `step`-th piece from the `first` on; a piece is a tile's rows times a few blocks."""
    num_blocks, num_tokens = scale_gmem.shape
    # A divisor: pieces that overlapped would be a race.
    at_once = max(n for n in range(1, _SCALE_BLOCKS + 1) if num_blocks % n == 0)
    per_tile = num_blocks // at_once
    column = plgpu.Layout.WG_STRIDED((block_m,), 1)
    load = functools.partial(load_at, scale_gmem, layout=column, interpret=interpret)

    @pl.loop(first, num_tiles * per_tile, step=step)
    def _piece(piece):
        rows = pl.ds(lax.div(piece, jnp.int32(per_tile)) * block_m, block_m)
        block = lax.rem(piece, jnp.int32(per_tile)) * at_once
        token = plgpu.load(row_token_gmem.at[rows], layout=column)
        source = block * num_tokens + lax.max(token, 0)  # padding takes what token 0 has
        scales = [load(source, shift=i * num_tokens) for i in range(at_once)]
        for i, values in enumerate(scales):
            row_scale_gmem[block + i, rows] = values


def _copy_row(token, x_gmem, pair_row_gmem, rows_gmem, num_pairs):
    rows = [pair_row_gmem[token, k] for k in range(num_pairs)]

    @pl.when(functools.reduce(lax.max, rows) >= 0)
    def _copy():
        slices = [
            (columns, plgpu.load(x_gmem.at[token, columns], layout=layout))
            for columns, layout in _column_slices(x_gmem.shape[1])
        ]
        for row in rows:

            @pl.when(row >= 0)
            def _store(row=row):
                for columns, values in slices:
                    rows_gmem[row, columns] = values


def _column_slices(hidden_size: int):
    """Slices that make up a row, each with its layout: vectors of 16 bytes as far as they go."""
    start = 0
    for vector in (16, 8, 4, 2, 1):
        size = (hidden_size - start) // (_WARPGROUP * vector) * (_WARPGROUP * vector)
        if size:
            yield pl.ds(start, size), plgpu.Layout.WG_STRIDED((size,), vector)
        start += size
