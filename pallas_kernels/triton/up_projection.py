"""Up-projection: gather, GEMM1, clamp, SwiGLU and requantization in one kernel."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.triton.group_quant import quantize_tile
from pallas_kernels.triton.grouped_matmul import BLOCK, MatmulConfig, is_widened, multiply_pair
from pallas_kernels.triton.launch import Launch
from pallas_kernels.types import ScaleFormat


@triton.jit
def _up_tile(
    hidden_states, hidden_states_scale, weights, weights_scale, row_token, tile_expert,
    row_tile, column_tile, num_tokens, num_rows, values, scales,
    K: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, SWAP_AB: tl.constexpr,
    SWIGLU_LIMIT: tl.constexpr, POWERS_OF_TWO: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_M rows of 128 activations, quantized."""
    first_row = tl.cast(row_tile, tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK)
    expert = tl.load(tile_expert + row_tile).to(tl.int64)
    # Padding rows read token 0: finite or not, nothing reads what comes of them.
    tokens = tl.maximum(tl.load(row_token + first_row + rows), 0)
    up = (
        weights
        + (expert * (2 * N) + column_tile * BLOCK) * K
        + (lanes[:, None] * K + lanes[None, :])
    )
    up_scales = weights_scale + (expert * (2 * (N // BLOCK)) + column_tile) * (K // BLOCK)
    gated, linear = multiply_pair(
        hidden_states + tokens.to(tl.int64)[:, None] * K + lanes[None, :],
        hidden_states_scale + tokens,
        num_tokens,
        up + N * K,
        up_scales + (N // BLOCK) * (K // BLOCK),
        up,
        up_scales,
        num_rows,
        K // BLOCK,
        BLOCK_M,
        SWAP_AB,
    )
    if SWIGLU_LIMIT is not None:
        gated = tl.minimum(gated, SWIGLU_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        linear = tl.minimum(linear, SWIGLU_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        linear = tl.maximum(linear, -SWIGLU_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    # exp(-x) = inf makes this -0, never inf * 0.
    activation = gated / (1 + tl.exp(-gated)) * linear
    tile_values, tile_scales = quantize_tile(activation, POWERS_OF_TWO, values.dtype.element_ty)
    out = values + first_row * N + column_tile * BLOCK + (rows[:, None] * N + lanes[None, :])
    tl.store(out, tile_values)
    tl.store(scales + tl.cast(column_tile, tl.int64) * num_rows + first_row + rows, tile_scales)


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
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SWAP_AB: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    SWIGLU_LIMIT: tl.constexpr,
    POWERS_OF_TWO: tl.constexpr,
):
    """Every program takes every n-th live tile, columns fastest: neighbours share the rows."""
    tiles = tl.load(num_tiles) * COLUMN_TILES
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _up_tile(
            hidden_states, hidden_states_scale, weights, weights_scale, row_token, tile_expert,
            tile // COLUMN_TILES, tile % COLUMN_TILES, num_tokens, num_rows, values, scales,
            K, N, BLOCK_M, SWAP_AB, SWIGLU_LIMIT, POWERS_OF_TWO,
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
    swiglu_limit: float | None = None,
    scale_format: ScaleFormat = "f32",
) -> Launch:
    """The launch that makes e4m3[M,I] and f32[I/128,M]; padding rows hold anything.

    Args:
        hidden_states: e4m3[T,H], or f16[T,H] for activations in f16[M,I].
        hidden_states_scale: f32[H/128,T].
        gemm1_weights: e4m3[E_local,2*I,H], up half first.
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        row_token: i32[M], -1 in padding rows.
        tile_expert: i32[M/block_m].
        num_tiles: i32[1], live tiles.
        config: Tiling; its `block_m` is that of the plan.
        num_sms: Of the GPU.
        swiglu_limit: Cuts the gate off above it, and the up half on both sides; NaN stays. None for
            no clamp.
        scale_format: Of the result's scales; "ue8m0" rounds them up to powers of two, which those
            of f16 activations always are.
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
            jax.ShapeDtypeStruct(
                (rows, intermediate),
                jnp.float16 if is_widened(hidden_states) else jnp.float8_e4m3fn,
            ),
            jax.ShapeDtypeStruct((blocks, rows), jnp.float32),
        ),
        grid=config.grid(tile_expert.shape[0], blocks, num_sms),
        constants={
            "K": hidden_size,
            "N": intermediate,
            "BLOCK_M": config.block_m,
            "SWAP_AB": config.swap_ab,
            "COLUMN_TILES": blocks,
            "SWIGLU_LIMIT": swiglu_limit,
            "POWERS_OF_TWO": scale_format == "ue8m0",
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
