"""Level 5: wide reads. docs/kernels/level_5_wide_reads.md explains it.

As level 4, but every trip to memory brings more:

    few tokens     256 bytes of a weight row in one go: two stages are filled together, row by row
    many tokens    two weight blocks per tile, so that tokens are read once for 256 columns

From here on the parts are those of `pallas_kernels.mosaic.hopper`: `Pipeline` has the stages and
their barriers (level 2), `Producer` fills them, `accumulate` multiplies and promotes (level 3) in
either orientation (level 4).

    python examples/ladder/level_5_wide_reads.py
"""

from __future__ import annotations

import functools
import pathlib
import signal
import sys
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports last, Ctrl-C just ends

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # the root of the repository
from examples.ladder import harness, store
from examples.ladder.level_4_swap_ab import FEW_TOKENS, block_m
from examples.ladder.problem import Level
from pallas_kernels import interruption
from pallas_kernels.mosaic.hopper.accumulate import accumulate
from pallas_kernels.mosaic.hopper.consumer import Epilogue
from pallas_kernels.mosaic.hopper.matmul_config import (
    NUM_CONSUMERS,
    MatmulConfig,
    MatmulShape,
    is_token_major,
    matmul_shape,
)
from pallas_kernels.mosaic.hopper.operands import operands
from pallas_kernels.mosaic.hopper.pipeline import pipeline_types
from pallas_kernels.mosaic.hopper.producer import Producer
from pallas_kernels.mosaic.hopper.tile_queue import Tile
from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.types import GroupPlan, Quantized

FEW = MatmulConfig(FEW_TOKENS, num_stages=6, stages_per_fill=2)
MANY = MatmulConfig(128, num_stages=3)


def grouped_matmul(
    rows: Quantized,
    plan: GroupPlan,
    weights: Float8e4m3fn[Array, "E N K"],
    weights_scale: Float32[Array, "E N/128 K/128"],
    interpret: Any = None,
) -> BFloat16[Array, "M N"]:
    """`rows @ weights[expert].T` for the rows of each expert, with block scales."""
    config = FEW if plan.block_m == FEW_TOKENS else MANY
    shape = tiles(config, rows, weights, interpret)
    num_rows, num_columns = rows.values.shape[0], weights.shape[1]
    epilogue = store.bf16_epilogue(num_rows, num_columns, plan.block_m, shape.num_blocks)
    kernel = plgpu.kernel(
        functools.partial(_kernel, shape=shape, epilogue=epilogue),
        out_type=epilogue.out_type,
        scratch_types={"pipeline": pipeline_types(shape), "staging": epilogue.staging_types},
        grid=(num_rows // plan.block_m, shape.num_columns),
        grid_names=("row_tile", "column"),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="ladder_wide_reads",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return kernel(operands(rows, plan, weights, weights_scale, gather_rows=False, side_job=None))


def tiles(config: MatmulConfig, rows: Quantized, weights: Array, interpret: Any) -> MatmulShape:
    """The matmul in tiles of one weight block for few tokens, of two for many."""
    num_blocks = 1 if config.block_m == FEW_TOKENS else 2
    return matmul_shape(
        config,
        num_columns=weights.shape[1] // (num_blocks * QUANT_BLOCK),
        weight_blocks=lambda column: tuple(column * num_blocks + i for i in range(num_blocks)),
        num_steps=rows.values.shape[1] // QUANT_BLOCK,
        gathered=False,
        interpret=interpret,
    )


def _kernel(inputs, out, *, pipeline, staging, shape: MatmulShape, epilogue: Epilogue):
    row_tile, column = lax.axis_index("row_tile"), lax.axis_index("column")
    warpgroup = lax.axis_index("warpgroup")
    is_live = row_tile < inputs.plan.num_tiles[0]
    width = shape.block_m
    zero, one = jnp.int32(0), jnp.int32(1)
    tile = Tile(  # all of K, as one segment; how many rows are live does not matter yet
        inputs.plan.tile_expert[row_tile], row_tile * width, jnp.int32(width), column, zero, one
    )

    @pl.when(is_live & (warpgroup == NUM_CONSUMERS))
    def _producer():
        _give_registers(shape, 24, "decrease")
        producer = Producer(shape, inputs, pipeline)
        producer.produce(zero, tile, look_ahead=lambda step, steps: None)
        producer.drain(one)

    @pl.when(is_live & (warpgroup < NUM_CONSUMERS))
    def _consumer():
        _give_registers(shape, 240, "increase")
        sums = accumulate(
            pipeline,
            inputs.weights_scale,
            shape,
            tile,
            width,
            first_step=zero,
            store_segment=None,
        )
        finish = epilogue.token_major if is_token_major(width) else epilogue.weight_major
        finish(sums, tile, width, out, staging)
        plgpu.wait_smem_to_gmem(0)


def _give_registers(shape: MatmulShape, registers: int, action) -> None:
    """Two blocks of 64x128 sums and a product are 192 registers, more than a thread's share."""
    if shape.num_blocks > 1:
        plgpu.set_max_registers(registers, action=action)


LEVEL = Level(5, "wide reads", grouped_matmul, block_m=block_m)

if __name__ == "__main__":
    interruption.exit_with(lambda: harness.main(LEVEL))
