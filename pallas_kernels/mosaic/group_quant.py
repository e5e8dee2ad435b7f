"""FP8 quantization of activations in groups of 1 x 128, one row per warp.

    CTA (one warpgroup)   [16 rows, 128 columns]: 4 rows per warp, 4 columns per lane
                          amax by shuffles -> scale -> clip -> e4m3

"ue8m0" takes scale and reciprocal from the bits of amax: no division, and nothing to clip.

The grid overlaps at the last rows instead of masking: the overlap writes the same bits twice.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.mosaic import launch, layouts
from pallas_kernels.mosaic.rounding import divide
from pallas_kernels.shapes import QUANT_BLOCK, cdiv
from pallas_kernels.types import Quantized, ScaleFormat

E4M3_MAX = 448.0
SMALLEST_NORMAL = 2.0**-126
_INFINITY_BITS = 0x7F800000
_ONE_POWER = 0x00800000  # added to the bits of a float, doubles it
_ROUND_UP = 0x001FFFFF  # carries where the mantissa is above that of 448 = 1.75 * 2^8
_TWICE_ONE_BITS = 0x7F000000  # less the bits of 2^n: those of 2^-n
_ROWS = 16


def quantize(
    x: Float[Array, "R C"], *, scale_format: ScaleFormat = "f32", interpret=None
) -> Quantized:
    """Quantizes each (row, 128 columns) to e4m3 with one f32 scale.

    `scale = max(amax, 448 * 2^-126) / 448`, `values = e4m3(clip(x / scale, -448, 448))`, with
    f32 denormals taken as zero. NaN or Inf reach their own group only. In the format "ue8m0" the
    scale is rounded up to a power of two first.

    Args:
        x: `[R, C]`, f32, bf16 or f16; C a multiple of 128.
        scale_format: Of the scales.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `values e4m3[R, C]` and `scales f32[C/128, R]`, with `x ~= values * scales`.
    """
    num_rows, num_columns = x.shape
    num_groups = num_rows * num_columns // QUANT_BLOCK
    if num_rows < layouts.ROWS_PER_WARPGROUP <= num_groups:  # one group per row: the same memory
        values, scales = quantize(
            x.reshape(num_groups, QUANT_BLOCK), scale_format=scale_format, interpret=interpret
        )
        return Quantized(values.reshape(x.shape), scales.reshape(num_rows, -1).T)
    if num_rows < layouts.ROWS_PER_WARPGROUP:
        padded = jnp.pad(x, ((0, layouts.ROWS_PER_WARPGROUP - num_rows), (0, 0)))
        values, scales = quantize(padded, scale_format=scale_format, interpret=interpret)
        return Quantized(values[:num_rows], scales[:, :num_rows])
    rows = _ROWS if num_rows >= _ROWS else layouts.ROWS_PER_WARPGROUP
    kernel = launch.kernel(
        functools.partial(_kernel, rows=rows, scale_format=scale_format, interpret=interpret),
        out_type=(
            jax.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((num_columns // QUANT_BLOCK, num_rows), jnp.float32),
        ),
        grid=(num_columns // QUANT_BLOCK, cdiv(num_rows, rows)),
        grid_names=("column", "row"),
        kernel_name="moe_group_quant",
        interpret=interpret,
    )
    return Quantized(*kernel(x))


def _kernel(x_gmem, values_gmem, scales_gmem, *, rows, scale_format, interpret):
    column = lax.axis_index("column")
    first = lax.min(lax.axis_index("row") * rows, jnp.int32(x_gmem.shape[0] - rows))
    at = (pl.ds(first, rows), pl.ds(column * QUANT_BLOCK, QUANT_BLOCK))
    layout = layouts.row_per_warp(QUANT_BLOCK)
    x = plgpu.load(x_gmem.at[at], layout=layout, optimized=False).astype(jnp.float32)
    values, scale = to_e4m3(x, layout, scale_format=scale_format, interpret=interpret)
    layouts.store(values_gmem, at, values)
    layouts.store(scales_gmem, (column, pl.ds(first, rows)), scale)


def to_e4m3(x, layout, *, scale_format: ScaleFormat, interpret):
    """Quantizes `f32[r, c]` registers as `quantize` does, one group per row.

    Args:
        x: `f32[r, c]`, held in `layout`.
        layout: Register layout.
        scale_format: Of the scales.
        interpret: The kernel's `interpret` argument.

    Returns:
        `e4m3[r, c]` and `f32[r]`.
    """
    x = jnp.where(jnp.abs(x) < SMALLEST_NORMAL, 0.0, x)
    if scale_format == "ue8m0":
        return _quantize_by_powers_of_two(x)
    return quantize_rows(x, layout, interpret)


def quantize_rows(x, layout, interpret):
    """Quantizes `f32[r, c]` registers, one group per row; returns `e4m3[r, c]` and `f32[r]`."""
    over = functools.partial(divide, interpret=interpret)
    amax = jnp.max(jnp.abs(x), axis=1)
    largest = plgpu.layout_cast(jnp.full(amax.shape, E4M3_MAX, jnp.float32), layout.reduce(1))
    floored = lax.max(amax, jnp.float32(E4M3_MAX * SMALLEST_NORMAL))
    scale = over(floored, largest, layout=layout.reduce(1))
    scaled = over(x, lax.broadcast_in_dim(scale, x.shape, [0]), layout=layout)
    return jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn), scale


def _quantize_by_powers_of_two(x):
    """As `quantize_rows`, with scales that are powers of two: products with 2^-n are exact."""
    scale, inverse = power_of_two_scale(jnp.max(jnp.abs(x), axis=1))
    scaled = x * lax.broadcast_in_dim(inverse, x.shape, [0])
    return scaled.astype(jnp.float8_e4m3fn), scale


def power_of_two_scale(amax):
    """The least power of two from `amax / 448` and 2^-126 on, and its reciprocal, both exact.

    By integer arithmetic: 448 is 1.75 * 2^8, so the power is eight below that of `amax`, or seven
    where the mantissa of `amax` is above 1.75. That is also `amax / 448`, rounded to float32 first:
    no float32 above 448 * 2^n rounds down to 2^n.

    Args:
        amax: `f32[r]`, not negative. Infinity and NaN are scales of themselves, their reciprocals
            are 0 and NaN.

    Returns:
        `f32[r]` twice.
    """
    bits = lax.bitcast_convert_type(
        lax.max(amax, jnp.float32(E4M3_MAX * SMALLEST_NORMAL)), jnp.int32
    )
    power = ((bits + _ROUND_UP) & -_ONE_POWER) - 8 * _ONE_POWER
    power = jnp.where(bits < _INFINITY_BITS, power, bits)
    scale = lax.bitcast_convert_type(power, jnp.float32)
    inverse = lax.bitcast_convert_type(lax.max(_TWICE_ONE_BITS - power, 0), jnp.float32)
    return scale, jnp.where(bits > _INFINITY_BITS, scale, inverse)
