"""Up-projection: block-scaled grouped matmul with SwiGLU and 1x128 requantization fused in.

a tile multiplies block j of the up half and block j of the gate half of gemm1_weights
epilogue, 64 tokens at a time:
    consumer w    silu(gate) * up, f32[64, tokens] -> bf16, transposed to shared memory
    both          barrier
    consumer w    half of the tokens, one row a warp: amax over the 128 columns -> scale
                  -> e4m3 -> global memory
    both          barrier
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float8e4m3fn

from pallas_kernels import layouts
from pallas_kernels.block_scaled_matmul import (
    NUM_CONSUMERS,
    WEIGHT_ROWS,
    GroupedRows,
    MatmulConfig,
    grouped_matmul,
)
from pallas_kernels.group_quant import E4M3_MAX, SMALLEST_NORMAL
from pallas_kernels.shapes import QUANT_BLOCK

_EPILOGUE_TOKENS = 64


def up_projection(
    rows: GroupedRows,
    gemm1_weights: Float8e4m3fn[Array, "E 2*I H"],
    gemm1_weights_scale: Float[Array, "E 2*I/128 H/128"],
    *,
    config: MatmulConfig,
    interpret=None,
) -> tuple[Float8e4m3fn[Array, "M I"], Float[Array, "I/128 M"]]:
    """`silu(second half) * first half` of `rows @ gemm1_weights[expert].T`, requantized.

    Args:
        rows: Activations `[M, H]` with their plan.
        gemm1_weights: `e4m3[E, 2 I, H]`; the second half of the rows is the gate.
        gemm1_weights_scale: `f32[E, 2 I/128, H/128]`.
        config: Tile and ring.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `e4m3[M, I]` and `f32[I/128, M]`; padding rows hold anything.

    Raises:
        ValueError: The configuration needs more shared memory than there is.
    """
    num_rows = rows.values.shape[0]
    intermediate_size = gemm1_weights.shape[1] // 2
    num_columns = intermediate_size // QUANT_BLOCK
    tokens = min(config.block_m, _EPILOGUE_TOKENS)
    config.check_smem(2, NUM_CONSUMERS * tokens * WEIGHT_ROWS * 2)
    staging_tiles = (plgpu.TilingTransform((8, WEIGHT_ROWS)), plgpu.SwizzleTransform(128))
    return grouped_matmul(
        rows,
        gemm1_weights,
        gemm1_weights_scale,
        config=config,
        num_columns=num_columns,
        weight_blocks=lambda column: (column, num_columns + column),
        epilogue=_swiglu_quantize,
        out_type=(
            jax.ShapeDtypeStruct((num_rows, intermediate_size), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((num_columns, num_rows), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM(
                (NUM_CONSUMERS, tokens, WEIGHT_ROWS), jnp.bfloat16, transforms=staging_tiles
            ),
            plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
        ],
        name="moe_up_projection",
        interpret=interpret,
    )


def _swiglu_quantize(accumulators, tile, width, outputs, scratch):
    (values, scales), (staging, both) = outputs, scratch
    warpgroup = lax.axis_index("warpgroup")
    layout = layouts.row_per_warp(WEIGHT_ROWS)
    up, gate = accumulators
    activated = (gate * jax.nn.sigmoid(gate) * up).astype(jnp.bfloat16)
    for first in range(0, width, _EPILOGUE_TOKENS):
        tokens = min(width - first, _EPILOGUE_TOKENS)
        staging.at[warpgroup, pl.ds(0, tokens)].T[...] = activated[:, first : first + tokens]
        _meet(both)
        mine = tokens // NUM_CONSUMERS
        halves = [
            plgpu.load(staging.at[i, pl.ds(warpgroup * mine, mine)], layout=layout)
            for i in range(NUM_CONSUMERS)
        ]
        halves = [half.astype(jnp.float32) for half in halves]
        amax = functools.reduce(lax.max, [jnp.max(jnp.abs(half), axis=1) for half in halves])
        scale = lax.max(amax, jnp.float32(E4M3_MAX * SMALLEST_NORMAL)) / E4M3_MAX
        inverse = lax.broadcast_in_dim(1.0 / scale, (mine, WEIGHT_ROWS), [0])
        row = pl.ds(tile.row + first + warpgroup * mine, mine)
        for i, half in enumerate(halves):
            column = tile.column * QUANT_BLOCK + i * WEIGHT_ROWS
            quantized = jnp.clip(half * inverse, -E4M3_MAX, E4M3_MAX)
            values[row, pl.ds(column, WEIGHT_ROWS)] = quantized.astype(jnp.float8_e4m3fn)
        scales[tile.column, row] = scale
        _meet(both)


def _meet(barrier):
    """Both consumer warpgroups wait for each other; shared memory writes become visible."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
