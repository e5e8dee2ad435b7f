"""The pipeline of shared memory stages between the producer and the consumers of a grouped matmul.

A stage holds one 128-column step of a tile: activations, their scales, and the weight blocks. The
first weight block and the activations share a barrier; every further block has its own, so that
consumers start on the first while the second is under way. That second wait has another merit: it
keeps ptxas from starting the second product before the first is promoted, which would spill.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.hopper import gather
from pallas_kernels.mosaic.hopper.matmul_config import (
    NUM_CONSUMERS,
    MatmulShape,
    scales_per_stage,
)
from pallas_kernels.mosaic.hopper.operands import Operands
from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.types import Quantized

_F8_TILES = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
_F16_TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


class Pipeline(NamedTuple):
    """The stages and their barriers; `first_full` covers block 0, `next_full` the other blocks."""

    x: Any
    x_scales: Any
    weights: Any
    first_full: Any
    next_full: Any
    empty: Any

    @property
    def num_stages(self) -> int:
        """Stages."""
        return self.x.shape[0]

    @property
    def block_m(self) -> int:
        """Tokens of a stage."""
        return self.x.shape[1]

    def stage(self, step):
        """Where a step, counted over all tiles of the CTA, lies."""
        return lax.rem(step, jnp.int32(self.num_stages))

    def full(self, stage, block: int):
        """The barrier of a weight block."""
        if block == 0:
            return self.first_full.at[stage]
        return self.next_full.at[stage + (block - 1) * self.num_stages]

    def first_scale(self, row):
        """Whose token scale comes first in the stage that TMA fills for a tile."""
        return row - self._inside(row)

    def scale_offset(self, row):
        """Where a tile's token scales start in a stage that TMA filled, which may be wider."""
        return pl.multiple_of(self._inside(row), self.block_m)

    def _inside(self, row):
        return lax.rem(row, jnp.int32(self.x_scales.shape[1]))

    def produce(self, operands: Operands, tile, tokens, width: int, blocks, first_step, ks) -> None:
        """Producer: copies the 128-column steps `ks` of a tile into the next stages.

        Copies of one weight row in several steps follow each other: they lie side by side in
        memory, and HBM reads 256 bytes in a row faster than 128 here and 128 there.

        Args:
            operands: Arrays in global memory.
            tile: The tile.
            tokens: Which tile of `operands.tokens` its rows are; negative, or None, if of none.
            width: Its tokens.
            blocks: Its weight blocks.
            first_step: The CTA's count of steps before step 0 of this tile.
            ks: Steps of the tile.
        """
        stages = [self.stage(first_step + k) for k in ks]
        for k, stage in zip(ks, stages, strict=True):

            @pl.when(first_step + k >= self.num_stages)
            def _reuse(stage=stage):
                plgpu.barrier_wait(self.empty.at[stage])

        # Gathered rows come last: looking their tokens up takes time that weights can travel in.
        gathered = operands.row_token is not None
        rows_per_copy = QUANT_BLOCK // len(ks)
        if not gathered:
            _copy_tokens(self, operands, tile, tokens, width, ks, stages)
        for i, block in enumerate(blocks):
            for first in range(0, QUANT_BLOCK, rows_per_copy):
                rows = pl.ds(block * QUANT_BLOCK + first, rows_per_copy)
                for k, stage in zip(ks, stages, strict=True):
                    columns = pl.ds(k * QUANT_BLOCK, QUANT_BLOCK)
                    plgpu.copy_gmem_to_smem(
                        operands.weights.at[tile.expert, rows, columns],
                        self.weights.at[stage, i, pl.ds(first, rows_per_copy)],
                        self.full(stage, i),
                    )
        if gathered:
            _gather_tokens(self, operands, tile, width, ks, stages)
            gather.wait_landed(gather.GATHER_DELAY)
            for k in ks:
                self._commit(first_step + k - gather.GATHER_DELAY)

    def commit_last(self, steps) -> None:
        """Producer: commits the gathered tokens of the last steps, once all steps are produced."""
        gather.wait_landed(0)
        for back in range(gather.GATHER_DELAY, 0, -1):
            self._commit(steps - back)

    def _commit(self, step) -> None:
        @pl.when(step >= 0)
        def _landed():
            plgpu.barrier_arrive(self.full(self.stage(step), 0))

    def drain(self, steps) -> None:
        """Producer: observes every completed phase, as it must before the barriers go away."""

        @pl.loop(lax.max(steps - self.num_stages, 0), steps)
        def _drain(step):
            plgpu.barrier_wait(self.empty.at[self.stage(step)])


def pipeline_types(shape: MatmulShape) -> Pipeline:
    """The scratch types of a matmul's pipeline."""
    num_stages, block_m, num_blocks = shape.config.num_stages, shape.block_m, shape.num_blocks
    # A weight block of a stage comes in as many copies as stages are filled together.
    copies = shape.stages_per_fill
    # Tokens and their scales are a TMA copy each; of gathered ones the producer says both are in.
    token_arrivals = 1 if shape.is_gathered else 2
    e4m3 = jnp.float8_e4m3fn
    weights = (num_stages, num_blocks, QUANT_BLOCK, QUANT_BLOCK)
    return Pipeline(
        x=plgpu.SMEM(
            (num_stages, block_m, QUANT_BLOCK),
            jnp.float16 if shape.is_widened else e4m3,
            transforms=_F16_TILES if shape.is_widened else _F8_TILES,
        ),
        x_scales=plgpu.SMEM((num_stages, scales_per_stage(block_m)), jnp.float32),
        weights=plgpu.SMEM(weights, e4m3, transforms=_F8_TILES),
        first_full=plgpu.Barrier(num_arrivals=token_arrivals + copies, num_barriers=num_stages),
        next_full=plgpu.Barrier(
            num_arrivals=copies, num_barriers=num_stages * max(num_blocks - 1, 1)
        ),
        empty=plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=num_stages),
    )


def _copy_tokens(
    pipeline: Pipeline, operands: Operands, tile, tokens, width: int, ks, stages
) -> None:
    for k, stage in zip(ks, stages, strict=True):
        copy = functools.partial(_copy_step, pipeline, k, stage, width)
        permuted = functools.partial(copy, operands.rows, tile.row)
        if tokens is None:
            permuted()
            continue
        # Past the last token TMA fills with zeros.
        in_order = functools.partial(copy, operands.tokens, tokens * pipeline.block_m)
        lax.cond(tokens < 0, permuted, in_order)


def _copy_step(pipeline: Pipeline, k, stage, width: int, rows: Quantized, first) -> None:
    full = pipeline.full(stage, 0)
    values = rows.values.at[pl.ds(first, width), pl.ds(k * QUANT_BLOCK, QUANT_BLOCK)]
    plgpu.copy_gmem_to_smem(values, pipeline.x.at[stage, pl.ds(0, width)], full)
    scales = pl.ds(pipeline.first_scale(first), pipeline.x_scales.shape[1])
    plgpu.copy_gmem_to_smem(rows.scales.at[k, scales], pipeline.x_scales.at[stage], full)


def _gather_tokens(pipeline: Pipeline, operands: Operands, tile, width: int, ks, stages) -> None:
    tiles = _F8_TILES if operands.rows.values.dtype == jnp.float8_e4m3fn else _F16_TILES
    for k, stage in zip(ks, stages, strict=True):
        to = pipeline.x.at[stage], pipeline.x_scales.at[stage]
        gather.copy_rows(
            operands.rows, operands.row_token, tile.row, k, *to, width, transforms=tiles
        )
