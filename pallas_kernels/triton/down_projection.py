"""Down-projection: GEMM2, one row per (token, expert) pair."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.shapes import QUANT_BLOCK, cdiv
from pallas_kernels.triton.grouped_matmul import BLOCK, MatmulConfig, is_widened, multiply_pair
from pallas_kernels.triton.launch import Launch


@triton.jit
def _down_tile(
    values, scales, weights, weights_scale, tile_expert,
    row_tile, column_tile, num_rows, output,
    K: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, SWAP_AB: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_M rows of two blocks of 128 columns."""
    rows = tl.cast(row_tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK)
    expert = tl.load(tile_expert + row_tile).to(tl.int64)
    block = column_tile * 2
    to_next = 1
    if N // BLOCK % 2:
        # An odd last block is its own neighbour: computed twice, to the same bits.
        to_next = tl.minimum(N // BLOCK - 1 - block, 1)
    left = weights + (expert * N + block * BLOCK) * K + (lanes[:, None] * K + lanes[None, :])
    left_scales = weights_scale + (expert * (N // BLOCK) + block) * (K // BLOCK)
    left_acc, right_acc = multiply_pair(
        values + rows[:, None] * K + lanes[None, :],
        scales + rows,
        num_rows,
        left,
        left_scales,
        left + to_next * (BLOCK * K),
        left_scales + to_next * (K // BLOCK),
        num_rows,
        K // BLOCK,
        BLOCK_M,
        SWAP_AB,
    )
    out = output + rows[:, None] * N + block * BLOCK + lanes[None, :]
    tl.store(out, left_acc.to(output.dtype.element_ty))
    tl.store(out + to_next * BLOCK, right_acc.to(output.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows"])
def down_projection_kernel(
    values,
    scales,
    weights,
    weights_scale,
    tile_expert,
    num_tiles,
    num_rows,
    output,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SWAP_AB: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
):
    """Every program takes every n-th live tile, columns fastest: neighbours share the rows."""
    tiles = tl.load(num_tiles) * COLUMN_TILES
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _down_tile(
            values, scales, weights, weights_scale, tile_expert,
            tile // COLUMN_TILES, tile % COLUMN_TILES, num_rows, output,
            K, N, BLOCK_M, SWAP_AB,
        )  # fmt: skip


def launch(
    values: Any,
    scales: Any,
    gemm2_weights: Any,
    gemm2_weights_scale: Any,
    tile_expert: Any,
    num_tiles: Any,
    *,
    config: MatmulConfig,
    num_sms: int,
) -> Launch:
    """The launch that makes bf16[M,H], of f16 values f32[M,H]; padding rows hold anything.

    Args:
        values: e4m3 or f16[M,I].
        scales: f32[I/128,M].
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        tile_expert: i32[M/block_m].
        num_tiles: i32[1], live tiles.
        config: Tiling; its `block_m` is that of the plan.
        num_sms: Of the GPU.
    """
    rows, intermediate = values.shape
    hidden_size = gemm2_weights.shape[1]
    column_tiles = cdiv(hidden_size, 2 * QUANT_BLOCK)
    dtype = jnp.float32 if is_widened(values) else jnp.bfloat16
    return Launch(
        kernel=down_projection_kernel,
        inputs=(values, scales, gemm2_weights, gemm2_weights_scale, tile_expert, num_tiles),
        scalars=(rows,),
        outputs=(jax.ShapeDtypeStruct((rows, hidden_size), dtype),),
        grid=config.grid(tile_expert.shape[0], column_tiles, num_sms),
        constants={
            "K": intermediate,
            "N": hidden_size,
            "BLOCK_M": config.block_m,
            "SWAP_AB": config.swap_ab,
            "COLUMN_TILES": column_tiles,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
