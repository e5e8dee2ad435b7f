"""Down-projection: block-scaled grouped matmul with a plain bf16 result.

epilogue, per weight block:  f32[64, tokens] -> bf16, transposed on the way to shared memory
                             (stmatrix.trans) -> TMA store of [tokens, 64]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn

from pallas_kernels.block_scaled_matmul import (
    NUM_CONSUMERS,
    WEIGHT_ROWS,
    GroupedRows,
    MatmulConfig,
    grouped_matmul,
)
from pallas_kernels.shapes import QUANT_BLOCK


def down_projection(
    rows: GroupedRows,
    gemm2_weights: Float8e4m3fn[Array, "E H I"],
    gemm2_weights_scale: Float[Array, "E H/128 I/128"],
    *,
    config: MatmulConfig,
    interpret=None,
) -> BFloat16[Array, "M H"]:
    """`rows @ gemm2_weights[expert].T`, f32 sums, one cast to bf16.

    Args:
        rows: Activations `[M, I]` with their plan.
        gemm2_weights: `e4m3[E, H, I]`.
        gemm2_weights_scale: `f32[E, H/128, I/128]`.
        config: Tile and ring.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `bf16[M, H]`; padding rows hold anything.

    Raises:
        ValueError: The configuration needs more shared memory than there is.
    """
    hidden_size = gemm2_weights.shape[1]
    blocks = 1 if hidden_size // QUANT_BLOCK % 2 else 2
    config.check_smem(blocks, NUM_CONSUMERS * config.block_m * WEIGHT_ROWS * 2)
    out_tiles = (plgpu.TilingTransform((8, WEIGHT_ROWS)), plgpu.SwizzleTransform(128))
    return grouped_matmul(
        rows,
        gemm2_weights,
        gemm2_weights_scale,
        config=config,
        num_columns=hidden_size // (blocks * QUANT_BLOCK),
        weight_blocks=lambda column: tuple(column * blocks + i for i in range(blocks)),
        epilogue=_store_bf16,
        out_type=jax.ShapeDtypeStruct((rows.values.shape[0], hidden_size), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM(
                (NUM_CONSUMERS, config.block_m, WEIGHT_ROWS), jnp.bfloat16, transforms=out_tiles
            )
        ],
        name="moe_down_projection",
        interpret=interpret,
    )


def _store_bf16(accumulators, tile, width, outputs, scratch):
    (out,), (staging,) = outputs, scratch
    warpgroup = lax.axis_index("warpgroup")
    mine = staging.at[warpgroup, pl.ds(0, width)]
    for i, accumulator in enumerate(accumulators):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        mine.T[...] = accumulator.astype(jnp.bfloat16)
        plgpu.commit_smem()
        column = (tile.column * len(accumulators) + i) * QUANT_BLOCK + warpgroup * WEIGHT_ROWS
        plgpu.copy_smem_to_gmem(mine, out.at[pl.ds(tile.row, width), pl.ds(column, WEIGHT_ROWS)])
