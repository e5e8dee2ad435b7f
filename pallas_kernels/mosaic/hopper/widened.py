"""Products of 16-bit rows: e4m3 weights, widened to f16 in registers, times f16 activations.

    shared memory    e4m3 weights[64, 128]    -> registers, four neighbours of a row per 32 bits
    registers        e4m3 -> f16, exact       -> wgmma's first operand
    wgmma            f16[64, 128] from registers x f16[128, tokens] from shared memory -> f32
                     meanwhile the next weight block -> registers

Not one byte of weights more is read than for FP8 rows. `wgmma` takes its first operand, the one on
the 64-row side, from registers: so the weights are there for every width of a tile.

Of every 16 columns `wgmma` wants two neighbours here and two 8 columns on in a thread, but loads of
32 bits bring four neighbours. Instead of moving them between threads, which took longer than the
product, columns are counted in another order. A sum does not mind, as long as the activations lie
in memory in that order, too (`wgmma_order`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float16

from pallas_kernels.mosaic import layouts
from pallas_kernels.mosaic.group_quant import SMALLEST_NORMAL
from pallas_kernels.mosaic.hopper.matmul_config import CONSUMER_ROWS
from pallas_kernels.shapes import F16_EXPONENT, LARGEST_F16
from pallas_kernels.types import Quantized

ROW_LAYOUT = layouts.row_per_warp(CONSUMER_ROWS)
# Lanes go through 16, 8, 4 and 2 columns; here 2 and 8 have changed places.
_ORDERED = plgpu.Layout.TILED(
    plgpu.Tiling(((layouts.ROWS_PER_WARPGROUP, CONSUMER_ROWS), (16,), (8,), (4,), (2,))),
    warp_dims=(-6,),
    lane_dims=(-5, -2, -3, -4),
    vector_dim=-1,
)

_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127


def is_widened(rows: Quantized) -> bool:
    """Whether rows have 16 bits."""
    return rows.values.dtype == jnp.float16


def row_bytes(rows: Quantized) -> int:
    """Bytes of an element of the rows."""
    return rows.values.dtype.itemsize


def wgmma_order(values: Float16[Array, "R C"]) -> Float16[Array, "R C"]:
    """Columns in the order in which `load` counts them, or back: the order is its own inverse.

    Of a column's number, bits 1 and 3 change places: two neighbours stay together.

    Args:
        values: Of columns in multiples of 16.
    """
    bits = values.reshape(*values.shape[:-1], -1, 2, 2, 2, 2)
    return bits.swapaxes(-4, -2).reshape(values.shape)


def load(weights, *, interpreted: bool):
    """The first operand of `product`.

    Args:
        weights: e4m3[64,128] of a consumer, in shared memory.
        interpreted: Whether the interpreter runs this, where no order is changed.

    Returns:
        f16[64,128], columns in the order of `wgmma_order`.
    """
    if interpreted:
        return weights[...].astype(jnp.float16)
    loaded = plgpu.load(weights, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    wide = loaded.astype(jnp.float16)
    return _renamed(wide, plgpu.Layout.WGMMA_UPCAST_2X, plgpu.Layout.WGMMA, _as_pairs)


def product(weights, tokens, meanwhile: Callable[[], Any], *, interpreted: bool):
    """`weights @ tokens.T` of one step.

    Args:
        weights: f16[64,128], from `load`.
        tokens: f16[width,128], in shared memory, columns in the order of `wgmma_order`.
        meanwhile: Called between the start of the product and its end.
        interpreted: Whether the interpreter runs this. Its `wgmma` takes no operand in registers,
            so there it is a plain product of the same values.

    Returns:
        f32[64,width], and what `meanwhile` returned.
    """
    if interpreted:
        dimensions = (((1,), (1,)), ((), ()))
        wide = weights, tokens[...], dimensions
        return lax.dot_general(*wide, preferred_element_type=jnp.float32), meanwhile()

    def multiply(accumulator):
        plgpu.wgmma(accumulator, weights, tokens.T)
        other = meanwhile()
        return accumulator[...], other

    shape = (weights.shape[0], tokens.shape[0])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def load_rows(rows, *, interpreted: bool, optimized: bool = True):
    """Rows, one per warp, their columns in the order of `wgmma_order`.

    Args:
        rows: [4 r,64 c], any dtype, in memory.
        interpreted: Whether the interpreter runs this, where no order is changed.
        optimized: As for `plgpu.load`.

    Returns:
        The same shape and dtype, in `ROW_LAYOUT`.
    """
    if interpreted:
        return plgpu.load(rows, layout=ROW_LAYOUT, optimized=optimized)
    loaded = plgpu.load(rows, layout=_ORDERED, optimized=optimized)
    return _renamed(loaded, _ORDERED, ROW_LAYOUT, _same)


def _renamed(values, was: plgpu.Layout, becomes: plgpu.Layout, registers: Callable[..., Any]):
    """The same registers as an array of another layout: `registers(theirs, new shape)`."""

    @plgpu.inline_mgpu(
        arg_types=(was,),
        return_type=plgpu.ShapeDtypeStruct(values.shape, values.dtype, becomes),
    )
    def rename(_, array):
        layout = becomes.to_mgpu()
        theirs = registers(array.registers, layout.registers_shape(array.shape))
        return mgpu.FragmentedArray(_registers=theirs, _layout=layout, _is_signed=None)

    return rename(values)


def _same(theirs, shape):
    """Taken apart and put together: otherwise MLIR folds both names into the first."""
    halves = [
        [mgpu.utils.vector_slice(register, slice(i, i + 1)) for i in range(2)]
        for register in theirs.flat
    ]
    same = np.empty(len(halves), dtype=object)
    same[:] = [mgpu.utils.vector_concat(half) for half in halves]
    return same.reshape(shape)


def _as_pairs(theirs, shape):
    """Four neighbours of 16 columns as two, and two 8 columns on."""
    pairs = np.empty(shape, dtype=object)
    for (row, column, *other, _), register in np.ndenumerate(theirs):
        for half in range(2):
            pair = mgpu.utils.vector_slice(register, slice(2 * half, 2 * half + 2))
            pairs[(row, 2 * column + half, *other)] = pair
    return pairs


def transposed(values):
    """f32 sums, weights x tokens, in the layout whose transposed store to shared memory is vector.

    bf16 sums need no such cast: `stmatrix` transposes them on its way.
    """
    return plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)


def to_scaled_f16(x):
    """Rows in f16 with a power of two each, in registers.

    The bits of `precision="high"`: f32 denormals count as zero, NaN and infinity stay, each in its
    own place, and no finite number becomes infinite.

    Args:
        x: f32[r,128].

    Returns:
        f16[r,128] and the scales, f32[r].
    """
    x = jnp.where(jnp.abs(x) < SMALLEST_NORMAL, 0.0, x)
    # As integers, whose maximum drops no NaN and takes one instruction per warp.
    amax = jnp.max(lax.bitcast_convert_type(jnp.abs(x), jnp.int32), axis=1)
    scale, inverse = power_of_two_scale(lax.bitcast_convert_type(amax, jnp.float32))
    values = x * lax.broadcast_in_dim(inverse, x.shape, [0])
    clipped = jnp.clip(values, -LARGEST_F16, LARGEST_F16)
    return jnp.where(jnp.abs(x) < jnp.inf, clipped, values).astype(jnp.float16), scale


def power_of_two_scale(amax):
    """The power of two that takes `amax` to 2^14 or above, below 2^15; and its reciprocal.

    Args:
        amax: `f32[r]`, not negative; Infinity and NaN have a finite scale like any other, since
            f16 holds them.

    Returns:
        `f32[r]` twice, both exact; the scale is 2^-126 at least.
    """
    exponent = lax.bitcast_convert_type(amax, jnp.int32) >> _MANTISSA_BITS
    exponent = lax.max(exponent - F16_EXPONENT, 1)
    scale = lax.bitcast_convert_type(exponent << _MANTISSA_BITS, jnp.float32)
    inverse = (2 * _EXPONENT_BIAS - exponent) << _MANTISSA_BITS
    return scale, lax.bitcast_convert_type(inverse, jnp.float32)
