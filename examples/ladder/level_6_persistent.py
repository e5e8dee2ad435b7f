"""Level 6: persistent CTAs, tiles on demand. docs/kernels/level_6_persistent.md explains it.

One CTA per multiprocessor stays for the whole matmul and computes tile after tile. The producer
fills the pipeline for the next tile while the consumers finish the one before.

    producer warpgroup                       consumer warpgroups 0, 1
    ------------------                       ------------------------
    the scheduler names a tile          -->  take the tile
    fill the pipeline for it                 accumulate it (level 3, level 4)
    ... the next tile                        store it, meanwhile the pipeline fills up

    few tokens     static scheduler: CTA c computes tiles c, c + sms, c + 2 sms, ...
    many tokens    dynamic scheduler: the next tile that no CTA has, by a counter in global memory;
                   an expert's last tile is only as wide as its rows need

The interpreter has no atomic counter, so there the scheduler is static.

    python examples/ladder/level_6_persistent.py
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import signal
import sys
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports last, Ctrl-C just ends

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # the root of the repository
from examples.ladder import harness, store
from examples.ladder.level_4_swap_ab import FEW_TOKENS, block_m
from examples.ladder.level_5_wide_reads import tiles
from examples.ladder.problem import Level
from pallas_kernels import interruption
from pallas_kernels.mosaic import launch
from pallas_kernels.mosaic.hopper import counted_in
from pallas_kernels.mosaic.hopper.consumer import Consumer, Epilogue
from pallas_kernels.mosaic.hopper.matmul_config import NUM_CONSUMERS, MatmulConfig, MatmulShape
from pallas_kernels.mosaic.hopper.operands import operands
from pallas_kernels.mosaic.hopper.pipeline import pipeline_types
from pallas_kernels.mosaic.hopper.producer import Producer
from pallas_kernels.mosaic.hopper.tile_scheduler import (
    DynamicScheduler,
    StaticScheduler,
    TileOrder,
    TileScheduler,
)
from pallas_kernels.types import GroupPlan, Quantized

FEW = MatmulConfig(FEW_TOKENS, num_stages=10, stages_per_fill=2)
MANY = MatmulConfig(128, num_stages=3, tail_widths=(32, 64, 96), scheduler="dynamic")
INTERPRETED_SMS = 2


def grouped_matmul(
    rows: Quantized,
    plan: GroupPlan,
    weights: Float8e4m3fn[Array, "E N K"],
    weights_scale: Float32[Array, "E N/128 K/128"],
    interpret: Any = None,
) -> BFloat16[Array, "M N"]:
    """`rows @ weights[expert].T` for the rows of each expert, with block scales."""
    config = on_this_device(FEW if plan.block_m == FEW_TOKENS else MANY, interpret)
    shape = tiles(config, rows, weights, interpret)
    num_rows, num_columns = rows.values.shape[0], weights.shape[1]
    epilogue = store.bf16_epilogue(num_rows, num_columns, plan.block_m, shape.num_blocks)
    scheduler = DynamicScheduler if shape.is_dynamic else StaticScheduler
    kernel = launch.kernel(
        functools.partial(_kernel, shape=shape, epilogue=epilogue),
        out_type=epilogue.out_type,
        scratch_types={
            "pipeline": pipeline_types(shape),
            "queue": scheduler.queue_types(shape),  # tiles, from the producer to the consumers
            "staging": epilogue.staging_types,
        },
        grid=(shape.sms,),
        grid_names=("sm",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="ladder_persistent",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    given = operands(rows, plan, weights, weights_scale, gather_rows=False, side_job=None)
    if not shape.is_dynamic:
        return kernel(given)
    # The counter of tiles that are taken: zeros, cleared by a launch.
    counting = lambda given, zeros: kernel(given._replace(zeros=zeros))  # noqa: E731
    return counted_in.run(counting, given, epilogue.out_type)


def on_this_device(config: MatmulConfig, interpret: Any) -> MatmulConfig:
    """One CTA per multiprocessor; the interpreter has two."""
    return config if interpret is None else dataclasses.replace(config, sms=INTERPRETED_SMS)


def _kernel(inputs, out, *, pipeline, queue, staging, shape: MatmulShape, epilogue: Epilogue):
    total = inputs.plan.num_tiles[0] * shape.num_columns
    order = TileOrder(shape.block_m, shape.num_columns, shape.segments, inputs.plan, total)
    scheduler: TileScheduler = StaticScheduler(order, shape.sms)
    if shape.is_dynamic:
        scheduler = DynamicScheduler(order, shape.sms, inputs.zeros)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == NUM_CONSUMERS)
    def _producer():
        plgpu.set_max_registers(24 if shape.num_blocks > 1 else 56, action="decrease")
        scheduler.produce_tiles(queue, Producer(shape, inputs, pipeline))

    @pl.when(warpgroup < NUM_CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(240 if shape.num_blocks > 1 else 224, action="increase")
        consumer = Consumer(shape, inputs, pipeline, None, epilogue, out, staging)
        scheduler.consume_tiles(queue, consumer.compute)
        plgpu.wait_smem_to_gmem(0)


LEVEL = Level(6, "persistent", grouped_matmul, block_m=block_m)

if __name__ == "__main__":
    interruption.exit_with(lambda: harness.main(LEVEL))
