"""FP8 quantization of activations in groups of 1 x 128, one row per warp.

    CTA (one warpgroup)   [16 rows, 128 columns]: 4 rows per warp, 4 columns per lane
                          amax by shuffles -> scale -> clip -> e4m3

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
from pallas_kernels.types import Quantized

E4M3_MAX = 448.0
SMALLEST_NORMAL = 2.0**-126
_ROWS = 16


def quantize(x: Float[Array, "R C"], *, interpret=None) -> Quantized:
    """Quantizes each (row, 128 columns) to e4m3 with one f32 scale.

    `scale = max(amax, 448 * 2^-126) / 448`, `values = e4m3(clip(x / scale, -448, 448))`, with
    f32 denormals taken as zero. NaN or Inf reach their own group only.

    Args:
        x: `[R, C]`, f32, bf16 or f16; C a multiple of 128.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `values e4m3[R, C]` and `scales f32[C/128, R]`, with `x ~= values * scales`.
    """
    num_rows, num_columns = x.shape
    if num_rows < layouts.ROWS_PER_WARPGROUP:
        padded = jnp.pad(x, ((0, layouts.ROWS_PER_WARPGROUP - num_rows), (0, 0)))
        values, scales = quantize(padded, interpret=interpret)
        return Quantized(values[:num_rows], scales[:, :num_rows])
    rows = _ROWS if num_rows >= _ROWS else layouts.ROWS_PER_WARPGROUP
    kernel = launch.kernel(
        functools.partial(_kernel, rows=rows, interpret=interpret),
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


def _kernel(x_gmem, values_gmem, scales_gmem, *, rows, interpret):
    column = lax.axis_index("column")
    first = lax.min(lax.axis_index("row") * rows, jnp.int32(x_gmem.shape[0] - rows))
    at = (pl.ds(first, rows), pl.ds(column * QUANT_BLOCK, QUANT_BLOCK))
    layout = layouts.row_per_warp(QUANT_BLOCK)
    x = plgpu.load(x_gmem.at[at], layout=layout, optimized=False).astype(jnp.float32)
    x = jnp.where(jnp.abs(x) < SMALLEST_NORMAL, 0.0, x)
    values, scale = quantize_rows(x, layout, interpret)
    values_gmem[at] = values
    scales_gmem[column, pl.ds(first, rows)] = scale


def quantize_rows(x, layout, interpret):
    """Quantizes `f32[r, c]` registers, one group per row; returns `e4m3[r, c]` and `f32[r]`."""
    over = functools.partial(divide, interpret=interpret)
    amax = jnp.max(jnp.abs(x), axis=1)
    largest = plgpu.layout_cast(jnp.full(amax.shape, E4M3_MAX, jnp.float32), layout.reduce(1))
    floored = lax.max(amax, jnp.float32(E4M3_MAX * SMALLEST_NORMAL))
    scale = over(floored, largest, layout=layout.reduce(1))
    scaled = over(x, lax.broadcast_in_dim(scale, x.shape, [0]), layout=layout)
    return jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn), scale
