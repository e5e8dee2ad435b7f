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

import functools
import operator
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

_MOST_TOKENS_AHEAD = 32  # wider tiles leave no registers for the weights of two blocks


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

    It is the sum, in order, of the sums of the segments: a loop of its own each, so that the loop
    over steps, which is all that counts, has no more to do than where there is one.

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
    end = tile.end if shape.is_split else jnp.int32(shape.segments)
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

    def promoted_products(stage, x_scales, scales):
        """Of each block in turn."""
        for i, weight_scale in enumerate(scales):
            if i:
                plgpu.barrier_wait(pipeline.full(stage, i))

            def multiply(accumulator, i=i, weight_scale=weight_scale):
                plgpu.wgmma(accumulator, *factors(stage, i))
                scale = lax.broadcast_in_dim(x_scales * weight_scale, sum_shape, [token_axis])
                return accumulator[...] * scale

            yield pl.run_scoped(multiply, plgpu.ACC(sum_shape, jnp.float32))

    def widened_products(stage, x_scales, scales):
        """Of each block in turn, whose weights are widened while the one before is multiplied."""
        tokens = pipeline.x.at[stage, pl.ds(0, width)]

        def load(i):
            if i == len(scales):
                return None
            if i:
                plgpu.barrier_wait(pipeline.full(stage, i))
            weights = pipeline.weights.at[stage, i, my_rows]
            return widened.load(weights, interpreted=shape.is_interpreted)

        ahead = width <= _MOST_TOKENS_AHEAD
        weights = load(0)
        for i, weight_scale in enumerate(scales):
            following = functools.partial(load, i + 1)
            product, weights = widened.product(
                weights,
                tokens,
                following if ahead else lambda: None,
                interpreted=shape.is_interpreted,
            )
            weights = weights if ahead else following()
            yield product * lax.broadcast_in_dim(x_scales * weight_scale, sum_shape, [token_axis])

    def weight_scales(k):
        return tuple(weights_scale[tile.expert, block, k] for block in blocks)

    def step(k, carry):
        sums, scales = carry
        stage = pipeline.stage(first_step + k)
        plgpu.barrier_wait(pipeline.full(stage, 0))
        last = end * shape.segment_steps - 1
        next_scales = weight_scales(lax.min(k + 1, last))
        x_scales = plgpu.load(pipeline.x_scales.at[stage, my_scales], layout=scale_layout)
        products = widened_products if shape.is_widened else promoted_products
        sums = tuple(map(operator.add, sums, products(stage, x_scales, scales)))
        plgpu.barrier_arrive(pipeline.empty.at[stage])
        return sums, next_scales

    def segment_sums(segment, scales):
        first = segment * shape.segment_steps
        return lax.fori_loop(first, first + shape.segment_steps, step, (zeros, scales))

    def next_segment(segment, carry):
        total, scales = carry
        sums, scales = segment_sums(segment, scales)
        if store_segment is not None:
            store_segment(segment, sums)
        return tuple(map(operator.add, total, sums)), scales

    if shape.segments == 1:
        return segment_sums(0, weight_scales(jnp.int32(0)))[0]
    begin = tile.begin if shape.is_split else jnp.int32(0)
    scales = weight_scales(begin * shape.segment_steps)
    return lax.fori_loop(begin, end, next_segment, (zeros, scales))[0]
