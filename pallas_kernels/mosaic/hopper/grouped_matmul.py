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
copies of rows that lie anywhere (TMA makes the others), `split_k` the sums of tiles that are cut
along K, `side_job` what the producer's spare warps may do meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float8e4m3fn, Int32

from pallas_kernels.device import num_sms
from pallas_kernels.mosaic import launch, warp
from pallas_kernels.mosaic.hopper import accumulate, gather, split_k, work_counter
from pallas_kernels.mosaic.hopper.matmul_config import (
    CONSUMER_ROWS,
    NUM_CONSUMERS,
    MatmulConfig,
    is_token_major,
)
from pallas_kernels.mosaic.hopper.pipeline import Pipeline, Sources, pipeline_types
from pallas_kernels.mosaic.hopper.side_job import SideJob
from pallas_kernels.mosaic.hopper.tile_queue import TileQueue, queue_types
from pallas_kernels.mosaic.hopper.tile_scheduler import Cut, Walk
from pallas_kernels.shapes import QUANT_BLOCK


class GroupedRows(NamedTuple):
    """Expert-major rows and where they lie; see docs/architecture.md for the plan's fields.

    With `row_token`, row r of the M rows is `values[row_token[r]]` and R, the rows of `values`, is
    anything; without, M is R.
    """

    values: Float8e4m3fn[Array, "R K"]
    scales: Float[Array, "K/128 R"]
    group_sizes: Int32[Array, "E"]
    group_offsets: Int32[Array, "E"]
    tile_expert: Int32[Array, "M/block_m"]
    num_tiles: Int32[Array, "1"]
    row_token: Int32[Array, "M"] | None = None

    @property
    def num_rows(self) -> int:
        """M."""
        return (self.values if self.row_token is None else self.row_token).shape[0]


class Operands(NamedTuple):
    """What the kernel reads; `side_job` holds the inputs of the side job."""

    rows: GroupedRows
    weights: Any
    weights_scale: Any
    side_job: tuple[Any, ...]


class Results(NamedTuple):
    """What the kernel writes; None where there is no side job, or no tile is split along K."""

    outputs: Any
    side_job: Any
    partials: Any


