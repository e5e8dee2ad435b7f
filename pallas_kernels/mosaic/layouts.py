"""Register layouts that the memory-bound kernels share."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS_PER_WARPGROUP = 4


def row_per_warp(columns: int) -> plgpu.Layout:
    """Layout of `[4 r, columns c]`: one row per warp, `columns / 32` neighbours per lane.

    Args:
        columns: Width of the base tile, a multiple of 32; wider arrays repeat it.
    """
    vector = columns // 32
    return plgpu.Layout.TILED(
        plgpu.Tiling(((ROWS_PER_WARPGROUP, columns), (vector,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )


def store(ref, index, values) -> None:
    """`ref[index] = values` in global memory, however narrow what a thread has of it.

    JAX 0.12 refuses stores of less than 4 bytes per thread, or of less than whole sectors of 32
    bytes, unless they are asked for; JAX 0.11 knows no such question.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref.at[index], values, optimized=False)
    else:
        ref[index] = values


def iota(shape: tuple[int, ...], dimension: int, layout: plgpu.Layout):
    """`i32` iota along `dimension`, held in `layout`."""
    return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, dimension), layout)


def as_int(mask):
    """`i32`, 1 where true; `mask.astype` would take Pallas ten times as long to lower."""
    return jnp.where(mask, jnp.int32(1), jnp.int32(0))
