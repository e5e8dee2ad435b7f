"""The promoted sum of a tile: FP8 products of 128 columns, each scaled and added in f32.

    every 128-column step, for each weight block:
        wait full[stage, block]
        wgmma              64 rows x columns x 128 -> f32 registers
        sum += product * (scale of the token x scale of the weight block)
    arrive empty[stage]

Source of the maths: DeepSeek-V3 technical report, section 3.3.2. The tensor cores' own sums keep
about 14 bits, so no product is longer than one step.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.hopper.matmul_config import (
    CONSUMER_ROWS,
    is_token_major,
)
from pallas_kernels.mosaic.hopper.pipeline import Pipeline
from pallas_kernels.shapes import QUANT_BLOCK


def _sum_shape(width: int) -> tuple[int, int]:
    """Tokens x weight rows if token-major, else weight rows x tokens."""
    return (CONSUMER_ROWS, QUANT_BLOCK if is_token_major(width) else width)


def _zeros(num_blocks: int, width: int):
    zero = jnp.zeros(_sum_shape(width), jnp.float32)
    return (plgpu.layout_cast(zero, plgpu.Layout.WGMMA),) * num_blocks


def accumulate(
    pipeline: Pipeline,
    w_scales,
    tile,
    blocks,
    first_step,
    width: int,
    scales_at_zero: bool,
    begin,
    end,
    segment_steps: int,
    at_segment_end,
):
    """A weight block's promoted sum over the 128-column steps `begin` to `end`.

    It is the sum, in order, of the sums of its segments of `segment_steps`; each of these is also
    handed to `at_segment_end(segment, sums)`.
    """
    my_rows = pl.ds(lax.axis_index("warpgroup") * CONSUMER_ROWS, CONSUMER_ROWS)
    token_major = is_token_major(width)
    shape = _sum_shape(width)
    token_axis = 0 if token_major else 1
    scale_layout = plgpu.Layout.WGMMA.reduce(1 - token_axis)
    scale_offset = 0 if scales_at_zero else pipeline.scale_offset(tile.row)
    my_scales = my_rows if token_major else pl.ds(scale_offset, width)
    one_segment = isinstance(end, int) and segment_steps == end - begin

    def operands(stage, i):
        if token_major:
            return pipeline.x.at[stage, my_rows], pipeline.weights.at[stage, i].T
        return pipeline.weights.at[stage, i, my_rows], pipeline.x.at[stage, pl.ds(0, width)].T

    def promoted_product(stage, i, x_scales, scale):
        def multiply(accumulator):
            plgpu.wgmma(accumulator, *operands(stage, i))
            factor = lax.broadcast_in_dim(x_scales * scale, shape, [token_axis])
            return accumulator[...] * factor

        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    def weight_scales(k):
        return tuple(w_scales[tile.expert, block, k] for block in blocks)

    def step(k, carry):
        total, sums, scales = carry
        stage = pipeline.stage(first_step + k)
        plgpu.barrier_wait(pipeline.full(stage, 0))
        upcoming = weight_scales(lax.min(k + 1, jnp.int32(end - 1)))
        x_scales = plgpu.load(pipeline.x_scales.at[stage, my_scales], layout=scale_layout)
        updated = []
        for i, (sum_, scale) in enumerate(zip(sums, scales, strict=True)):
            if i:
                plgpu.barrier_wait(pipeline.full(stage, i))
            updated.append(sum_ + promoted_product(stage, i, x_scales, scale))
        plgpu.barrier_arrive(pipeline.empty.at[stage])
        if one_segment:
            return total, tuple(updated), upcoming
        return *close_segment(k, total, updated), upcoming

    def close_segment(k, total, sums):
        closes = lax.rem(k + 1, jnp.int32(segment_steps)) == 0
        if at_segment_end is not None:
            segment = lax.div(k, jnp.int32(segment_steps))
            pl.when(closes)(lambda: at_segment_end(segment, sums))
        closes = jnp.broadcast_to(closes, shape)
        total = tuple(lax.select(closes, a + b, a) for a, b in zip(total, sums, strict=True))
        return total, tuple(lax.select(closes, z, a) for z, a in zip(zeros, sums, strict=True))

    zeros = _zeros(len(blocks), width)
    initial = (() if one_segment else zeros, zeros, weight_scales(jnp.int32(begin)))
    total, sums, _ = lax.fori_loop(begin, end, step, initial)
    return sums if one_segment else total
