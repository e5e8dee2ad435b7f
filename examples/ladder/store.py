"""The end of a tile in levels 5 to 7: sums to bf16, to shared memory, to global memory.

One function for either orientation, `pallas_kernels.mosaic.hopper.down_projection` has them tuned:

    weight-major   sums f32[64 weights, tokens]: transposed on the way to shared memory
    token-major    sums f32[64 tokens, 128 weights]: in two halves of 64 columns
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.hopper.consumer import Epilogue
from pallas_kernels.mosaic.hopper.matmul_config import CONSUMER_ROWS, NUM_CONSUMERS
from pallas_kernels.shapes import QUANT_BLOCK, cdiv

_TILES = (plgpu.TilingTransform((8, CONSUMER_ROWS)), plgpu.SwizzleTransform(128))


def bf16_epilogue(num_rows: int, num_columns: int, block_m: int, num_blocks: int) -> Epilogue:
    """Stores the sums as they are.

    Args:
        num_rows: M.
        num_columns: N.
        block_m: Tokens of a tile.
        num_blocks: Weight blocks of a tile.
    """
    rows = min(block_m, CONSUMER_ROWS)
    buffers = num_blocks * cdiv(block_m, CONSUMER_ROWS)
    staged = (NUM_CONSUMERS, buffers, rows, CONSUMER_ROWS)
    return Epilogue(
        weight_major=_weight_major,
        token_major=_token_major,
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), jnp.bfloat16),
        staging_types=plgpu.SMEM(staged, jnp.bfloat16, transforms=_TILES),
    )


def _weight_major(sums, tile, width, out, staging):
    pieces = itertools.product(enumerate(sums), range(0, width, staging.shape[2]))
    warpgroup = lax.axis_index("warpgroup")
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
    for buffer, ((block, found), first) in enumerate(pieces):
        tokens = min(width - first, staging.shape[2])
        mine = staging.at[warpgroup, buffer, pl.ds(0, tokens)]
        mine.T[...] = found[:, first : first + tokens].astype(jnp.bfloat16)
        column = (tile.column * len(sums) + block) * QUANT_BLOCK + warpgroup * CONSUMER_ROWS
        _to_global(mine, out, tile.row + first, column)


def _token_major(sums, tile, width, out, staging):
    pieces = itertools.product(enumerate(sums), range(0, QUANT_BLOCK, CONSUMER_ROWS))
    warpgroup = lax.axis_index("warpgroup")
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for buffer, ((block, found), first) in enumerate(pieces):
        mine = staging.at[warpgroup, buffer]
        mine[...] = found[:, first : first + CONSUMER_ROWS].astype(jnp.bfloat16)
        column = (tile.column * len(sums) + block) * QUANT_BLOCK + first
        _to_global(mine, out, tile.row + warpgroup * CONSUMER_ROWS, column)


def _to_global(mine, out, row, column):
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(mine, out.at[pl.ds(row, mine.shape[0]), pl.ds(column, CONSUMER_ROWS)])
