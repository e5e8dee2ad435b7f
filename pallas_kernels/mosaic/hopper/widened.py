"""Products of 16-bit rows: e4m3 weights, widened to f16 in registers, times f16 activations.

    shared memory    e4m3 weights[64, 128]    -> registers, two neighbours of a row per 16 bits
    registers        e4m3 -> f16, exact       -> the layout of wgmma's first operand
    wgmma            f16[64, 128] from registers x f16[128, tokens] from shared memory -> f32

Not one byte of weights more is read than for FP8 rows. `wgmma` takes its first operand, the one on
the 64-row side, from registers: so the weights are there for every width of a tile.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.shapes import F16_EXPONENT
from pallas_kernels.types import Quantized

_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127


def is_widened(rows: Quantized) -> bool:
    """Whether rows have 16 bits."""
    return rows.values.dtype == jnp.float16


def row_bytes(rows: Quantized) -> int:
    """Bytes of an element of the rows."""
    return rows.values.dtype.itemsize


def product(weights, tokens, *, interpreted: bool):
    """`weights @ tokens.T` of one step.

    Args:
        weights: e4m3[64,128] of a consumer, in shared memory.
        tokens: f16[width,128], in shared memory.
        interpreted: Whether the interpreter runs this. Its `wgmma` takes no operand in registers,
            so there it is a plain product of the same values.

    Returns:
        f32[64,width].
    """
    loaded = plgpu.load(weights, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    wide = plgpu.layout_cast(loaded.astype(jnp.float16), plgpu.Layout.WGMMA)
    if interpreted:
        dimensions = (((1,), (1,)), ((), ()))
        return lax.dot_general(wide, tokens[...], dimensions, preferred_element_type=jnp.float32)

    def multiply(accumulator):
        plgpu.wgmma(accumulator, wide, tokens.T)
        return accumulator[...]

    shape = (weights.shape[0], tokens.shape[0])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def transposed(values):
    """f32 sums, weights x tokens, in the layout whose transposed store to shared memory is vector.

    bf16 sums need no such cast: `stmatrix` transposes them on its way.
    """
    return plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)


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
