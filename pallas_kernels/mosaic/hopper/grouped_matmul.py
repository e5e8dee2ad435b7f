"""Block-scaled FP8 grouped matmul for Hopper: the part that both projections share.

A tile is `block_m` tokens of one expert times 128 rows of each of one or two weight blocks.

    producer warpgroup                       consumer warpgroups 0, 1
    ------------------                       ------------------------
    wait empty[s]                            for each weight block:
    copy x[block_m, 128], its scales,   -->      wait full[s, block]
        weights[blocks, 128, 128]                wgmma 64 rows x columns x 128
        -> stage s, full[s, block]               accumulator += product * (x scale * w scale)
    next stage, into the next tile      <--  arrive empty[s]
                                             after the last 128 columns: epilogue of the tile

A full tile of 128 tokens is token-major: its tokens are on the 64-row side of `wgmma`, consumer w
takes tokens 64 w .. 64 w + 63. Narrower tiles, those of few tokens and an expert's last one, are
weight-major ("swap-AB"): the weights are there (consumer w takes rows 64 w .. 64 w + 63 of every
block) and the tokens on the n side, which may be as narrow as 16, so that little padding is
multiplied. Each 128-column step is promoted to f32 registers with its own scales (DeepSeek-V3
technical report, section 3.3.2).

CTAs are persistent; `tile_scheduler` has the order of tiles, `pipeline` the stages, `gather` the
copies of rows that lie anywhere (TMA makes the others), `split_k` the sums of tiles that are split
along K, `widened` what is otherwise for rows of 16 bits, `side_job` what the producer's spare warps
may do meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float8e4m3fn, Int32

from pallas_kernels.mosaic import launch
from pallas_kernels.mosaic.hopper import counted_in, gather, split_k, stream_k
from pallas_kernels.mosaic.hopper.consumer import Consumer, Epilogue
from pallas_kernels.mosaic.hopper.matmul_config import (
    CONSUMER_ROWS,
    NUM_CONSUMERS,
    MatmulConfig,
    MatmulShape,
    matmul_shape,
)
from pallas_kernels.mosaic.hopper.operands import Operands, operands
from pallas_kernels.mosaic.hopper.pipeline import Pipeline, pipeline_types
from pallas_kernels.mosaic.hopper.producer import Producer
from pallas_kernels.mosaic.hopper.side_job import SideJob
from pallas_kernels.mosaic.hopper.tile_queue import TileQueue
from pallas_kernels.mosaic.hopper.tile_scheduler import (
    DynamicScheduler,
    StaticScheduler,
    TileOrder,
    TileScheduler,
)
from pallas_kernels.mosaic.hopper.widened import is_widened
from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.types import GroupPlan, Quantized


class Results(NamedTuple):
    """What the kernel writes; None where there is no side job, or no tile is split along K."""

    outputs: Any
    side_job: Any
    partial_sums: Any


def grouped_matmul(
    rows: Quantized,
    plan: GroupPlan,
    weights: Float8e4m3fn[Array, "E N K"],
    weights_scale: Float[Array, "E N/128 K/128"],
    *,
    config: MatmulConfig,
    num_columns: int,
    weight_blocks: Callable[[Any], tuple],
    epilogue: Epilogue,
    name: str,
    gather_rows: bool = False,
    side_job: SideJob | None = None,
    zeros: Int32[Array, " n"] | None = None,
    tokens: Quantized | None = None,
    num_shared_experts: int = 0,
    interpret=None,
) -> tuple[Any, Array | None]:
    """Runs an epilogue on every tile of `rows @ weights[expert].T`.

    Args:
        rows: The left side, `[M, K]` in the order of the plan, or tokens `[T, K]` to gather; e4m3,
            or f16, which the weights are widened to (`widened`).
        plan: Where the rows of each expert lie.
        weights: `e4m3[E, N, K]`.
        weights_scale: `f32[E, N/128, K/128]`.
        config: Tile and pipeline.
        num_columns: Columns of tiles that cover N.
        weight_blocks: Maps a column to the 128-row blocks of N that its tiles multiply.
        epilogue: What becomes of a tile's sums.
        name: Kernel name.
        gather_rows: Whether row r is `rows[plan.row_token[r]]`.
        side_job: What a spare warp does meanwhile; only where `has_spare_warps`.
        zeros: As for `counted_in.run`.
        tokens: The rows `[T, K]` of each shared expert, in place of those of `rows`. T is at least
            `block_m`, itself at least 32, and a multiple of 8, for TMA. None where there are no
            shared experts, or rows are gathered.
        num_shared_experts: How many of the last experts are shared; 0 without `tokens`.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        The epilogue's outputs, whose rows that no tile covers are unwritten, and the side job's,
        None without one.

    Raises:
        ValueError: The configuration does not fit the GPU, the plan, rows to gather or `side_job`.
    """
    if plan.tile_expert.shape[0] * config.block_m != plan.row_token.shape[0]:
        raise ValueError(
            f"config: expected the plan's block_m={plan.block_m}, got block_m={config.block_m}"
        )
    if interpret is not None and gather_rows:
        rows, gather_rows = gather.gather_first(rows, plan.row_token), False
    shape = matmul_shape(
        config,
        num_columns=num_columns,
        weight_blocks=weight_blocks,
        num_steps=rows.values.shape[1] // QUANT_BLOCK,
        gathered=gather_rows,
        interpret=interpret,
        widened=is_widened(rows),
        num_shared_experts=num_shared_experts,
    )
    if side_job and not shape.is_dynamic:
        raise ValueError(f"side_job: expected None where no warp is spare, got one with {config}")
    results = Results(
        outputs=epilogue.out_type,
        side_job=side_job.out_type if side_job else None,
        partial_sums=split_k.partial_sums_type(shape),
    )
    kernel = launch.kernel(
        functools.partial(_kernel, shape=shape, epilogue=epilogue, side_job=side_job),
        out_type=tuple(results),
        # Pallas lays shared memory out in the alphabetical order of these names.
        scratch_types={
            "pipeline": pipeline_types(shape),
            "queue": (DynamicScheduler if shape.is_dynamic else StaticScheduler).queue_types(shape),
            "staging": epilogue.staging_types,
        },
        grid=(shape.sms,),
        grid_names=("sm",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    given = operands(
        rows,
        plan,
        weights,
        weights_scale,
        gather_rows=gather_rows,
        side_job=side_job,
        tokens=tokens,
    )
    if shape.is_dynamic or shape.is_split:
        results = counted_in.run(
            lambda given, zeros: kernel(given._replace(zeros=zeros)), given, results, zeros
        )
    else:
        results = Results(*kernel(given))
    return results.outputs, results.side_job


def _kernel(
    inputs: Operands,
    outputs,
    side_output,
    partials,
    *,
    pipeline: Pipeline,
    queue: TileQueue,
    staging,
    shape: MatmulShape,
    epilogue: Epilogue,
    side_job: SideJob | None,
) -> None:
    """The kernel's body: the producer's and the consumers' warpgroups part ways here."""
    scheduler = _scheduler(shape, inputs)
    partial_sums = None
    if isinstance(scheduler, stream_k.StreamK):
        partial_sums = split_k.PartialSums(partials, inputs.zeros, scheduler.partition)
    role = lax.axis_index("warpgroup")
    producer_registers, consumer_registers = _registers(shape)

    @pl.when(role == NUM_CONSUMERS)
    def _producer():
        plgpu.set_max_registers(producer_registers, action="decrease")
        run_side_job = side_job and functools.partial(
            side_job.run, inputs.side_job, side_output, shape.sms
        )
        scheduler.produce_tiles(queue, Producer(shape, inputs, pipeline), run_side_job)

    @pl.when(role < NUM_CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(consumer_registers, action="increase")
        consumer = Consumer(shape, inputs, pipeline, partial_sums, epilogue, outputs, staging)
        scheduler.consume_tiles(queue, consumer.compute)
        plgpu.wait_smem_to_gmem(0)


def _scheduler(shape: MatmulShape, inputs: Operands) -> TileScheduler:
    """The scheduler of the kernel that is being traced; the plan's fields are references."""
    plan = inputs.plan
    total = plan.num_tiles[0] * shape.num_columns
    order = TileOrder(shape.block_m, shape.num_columns, shape.segments, plan, total)
    if shape.is_dynamic:
        return DynamicScheduler(order, shape.sms, inputs.zeros)
    if shape.is_split:
        busy_share = stream_k.WIDENED_BUSY_SHARE if shape.is_widened else stream_k.BUSY_SHARE
        partition = stream_k.Partition(shape.segments, shape.sms, total, busy_share)
        return stream_k.StreamK(order, shape.sms, partition)
    return StaticScheduler(order, shape.sms)


def _registers(shape: MatmulShape) -> tuple[int, int]:
    """Of a producer's and a consumer's thread, in all at most 504, the threads' share at the start.

    Copies that are issued together, or by threads, take registers that big tiles need themselves.
    """
    if shape.block_m <= CONSUMER_ROWS:
        return (72, 216) if shape.is_gathered else (56, 224)
    return (56, 224) if shape.is_gathered else (24, 240)
