"""Group quantization: rows to e4m3, or to f16, with one f32 scale per 128 columns."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.shapes import F16_EXPONENT, LARGEST_F16, QUANT_BLOCK, cdiv
from pallas_kernels.triton.launch import Launch
from pallas_kernels.types import Precision, ScaleFormat

_BLOCK_R = 32
_MAX_E4M3 = tl.constexpr(448.0)
_SMALLEST_NORMAL_BITS = tl.constexpr(0x00800000)  # 2^-126
_FLOOR_BITS = tl.constexpr(0x04E00000)  # 448 * 2^-126
_INFINITY_BITS = tl.constexpr(0x7F800000)
_ONE_POWER = tl.constexpr(0x00800000)  # added to the bits of a float, doubles it
_ROUND_UP = tl.constexpr(0x001FFFFF)  # carries where the mantissa is above that of 448 = 1.75 * 2^8
_TWICE_ONE_BITS = tl.constexpr(0x7F000000)  # less the bits of 2^n: those of 2^-n
_F16_EXPONENT = tl.constexpr(F16_EXPONENT)
_LARGEST_F16 = tl.constexpr(float(LARGEST_F16))


@triton.jit
def quantize_tile(x, POWERS_OF_TWO: tl.constexpr, dtype: tl.constexpr):
    """f32[R,128] to dtype[R,128], e4m3 or f16, and f32[R], to the bit as every other backend.

    Magnitudes are compared as integers: that orders NaN above infinity, so a NaN reaches its scale.
    With POWERS_OF_TWO, products with the reciprocals of scales are exact and at most 448. Those of
    f16 are powers of two always.
    """
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    x = tl.where(magnitude < _SMALLEST_NORMAL_BITS, 0.0, x)
    amax = tl.maximum(tl.max(magnitude, axis=1), _FLOOR_BITS)
    if dtype == tl.float16:
        values, scales = _scaled(x, amax)
    elif POWERS_OF_TWO:
        scales, inverses = _power_of_two_scales(amax)
        values = x * inverses[:, None]
    else:
        scales = tl.div_rn(amax.to(tl.float32, bitcast=True), _MAX_E4M3)
        values = tl.div_rn(x, scales[:, None])
        # Not `tl.clamp`, which would turn NaN into a bound.
        values = tl.where(values > _MAX_E4M3, _MAX_E4M3, values)
        values = tl.where(values < -_MAX_E4M3, -_MAX_E4M3, values)
    return values.to(dtype), scales


@triton.jit
def _power_of_two_scales(amax):
    """Of bits of amax, i32[R]: the least powers of two from amax / 448 on, and their reciprocals.

    448 is 1.75 * 2^8, so a power is eight below that of amax, or seven where the mantissa of amax
    is above 1.75. Infinity and NaN are scales of themselves, their reciprocals are 0 and NaN.
    """
    powers = ((amax + _ROUND_UP) & -_ONE_POWER) - 8 * _ONE_POWER
    powers = tl.where(amax < _INFINITY_BITS, powers, amax)
    inverses = tl.maximum(_TWICE_ONE_BITS - powers, 0)
    inverses = tl.where(amax > _INFINITY_BITS, amax, inverses)
    return powers.to(tl.float32, bitcast=True), inverses.to(tl.float32, bitcast=True)


@triton.jit
def _scaled(x, amax):
    """Of the bits of amax, i32[R]: `x` over powers of two, below 2^15, and these, f32[R]."""
    powers = (amax & -_ONE_POWER) - _F16_EXPONENT * _ONE_POWER
    powers = tl.maximum(powers, _ONE_POWER)
    inverses = (-powers + _TWICE_ONE_BITS).to(tl.float32, bitcast=True)
    scaled = x * inverses[:, None]
    # Rounded up to 2^15, the largest float32 would dequantize to infinity. NaN stays.
    values = tl.where(scaled > _LARGEST_F16, _LARGEST_F16, scaled)
    values = tl.where(scaled < -_LARGEST_F16, -_LARGEST_F16, values)
    values = tl.where(tl.abs(x) == float("inf"), x, values)
    return values, powers.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_rows"])
def group_quant_kernel(
    x,
    num_rows,
    values,
    scales,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    POWERS_OF_TWO: tl.constexpr,
):
    """One program quantizes BLOCK_R rows of one block of BLOCK_C = 128 columns."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = rows < num_rows
    elements = rows.to(tl.int64)[:, None] * C + columns[None, :]
    tile = tl.load(x + elements, mask=live[:, None], other=0.0).to(tl.float32)
    tile_values, tile_scales = quantize_tile(tile, POWERS_OF_TWO, values.dtype.element_ty)
    tl.store(values + elements, tile_values, mask=live[:, None])
    tl.store(scales + tl.program_id(1).to(tl.int64) * num_rows + rows, tile_scales, mask=live)


def launch(x: Any, scale_format: ScaleFormat = "f32", precision: Precision = "fast") -> Launch:
    """The launch that quantizes bf16, f16 or f32[R,C] to e4m3[R,C] and f32[C/128,R].

    Args:
        x: The rows.
        scale_format: Of the scales; "ue8m0" rounds them up to powers of two.
        precision: With "high", values are f16, and scales powers of two in any format.
    """
    rows, columns = x.shape
    blocks = columns // QUANT_BLOCK
    return Launch(
        kernel=group_quant_kernel,
        inputs=(x,),
        scalars=(rows,),
        outputs=(
            jax.ShapeDtypeStruct(
                (rows, columns), jnp.float16 if precision == "high" else jnp.float8_e4m3fn
            ),
            jax.ShapeDtypeStruct((blocks, rows), jnp.float32),
        ),
        grid=(cdiv(rows, _BLOCK_R), blocks),
        constants={
            "C": columns,
            "BLOCK_R": _BLOCK_R,
            "BLOCK_C": QUANT_BLOCK,
            "POWERS_OF_TWO": scale_format == "ue8m0",
        },
    )
