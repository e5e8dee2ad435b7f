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

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.hopper import widened
from pallas_kernels.mosaic.hopper.matmul_config import CONSUMER_ROWS, MatmulShape, is_token_major
from pallas_kernels.mosaic.hopper.pipeline import Pipeline
from pallas_kernels.mosaic.hopper.tile_queue import Tile
from pallas_kernels.shapes import QUANT_BLOCK


def accumulate(
    pipeline: Pipeline,
    weights_scale,
    shape: MatmulShape,
    tile: Tile,
    width: int,
    *,
    first_step,
    store_segment: Callable[[Any, Sequence[Any]], None] | None,
):
    """Each weight block's promoted sum over the segments of a tile.

    It is the sum, in order, of the sums of the segments.

    Args:
        pipeline: Where the steps arrive.
        weights_scale: `f32[E, N/128, K/128]` in global memory.
        shape: The matmul.
        tile: The tile.
        width: Its width.
        first_step: The CTA's count of steps before step 0 of this tile.
        store_segment: `store_segment(segment, sums)`, called with the sums of each segment.

    Returns:
        A tuple of `f32[64, 128]`, tokens x weights, if the tile is token-major, else of
        `f32[64, width]`, weights x tokens.
    """
    blocks = shape.weight_blocks(tile.column)
    begin, end = 0, shape.num_steps
    if shape.is_split:
        begin, end = tile.begin * shape.segment_steps, tile.end * shape.segment_steps
    one_segment = shape.segments == 1
    my_rows = pl.ds(lax.axis_index("warpgroup") * CONSUMER_ROWS, CONSUMER_ROWS)
    token_major = is_token_major(width)
    sum_shape = (CONSUMER_ROWS, QUANT_BLOCK if token_major else width)
    token_axis = 0 if token_major else 1
    scale_layout = plgpu.Layout.WGMMA.reduce(1 - token_axis)
    # Gathered scales begin at the start of a stage, those of a TMA copy where it is aligned.
    scale_offset = 0 if shape.is_gathered else pipeline.scale_offset(tile.row)
    my_scales = my_rows if token_major else pl.ds(scale_offset, width)
    zero = plgpu.layout_cast(jnp.zeros(sum_shape, jnp.float32), plgpu.Layout.WGMMA)
    zeros = (zero,) * len(blocks)

    def factors(stage, i):
        if token_major:
            return pipeline.x.at[stage, my_rows], pipeline.weights.at[stage, i].T
        return pipeline.weights.at[stage, i, my_rows], pipeline.x.at[stage, pl.ds(0, width)].T

    def promoted_product(stage, i, x_scales, weight_scale):
        def multiply(accumulator):
            plgpu.wgmma(accumulator, *factors(stage, i))
            scale = lax.broadcast_in_dim(x_scales * weight_scale, sum_shape, [token_axis])
            return accumulator[...] * scale

        def widened_product():
            scale = lax.broadcast_in_dim(x_scales * weight_scale, sum_shape, [token_axis])
            return scale * widened.product(
                pipeline.weights.at[stage, i, my_rows],
                pipeline.x.at[stage, pl.ds(0, width)],
                interpreted=shape.is_interpreted,
            )

        if shape.is_widened:
            return widened_product()
        return pl.run_scoped(multiply, plgpu.ACC(sum_shape, jnp.float32))

    def weight_scales(k):
        return tuple(weights_scale[tile.expert, block, k] for block in blocks)

    def close_segment(k, total, sums):
        closes = lax.rem(k + 1, jnp.int32(shape.segment_steps)) == 0
        if store_segment is not None:
            segment = lax.div(k, jnp.int32(shape.segment_steps))
            pl.when(closes)(lambda: store_segment(segment, sums))
        closes = jnp.broadcast_to(closes, sum_shape)
        total = tuple(lax.select(closes, a + b, a) for a, b in zip(total, sums, strict=True))
        return total, tuple(lax.select(closes, z, a) for z, a in zip(zeros, sums, strict=True))

    def step(k, carry):
        total, sums, scales = carry
        stage = pipeline.stage(first_step + k)
        plgpu.barrier_wait(pipeline.full(stage, 0))
        next_scales = weight_scales(lax.min(k + 1, jnp.int32(end - 1)))
        x_scales = plgpu.load(pipeline.x_scales.at[stage, my_scales], layout=scale_layout)
        updated = []
        for i, (sum_, scale) in enumerate(zip(sums, scales, strict=True)):
            if i:
                plgpu.barrier_wait(pipeline.full(stage, i))
            updated.append(sum_ + promoted_product(stage, i, x_scales, scale))
        plgpu.barrier_arrive(pipeline.empty.at[stage])
        if one_segment:
            return total, tuple(updated), next_scales
        return *close_segment(k, total, updated), next_scales

    initial = (() if one_segment else zeros, zeros, weight_scales(jnp.int32(begin)))
    total, sums, _ = lax.fori_loop(begin, end, step, initial)
    return sums if one_segment else total
