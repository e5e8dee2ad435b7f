"""The float32 formulas that the oracle and the plain backend share, and 16-bit rows."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float16, Float32

from pallas_kernels.shapes import F16_EXPONENT, LARGEST_F16, QUANT_BLOCK


def matmul(x: Float32[Array, "R K"], weight: Float32[Array, "N K"]) -> Float32[Array, "R N"]:
    """`x @ weight.T` in true float32, on GPUs too."""
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


_TILE_ROWS = 128


def matmul_in_tiles(
    x: Float32[Array, "R K"], weight: Float32[Array, "N K"]
) -> Float32[Array, "R N"]:
    """`matmul`, of which no row's bits depend on how many rows there are.

    XLA picks an algorithm by a product's shape, so here all products have the same one. It may not
    look through the barriers: of a single tile it would make a product of R rows.
    """
    rows, depth = x.shape
    padded = jnp.pad(x, ((0, -rows % _TILE_ROWS), (0, 0)))

    def one_tile(tile: Array) -> Array:
        return lax.optimization_barrier(matmul(lax.optimization_barrier(tile), weight))

    tiles = lax.map(one_tile, padded.reshape(-1, _TILE_ROWS, depth))
    return tiles.reshape(-1, weight.shape[0])[:rows]


def dequantize_rows(
    values: Float[Array, "R C"], scales: Float32[Array, "C//128 R"]
) -> Float32[Array, "R C"]:
    """Float32 of rows that carry one scale per 128 columns."""
    rows, columns = values.shape
    blocks = values.astype(jnp.float32).reshape(rows, columns // QUANT_BLOCK, QUANT_BLOCK)
    return (blocks * scales.T[:, :, None]).reshape(rows, columns)


def dequantize_weight(
    values: Float[Array, "N K"], scales: Float32[Array, "N//128 K//128"]
) -> Float32[Array, "N K"]:
    """Float32 of one expert's matrix that carries one scale per block of 128x128."""
    n, k = scales.shape
    blocks = values.astype(jnp.float32).reshape(n, QUANT_BLOCK, k, QUANT_BLOCK)
    return (blocks * scales[:, None, :, None]).reshape(values.shape)


def power_of_two_scales(scales: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Positive normal scales, each rounded up to a power of two; infinity and NaN stay.

    Such a scale is exact in e8m0. Adding one less than an exponent's worth of bits carries into the
    exponent exactly if any bit of the mantissa is set.
    """
    bits = lax.bitcast_convert_type(scales, jnp.int32)
    rounded = lax.bitcast_convert_type((bits + 0x7FFFFF) & -0x800000, jnp.float32)
    return jnp.where(jnp.isnan(scales), scales, rounded)


def scaled_f16(
    x: Float[Array, "R C"],
) -> tuple[Float16[Array, "R C"], Float32[Array, "C//128 R"]]:
    """Rows in f16 with a power of two per row and 128 columns: no magnitude overflows.

    With `amax` the largest magnitude of the 128 values::

        scale = max(2**(floor(log2(amax)) - 14), 2**-126)
        value = f16(x / scale), at most 2**15 - 16        (round to nearest even)

    The division is exact, so values keep the 11 bits of f16 down to 2^-29 of the block's amax: bf16
    and f16 values come out exact there. Magnitudes below 2^-126, f32 denormals, count as +0.
    NaN and infinity stay, each in its own place.

    Returns:
        The values, and the scales, block-major as in `Quantized`.
    """
    rows, columns = x.shape
    blocks = x.astype(jnp.float32).reshape(rows, columns // QUANT_BLOCK, QUANT_BLOCK)
    # Magnitudes as integers: XLA's float maximum over many rows may drop a NaN on a CPU.
    magnitude = lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
    blocks = jnp.where(magnitude < 1 << 23, 0.0, blocks)
    exponent = jnp.maximum((magnitude.max(axis=2) >> 23) - F16_EXPONENT, 1)
    scales = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    inverse = lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    values = blocks * inverse[:, :, None]
    clipped = jnp.clip(values, -LARGEST_F16, LARGEST_F16)
    values = jnp.where(jnp.isinf(blocks), values, clipped).astype(jnp.float16)
    return values.reshape(rows, columns), scales.T


def to_bits(values: Array) -> Array:
    """The same bits as unsigned integers.

    Rows of an 8 or 16 bit float array are read and written in this form: XLA's CPU compiler would
    convert the whole array to a wider type and back for each slice, gather or update.
    """
    return lax.bitcast_convert_type(values, jnp.dtype(f"uint{8 * values.dtype.itemsize}"))


def take(values: Array, index: Array) -> Array:
    """`values[index]`, reading no more than that."""
    return lax.bitcast_convert_type(to_bits(values)[index], values.dtype)


def swiglu(
    gemm1_output: Float32[Array, "R 2*I"], limit: float | None = None
) -> Float32[Array, "R I"]:
    """`silu(second half) * first half`: the gate is the *second* half of the columns.

    With `limit` the gate is first cut off above it, and the up half on both sides (DeepSeek-V4,
    GLM-5.3-Flash); NaN stays. The sigmoid saturates at 0 and 1, so a finite input never makes
    `inf * 0`.
    """
    up, gate = jnp.split(gemm1_output, 2, axis=1)
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(gate) * up
