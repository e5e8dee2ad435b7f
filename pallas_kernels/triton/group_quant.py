"""FP8 group quantization: rows to e4m3 with one f32 scale per 128 columns."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.shapes import QUANT_BLOCK, cdiv
from pallas_kernels.triton.launch import Launch

_BLOCK_R = 32
_MAX_E4M3 = tl.constexpr(448.0)
_SMALLEST_NORMAL_BITS = tl.constexpr(0x00800000)  # 2^-126
_FLOOR_BITS = tl.constexpr(0x04E00000)  # 448 * 2^-126


@triton.jit
def quantize_tile(x):
    """f32[R,128] to e4m3[R,128] and f32[R], to the bit as every other backend does it.

    Magnitudes are compared as integers: that orders NaN above infinity, so a NaN reaches its scale.
    """
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    x = tl.where(magnitude < _SMALLEST_NORMAL_BITS, 0.0, x)
    amax = tl.maximum(tl.max(magnitude, axis=1), _FLOOR_BITS).to(tl.float32, bitcast=True)
    scales = tl.div_rn(amax, _MAX_E4M3)
    values = tl.div_rn(x, scales[:, None])
    # Not `tl.clamp`, which would turn NaN into a bound.
    values = tl.where(values > _MAX_E4M3, _MAX_E4M3, values)
    values = tl.where(values < -_MAX_E4M3, -_MAX_E4M3, values)
    return values.to(tl.float8e4nv), scales


@triton.jit(do_not_specialize=["num_rows"])
def group_quant_kernel(
    x, num_rows, values, scales, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One program quantizes BLOCK_R rows of one block of BLOCK_C = 128 columns."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = rows < num_rows
    elements = rows.to(tl.int64)[:, None] * C + columns[None, :]
    tile = tl.load(x + elements, mask=live[:, None], other=0.0).to(tl.float32)
    tile_values, tile_scales = quantize_tile(tile)
    tl.store(values + elements, tile_values, mask=live[:, None])
    tl.store(scales + tl.program_id(1).to(tl.int64) * num_rows + rows, tile_scales, mask=live)


def launch(x: Any) -> Launch:
    """The launch that quantizes bf16, f16 or f32[R,C] to e4m3[R,C] and f32[C/128,R]."""
    rows, columns = x.shape
    blocks = columns // QUANT_BLOCK
    return Launch(
        kernel=group_quant_kernel,
        inputs=(x,),
        scalars=(rows,),
        outputs=(
            jax.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((blocks, rows), jnp.float32),
        ),
        grid=(cdiv(rows, _BLOCK_R), blocks),
        constants={"C": columns, "BLOCK_R": _BLOCK_R, "BLOCK_C": QUANT_BLOCK},
    )