def grouped_matmul(
    rows: GroupedRows,
    weights: Float8e4m3fn[Array, "E N K"],
    weights_scale: Float[Array, "E N/128 K/128"],
    *,
    config: MatmulConfig,
    num_columns: int,
    weight_blocks: Callable[[Any], tuple],
    weight_major_epilogue: Callable[..., None],
    token_major_epilogue: Callable[..., None],
    out_type: Any,
    staging_types: Any,
    name: str,
    side_job: SideJob | None = None,
    interpret=None,
) -> tuple[Any, Array | None]:
    """Runs an epilogue on every tile of `rows @ weights[expert].T`.

    Args:
        rows: The left side.
        weights: `e4m3[E, N, K]`.
        weights_scale: `f32[E, N/128, K/128]`.
        config: Tile and pipeline.
        num_columns: Columns of tiles that cover N.
        weight_blocks: Maps a column to the 128-row blocks of N that its tile multiplies.
        weight_major_epilogue: `epilogue(accumulators, tile, width, outputs, staging)`, called by
            both consumer warpgroups with one `f32[64, width]` accumulator per weight block,
            weights x tokens.
        token_major_epilogue: The same for a full tile of 128 tokens, with accumulators
            `f32[64, 128]`, tokens x weights.
        out_type: Shapes of the results, a pytree.
        staging_types: The epilogue's scratch, a pytree.
        name: Kernel name.
        side_job: What a spare warp does meanwhile; only where `has_spare_warps`.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        Arrays of `out_type`, whose rows that no tile covers are unwritten, and that of `side_job`,
        None without one.

    Raises:
        ValueError: The configuration does not fit the GPU, rows that are gathered or `side_job`.
    """
    if interpret is not None and rows.row_token is not None:
        values, scales = gather.gather_first(rows.values, rows.scales, rows.row_token)
        rows = rows._replace(values=values, scales=scales, row_token=None)
    num_blocks = len(weight_blocks(0))
    num_steps = rows.values.shape[1] // QUANT_BLOCK
    gathered = rows.row_token is not None
    available = num_sms()
    sms = available if config.sms is None else config.sms
    if sms > available:
        raise ValueError(f"sms: expected at most the {available} of this GPU, got {sms}")
    segments = config.segments(num_steps)
    segment_steps = num_steps // segments
    stages_per_fill = config.stages_per_fill if segment_steps % config.stages_per_fill == 0 else 1
    if gathered and config.num_stages < stages_per_fill + gather.GATHER_DELAY:
        raise ValueError(
            f"num_stages: expected at least stages_per_fill + {gather.GATHER_DELAY} where rows are "
            f"gathered, got {config.num_stages} with stages_per_fill={config.stages_per_fill}"
        )
    stages = pipeline_types(
        config.block_m, config.num_stages, num_blocks, stages_per_fill, NUM_CONSUMERS, gathered
    )
    dynamic = has_spare_warps(config, gathered=gathered, interpret=interpret)
    if side_job and not dynamic:
        raise ValueError(f"side_job: expected None where no warp is spare, got one with {config}")
    cut = Cut(segments, sms) if segments > 1 and interpret is None else None
    partial_shape = (sms, segments, NUM_CONSUMERS, num_blocks, CONSUMER_ROWS, config.block_m)
    partials = jax.ShapeDtypeStruct(partial_shape, jnp.float32) if cut else None
    side_type = side_job.out_type if side_job else None

    def body(operands: Operands, *written, pipeline: Pipeline, queue: TileQueue, staging):
        results = Results(*written)
        rows = operands.rows
        counter = work_counter.new_counter() if dynamic else None
        total = rows.num_tiles[0] * num_columns
        parts = None
        if cut:
            parts = split_k.Parts(results.partials, split_k.new_flags(sms), cut, total)
        groups = (rows.group_sizes, rows.group_offsets, rows.tile_expert)
        place = (config.block_m, num_columns, sms, *groups, total)
        walk = Walk(*place, counter, cut, segments)
        role = lax.axis_index("warpgroup")
        producer_registers, consumer_registers = _registers(config.block_m, gathered)

        @pl.when(role == NUM_CONSUMERS)
        def _producer():
            plgpu.set_max_registers(producer_registers, action="decrease")
            sources = Sources(rows.values, rows.scales, operands.weights, rows.row_token)

            def fill_tile(done, tile, width, look_ahead):
                blocks = weight_blocks(tile.column)
                groups = (tile.end - tile.begin) * (segment_steps // stages_per_fill)
                first_step = (done - tile.begin) * segment_steps

                @pl.loop(0, groups)
                def _steps(group):
                    pl.when(group == walk.look_ahead_at(groups))(look_ahead)
                    first = tile.begin * segment_steps + group * stages_per_fill
                    ks = [first + i for i in range(stages_per_fill)]
                    pipeline.produce(sources, tile, width, blocks, first_step, ks)

            def finish(done):
                if gathered:
                    pipeline.commit_last(done * segment_steps)

            fill = _by_width(config, fill_tile)

            def fill_tiles():
                pipeline.drain(walk.fill(queue, fill) * segment_steps)

            if dynamic:
                warps = [fill_tiles, lambda: walk.schedule(queue)]
                if side_job:
                    warps.append(lambda: side_job.run(operands.side_job, results.side_job, sms))
                warp.run(*warps)
            else:
                done = walk.produce(queue, fill, finish)
                pipeline.drain(done * segment_steps)

        @pl.when(role < NUM_CONSUMERS)
        def _consumer():
            plgpu.set_max_registers(consumer_registers, action="increase")

            def tile_body(done, tile, width):
                blocks = weight_blocks(tile.column)
                first_step = (done - tile.begin) * segment_steps
                sum_steps = functools.partial(
                    accumulate.accumulate,
                    pipeline,
                    operands.weights_scale,
                    tile,
                    blocks,
                    first_step,
                    width,
                    gathered,
                )
                finish = token_major_epilogue if is_token_major(width) else weight_major_epilogue
                at_segment_end = parts and functools.partial(parts.hand_over, tile, width)
                begin, end = tile.begin * segment_steps, tile.end * segment_steps
                if cut is None:
                    begin, end = 0, num_steps
                sums = sum_steps(begin, end, segment_steps, at_segment_end)
                if parts is None:
                    finish(sums, tile, width, results.outputs, staging)
                    return
                parts.announce(tile)

                @pl.when(tile.begin == 0)
                def _owner():
                    whole = parts.add_rest(tile, width, sums)
                    finish(whole, tile, width, results.outputs, staging)

            walk.consume(queue, _by_width(config, tile_body))
            plgpu.wait_smem_to_gmem(0)

    kernel = launch.kernel(
        body,
        out_type=tuple(Results(out_type, side_type, partials)),
        # Pallas lays shared memory out in the alphabetical order of these names.
        scratch_types={
            "pipeline": stages,
            "queue": queue_types(1, NUM_CONSUMERS + 1)
            if dynamic
            else queue_types(2, NUM_CONSUMERS),
            "staging": staging_types,
        },
        grid=(sms,),
        grid_names=("sm",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    side_inputs = side_job.inputs if side_job else ()
    results = Results(*kernel(Operands(rows, weights, weights_scale, side_inputs)))
    return results.outputs, results.side_job


def has_spare_warps(config: MatmulConfig, *, gathered: bool, interpret) -> bool:
    """Whether one warp of the producer schedules and one fills, which leaves two without work.

    Args:
        config: Tile and pipeline.
        gathered: Whether the producer gathers the rows, which takes all of its warps.
        interpret: Interpreter parameters, or None for the GPU: the interpreter has neither
            atomics nor semaphores.
    """
    return config.scheduler == "dynamic" and interpret is None and not gathered


def _registers(block_m: int, gathered: bool) -> tuple[int, int]:
    """Of a producer's and a consumer's thread, in all at most 504, the threads' share at the start.

    Copies that are issued together, or by threads, take registers that big tiles need themselves.
    """
    if block_m <= CONSUMER_ROWS:
        return (72, 216) if gathered else (56, 224)
    return (56, 224) if gathered else (24, 240)


def _by_width(config: MatmulConfig, tile_body):
    """`tile_body(index, tile, width, ...)` at the narrowest width that holds the live rows."""

    def body(index, tile, *more):
        narrower = 0
        for width in (*config.tail_widths, config.block_m):

            @pl.when((tile.live > narrower) & (tile.live <= width))
            def _at_width(width=width):
                tile_body(index, tile, width, *more)

            narrower = width

    return body
