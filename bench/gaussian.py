"""Gaussian numbers that come out bit-equal on every device.

`jax.random.normal` evaluates a float polynomial, which CPUs and GPUs round differently. Here
threefry bits, which are equal everywhere, index a table of 65,536 Gaussian quantiles computed once
on the host, and e4m3 values are made with one float multiplication and integer rounding: nothing
that a device could round in its own way.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Key, UInt16

BLOCK = 128
E4M3_MAX = 448.0
_HALF = 32768  # magnitudes; the sixteenth bit is the sign


@functools.cache
def _half_normal_quantiles() -> np.ndarray:
    """f32[32768]: quantiles of |N(0, 1)| at the midpoints of equal probabilities, ascending."""
    normal = statistics.NormalDist()
    midpoints = ((rank + 0.5) / (2 * _HALF) + 0.5 for rank in range(_HALF))
    return np.array([normal.inv_cdf(p) for p in midpoints], np.float32)


def key_for(seed: int, *path: int) -> Key[Array, ""]:
    """The threefry key of one tensor: `seed`, then a path of small numbers (stream, trial, ...)."""
    key = jax.random.key(seed, impl="threefry2x32")
    for number in path:
        key = jax.random.fold_in(key, number)
    return key


def _split(bits: UInt16[Array, "..."]) -> tuple[Array, Array]:
    return (bits & 0x7FFF).astype(jnp.int32), (bits >> 15).astype(jnp.bool_)


def gaussian(key: Key[Array, ""], shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """Samples of N(0, 1) on 65,536 levels within +-4.33, bit-equal on every device."""
    rank, negative = _split(jax.random.bits(key, shape, jnp.uint16))
    magnitude = jnp.asarray(_half_normal_quantiles())[rank]
    return jnp.where(negative, -magnitude, magnitude)


def to_e4m3(x: Float32[Array, "..."]) -> Float8e4m3fn[Array, "..."]:
    """Rounds f32 to e4m3 (nearest, ties to even, clipped to +-448) with integer arithmetic.

    A device's own cast may go through f16 and round twice; this one cannot.
    """
    bits = lax.bitcast_convert_type(jnp.minimum(jnp.abs(x), E4M3_MAX), jnp.uint32)
    # Normals: keep 3 of 23 mantissa bits; the exponent bias falls from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 the step is 2^-9: adding 2^14 leaves that many steps in the low mantissa bits.
    magnitude = lax.bitcast_convert_type(bits, jnp.float32)
    denormal = lax.bitcast_convert_type(magnitude + jnp.float32(2.0**14), jnp.uint32) & 0xF
    code = jnp.where(magnitude < 2.0**-6, denormal, normal) | (
        jnp.signbit(x).astype(jnp.uint32) << 7
    )
    return lax.bitcast_convert_type(code.astype(jnp.uint8), jnp.float8_e4m3fn)


def clipped_gaussian_e4m3(
    key: Key[Array, ""], shape: tuple[int, ...]
) -> Float8e4m3fn[Array, "..."]:
    """e4m3 of `clip(N(0, 1), -2, 2)`, as flashinfer-bench fills FP8 tensors."""
    return to_e4m3(jnp.clip(gaussian(key, shape), -2.0, 2.0))


def quantized_gaussian(
    key: Key[Array, ""], rows: int, columns: int, *, block_rows: int, std: float
) -> tuple[Float8e4m3fn[Array, "rows columns"], Float[Array, "row_blocks column_blocks"]]:
    """A Gaussian matrix quantized by blocks of `block_rows` x 128, scale = amax / 448.

    Args:
        key: From `key_for`.
        rows: A multiple of `block_rows`.
        columns: A multiple of 128.
        block_rows: 128 for weights, 1 for activations.
        std: Standard deviation of the unquantized values.

    Returns:
        `(values, scales)`: e4m3[rows, columns] and f32[rows / block_rows, columns / 128];
        `values * scales` is the matrix.
    """
    quantiles = _half_normal_quantiles()
    row_blocks, column_blocks = rows // block_rows, columns // BLOCK
    bits = jax.random.bits(key, (row_blocks, block_rows, column_blocks, BLOCK), jnp.uint16)
    rank, negative = _split(bits)
    top = rank.max(axis=(1, 3))  # the quantiles ascend, so the largest rank is the block's amax
    # Divisions happen here, on the host: a GPU may divide approximately.
    to_full_range = jnp.asarray((E4M3_MAX / quantiles.astype(np.float64)).astype(np.float32))[top]
    scales = jnp.asarray((std * quantiles.astype(np.float64) / E4M3_MAX).astype(np.float32))[top]
    magnitude = jnp.asarray(quantiles)[rank] * to_full_range[:, None, :, None]
    values = to_e4m3(jnp.where(negative, -magnitude, magnitude))
    return values.reshape(rows, columns), scales
