"""Up-projection: gather, GEMM1, SwiGLU and requantization in one kernel."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.triton.group_quant import quantize_tile
from pallas_kernels.triton.launch import Launch
from pallas_kernels.triton.matmul import BLOCK, MatmulConfig, multiply_pair


@triton.jit
def _up_tile(
    hidden_states, hidden_states_scale, weights, weights_scale, row_token, tile_expert,
    row_tile, column_tile, num_tokens, num_rows, values, scales,
    H: tl.constexpr, I: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_M rows of 128 activations, quantized."""
    blocks_k: tl.constexpr = H // BLOCK
    column_tiles: tl.constexpr = I // BLOCK
    rows = tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK)
    expert = tl.load(tile_expert + row_tile).to(tl.int64)
    # Padding rows read token 0: finite or not, nothing reads what comes of them.
    tokens = tl.maximum(tl.load(row_token + row_tile.to(tl.int64) * BLOCK_M + rows), 0)
    up = (
        weights
        + (expert * (2 * I) + column_tile * BLOCK) * H
        + (lanes[None, :] * H + lanes[:, None])
    )
    up_scales = weights_scale + (expert * (2 * column_tiles) + column_tile) * blocks_k
    gated, linear = multiply_pair(
        hidden_states + tokens.to(tl.int64)[:, None] * H + lanes[None, :],
        hidden_states_scale + tokens,
        num_tokens,
        up + I * H,
        up_scales + column_tiles * blocks_k,
        up,
        up_scales,
        blocks_k,
        BLOCK_M,
    )
    # exp(-x) = inf makes this -0, never inf * 0.
    activation = gated / (1 + tl.exp(-gated)) * linear
    tile_values, tile_scales = quantize_tile(activation)
    first = values + row_tile.to(tl.int64) * (BLOCK_M * I) + column_tile * BLOCK
    tl.store(first + (rows[:, None] * I + lanes[None, :]), tile_values)
    tl.store(
        scales + column_tile.to(tl.int64) * num_rows + row_tile * BLOCK_M + rows, tile_scales
    )


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def up_projection_kernel(
    hidden_states,
    hidden_states_scale,
    weights,
    weights_scale,
    row_token,
    tile_expert,
    num_tiles,
    num_tokens,
    num_rows,
    values,
    scales,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Every program takes every n-th live tile, columns fastest: neighbours share the rows."""
    column_tiles: tl.constexpr = I // BLOCK
    tiles = tl.load(num_tiles) * column_tiles
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _up_tile(
            hidden_states, hidden_states_scale, weights, weights_scale, row_token, tile_expert,
            tile // column_tiles, tile % column_tiles, num_tokens, num_rows, values, scales,
            H, I, BLOCK_M,
        )  # fmt: skip


def launch(
    hidden_states: Any,
    hidden_states_scale: Any,
    gemm1_weights: Any,
    gemm1_weights_scale: Any,
    row_token: Any,
    tile_expert: Any,
    num_tiles: Any,
    *,
    config: MatmulConfig,
    num_sms: int,
) -> Launch:
    """The launch that makes e4m3[M,I] and f32[I/128,M]; padding rows hold anything.

    Args:
        hidden_states: e4m3[T,H].
        hidden_states_scale: f32[H/128,T].
        gemm1_weights: e4m3[E_local,2*I,H], up half first.
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        row_token: i32[M], -1 in padding rows.
        tile_expert: i32[M/block_m].
        num_tiles: i32[1], live tiles.
        config: Tiling; its `block_m` is that of the plan.
        num_sms: Of the GPU.
    """
    num_tokens, hidden_size = hidden_states.shape
    (rows,) = row_token.shape
    intermediate = gemm1_weights.shape[1] // 2
    blocks = intermediate // QUANT_BLOCK
    return Launch(
        kernel=up_projection_kernel,
        inputs=(
            hidden_states,
            hidden_states_scale,
            gemm1_weights,
            gemm1_weights_scale,
            row_token,
            tile_expert,
            num_tiles,
        ),
        scalars=(num_tokens, rows),
        outputs=(
            jax.ShapeDtypeStruct((rows, intermediate), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((blocks, rows), jnp.float32),
        ),
        grid=config.grid(tile_expert.shape[0], blocks, num_sms),
        constants={"H": hidden_size, "I": intermediate, "BLOCK_M": config.block_m},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
