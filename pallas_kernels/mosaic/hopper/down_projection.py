"""Down-projection: block-scaled grouped matmul with a plain bf16 result, of f16 rows f32.

epilogue, per weight block:
    weight-major  f32[64, tokens] -> bf16, transposed on the way to shared memory
                  (stmatrix.trans) -> TMA store of [tokens, 64]
    token-major   f32[64 tokens, 128] -> bf16 -> two TMA stores of [64, 64]
    f16 rows      as weight-major, in f32, transposed in registers
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float8e4m3fn, Int32

from pallas_kernels.mosaic.hopper.consumer import Epilogue
from pallas_kernels.mosaic.hopper.grouped_matmul import grouped_matmul
from pallas_kernels.mosaic.hopper.matmul_config import CONSUMER_ROWS, NUM_CONSUMERS, MatmulConfig
from pallas_kernels.mosaic.hopper.widened import is_widened, row_bytes, transposed
from pallas_kernels.shapes import QUANT_BLOCK, cdiv
from pallas_kernels.types import GroupPlan, Quantized


def down_projection(
    rows: Quantized,
    plan: GroupPlan,
    gemm2_weights: Float8e4m3fn[Array, "E H I"],
    gemm2_weights_scale: Float[Array, "E H/128 I/128"],
    *,
    config: MatmulConfig,
    zeros: Int32[Array, " n"] | None = None,
    interpret=None,
) -> Float[Array, "M H"]:
    """`rows @ gemm2_weights[expert].T`, f32 sums, one cast to bf16; none of f16 rows.

    Args:
        rows: Activations `[M, I]` in the order of the plan; e4m3, or f16 with columns in the order
            of `widened.wgmma_order` (in the interpreter as they are).
        plan: Where the rows of each expert lie.
        gemm2_weights: `e4m3[E, H, I]`.
        gemm2_weights_scale: `f32[E, H/128, I/128]`.
        config: Tile and pipeline; its `block_m` is that of the plan.
        zeros: As for `counted_in.run`.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `bf16[M, H]`, of f16 rows `f32[M, H]`; padding rows hold anything.

    Raises:
        ValueError: The configuration does not fit the GPU or the plan.
    """
    hidden_size = gemm2_weights.shape[1]
    blocks = 1 if hidden_size // QUANT_BLOCK % 2 else 2
    staged = (
        NUM_CONSUMERS,
        blocks * cdiv(config.block_m, CONSUMER_ROWS),
        min(config.block_m, CONSUMER_ROWS),
        CONSUMER_ROWS,
    )
    dtype = jnp.dtype(jnp.float32 if is_widened(rows) else jnp.bfloat16)
    config.check_smem(blocks, math.prod(staged) * dtype.itemsize, row_bytes(rows))
    tile_columns = 128 // dtype.itemsize
    out_tiles = (plgpu.TilingTransform((8, tile_columns)), plgpu.SwizzleTransform(128))
    out, _ = grouped_matmul(
        rows,
        plan,
        gemm2_weights,
        gemm2_weights_scale,
        config=config,
        num_columns=hidden_size // (blocks * QUANT_BLOCK),
        weight_blocks=lambda column: tuple(column * blocks + i for i in range(blocks)),
        epilogue=Epilogue(
            weight_major=_weight_major_epilogue,
            token_major=_token_major_epilogue,
            out_type=jax.ShapeDtypeStruct((plan.row_token.shape[0], hidden_size), dtype),
            staging_types=plgpu.SMEM(staged, dtype, transforms=out_tiles),
        ),
        name="moe_down_projection",
        zeros=zeros,
        interpret=interpret,
    )
    return out


def _weight_major_epilogue(accumulators, tile, width, out, staging):
    """Weights x tokens: consumer w holds 64 columns of H of every block for all tokens."""
    warpgroup = lax.axis_index("warpgroup")
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffers = itertools.count()
    for i, accumulator in enumerate(accumulators):
        is_wide = staging.dtype == jnp.float32
        values = transposed(accumulator) if is_wide else accumulator.astype(jnp.bfloat16)
        column = (tile.column * len(accumulators) + i) * QUANT_BLOCK + warpgroup * CONSUMER_ROWS
        for first in range(0, width, staging.shape[2]):
            tokens = min(width - first, staging.shape[2])
            mine = staging.at[warpgroup, next(buffers), pl.ds(0, tokens)]
            mine.T[...] = values[:, first : first + tokens]
            plgpu.commit_smem()
            rows = pl.ds(tile.row + first, tokens)
            plgpu.copy_smem_to_gmem(mine, out.at[rows, pl.ds(column, CONSUMER_ROWS)])


def _token_major_epilogue(accumulators, tile, width, out, staging):
    """Tokens x weights: consumer w holds 64 tokens, 128 columns of H per block."""
    warpgroup = lax.axis_index("warpgroup")
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    rows = pl.ds(tile.row + warpgroup * CONSUMER_ROWS, CONSUMER_ROWS)
    pieces = itertools.product(enumerate(accumulators), range(0, QUANT_BLOCK, CONSUMER_ROWS))
    for buffer, ((i, accumulator), first) in enumerate(pieces):
        mine = staging.at[warpgroup, buffer]
        mine[...] = accumulator[:, first : first + CONSUMER_ROWS].astype(jnp.bfloat16)
        plgpu.commit_smem()
        column = (tile.column * len(accumulators) + i) * QUANT_BLOCK + first
        plgpu.copy_smem_to_gmem(mine, out.at[rows, pl.ds(column, CONSUMER_ROWS)])
