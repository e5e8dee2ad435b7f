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
    products = (_widened_products if shape.is_widened else _products)(pipeline, shape, width)
    token_axis = 0 if is_token_major(width) else 1
    scale_layout = plgpu.Layout.WGMMA.reduce(1 - token_axis)
    # Gathered scales begin at the start of a stage, those of a TMA copy where it is aligned.
    scale_offset = 0 if shape.is_gathered else pipeline.scale_offset(tile.row)
    my_scales = _my_rows() if is_token_major(width) else pl.ds(scale_offset, width)
    zero = plgpu.layout_cast(jnp.zeros(_sum_shape(width), jnp.float32), plgpu.Layout.WGMMA)
    zeros = (zero,) * len(blocks)

    def weight_scales(k):
        return tuple(weights_scale[tile.expert, block, k] for block in blocks)

    def step(k, carry):
        sums, scales = carry
        stage = pipeline.stage(first_step + k)
        plgpu.barrier_wait(pipeline.full(stage, 0))
        next_scales = weight_scales(lax.min(k + 1, end * shape.segment_steps - 1))
        x_scales = plgpu.load(pipeline.x_scales.at[stage, my_scales], layout=scale_layout)

        def in_shape(weight_scale):
            scales = x_scales * weight_scale
            return lax.broadcast_in_dim(scales, _sum_shape(width), [token_axis])

        sums = tuple(map(operator.add, sums, products(stage, map(in_shape, scales))))
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


def _sum_shape(width: int) -> tuple[int, int]:
    return (CONSUMER_ROWS, QUANT_BLOCK if is_token_major(width) else width)


def _my_rows():
    """Of 128, those of this consumer."""
    return pl.ds(lax.axis_index("warpgroup") * CONSUMER_ROWS, CONSUMER_ROWS)


def _products(pipeline: Pipeline, shape: MatmulShape, width: int):
    """`products(stage, scales)`: the scaled product of each weight block in turn."""
    my_rows = _my_rows()

    def factors(stage, i):
        if is_token_major(width):
            return pipeline.x.at[stage, my_rows], pipeline.weights.at[stage, i].T
        return pipeline.weights.at[stage, i, my_rows], pipeline.x.at[stage, pl.ds(0, width)].T

    def products(stage, scales):
        for i in range(shape.num_blocks):
            if i:
                plgpu.barrier_wait(pipeline.full(stage, i))

            def multiply(accumulator, i=i):
                plgpu.wgmma(accumulator, *factors(stage, i))
                scale = next(scales)  # in the shadow of the product
                return accumulator[...] * scale

            yield pl.run_scoped(multiply, plgpu.ACC(_sum_shape(width), jnp.float32))

    return products


def _widened_products(pipeline: Pipeline, shape: MatmulShape, width: int):
    """The same of 16-bit rows: a block's weights are widened while the one before is multiplied."""
    my_rows = _my_rows()
    ahead = width <= _MOST_TOKENS_AHEAD

    def load(stage, i):
        if i == shape.num_blocks:
            return None
        if i:
            plgpu.barrier_wait(pipeline.full(stage, i))
        weights = pipeline.weights.at[stage, i, my_rows]
        return widened.load(weights, interpreted=shape.is_interpreted)

    def products(stage, scales):
        tokens = pipeline.x.at[stage, pl.ds(0, width)]
        weights = load(stage, 0)
        for i, scale in enumerate(scales):
            following = functools.partial(load, stage, i + 1)
            product, weights = widened.product(
                weights,
                tokens,
                following if ahead else lambda: None,
                interpreted=shape.is_interpreted,
            )
            weights = weights if ahead else following()
            yield product * scale

    return products
