"""A router's scores of its logits, as float32 formulas that are written out to the last bit.

The choice of experts hangs on comparisons, so two implementations agree in every id only if they
agree in every bit of what they compare. Library versions of `exp` and `log1p` differ in the last
bits; these formulas take nothing but operations that IEEE 754 defines: each product, sum and
quotient is rounded to nearest even on its own, so *no product may be fused with the sum after it*.
In `jax.numpy` that is `multiply`; PTX says `mul.rn.f32`, Triton `enable_fp_fusion=False`.

Everything is f32. Scores are at most 2e-7 away from the exact ones, relative; those of a softmax
`2e-7 + 6e-8 |x - max(x)|`, as the difference is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

LARGEST_EXPONENT = np.float32(87)
"""`exp` is 0 below minus this and infinite above it, so that no result is an f32 denormal."""

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)  # 9 bits: its product with an exponent is exact
LN2_LOW = np.float32(-2.1219444005469057e-4)  # ln 2 - LN2_HIGH

EXP = tuple(
    map(
        np.float32,
        (
            0.001381459878757596,
            0.008368716575205326,
            0.04166838899254799,
            0.1666652113199234,
            0.4999999403953552,
        ),
    )
)
"""q with `exp(r) = 1 + r + r^2 q(r)` for |r| <= ln(2)/2, highest power first: minimax, 3e-9."""

ATANH = tuple(
    map(
        np.float32,
        (0.14012230932712555, 0.13999570906162262, 0.20010849833488464, 0.3333320617675781),
    )
)
"""q with `atanh(s) = s + s z q(z)`, z = s^2 <= 1/9, highest power first: minimax, 5e-9."""

SMALLEST_NORMAL = np.finfo(np.float32).tiny
"""2^-126. Magnitudes below count as 0: CPUs and GPUs treat denormals differently."""

type _Array = Float32[Array, "*n"]
type _Product = Callable[[_Array, Any], _Array]


def multiply(a: _Array, b: _Array) -> _Array:
    """`a * b`, rounded before anything else is done with it.

    XLA's compilers fuse a product with a sum after it. They do not look through the select, which
    they cannot simplify either as long as `a` is no constant, and which changes no result: a NaN
    stays one.
    """
    return jnp.where(jnp.isnan(a), a, a * b)


def divide(a: _Array, b: Any) -> _Array:
    """`a / b`, rounded once.

    XLA makes a plain division by a constant, a broadcast or a quotient a product with a rounded
    reciprocal; the select is none of these and changes no result.
    """
    return a / jnp.where(jnp.isnan(a), a, b)


def exp(x: _Array, multiply: _Product = multiply) -> _Array:
    """The exponential.

    In this order::

        n = round(x LOG2_E)                               (to nearest even)
        r = (x - n LN2_HIGH) - n LN2_LOW
        y = ((q(r) (r r)) + r) + 1                        (q by Horner: p = p r + c)
        exp = y 2^n                                       (n added to the exponent of y)

    It is 0 for x < -87, infinity for x > 87, and NaN for NaN.

    Args:
        x: f32[...].
        multiply: A product that is rounded on its own.

    Returns:
        f32[...].
    """
    inside = jnp.clip(x, -LARGEST_EXPONENT, LARGEST_EXPONENT)
    n = lax.round(multiply(inside, LOG2_E), lax.RoundingMethod.TO_NEAREST_EVEN)
    r = (inside - n * LN2_HIGH) - multiply(n, LN2_LOW)
    y = (multiply(_horner(r, EXP, multiply), multiply(r, r)) + r) + np.float32(1)
    bits = lax.bitcast_convert_type(y, jnp.int32) + (n.astype(jnp.int32) << 23)
    y = lax.bitcast_convert_type(bits, jnp.float32)
    y = jnp.where(x < -LARGEST_EXPONENT, np.float32(0), y)
    y = jnp.where(x > LARGEST_EXPONENT, np.float32(np.inf), y)
    return jnp.where(jnp.isnan(x), x, y)


def sigmoid(x: _Array) -> _Array:
    """`1 / (1 + exp(-x))`, as DeepSeek-V3 scores (arXiv:2412.19437, equation 15).

    Args:
        x: f32[...].

    Returns:
        f32[...] in 0..1.
    """
    return divide(jnp.ones_like(x), np.float32(1) + exp(-x))


def softmax(x: Float32[Array, "T E"]) -> Float32[Array, "T E"]:
    """The softmax of each row.

    In this order::

        m = the largest of x that is a number
        e = exp(x - m), and 1 where x = m                 (also where both are infinite)
        total = the sum of e, in the order of `tree_sum`
        softmax = e / total, and 0 where that is below 2^-126

    A NaN in the row counts in neither `m` nor `total`; its own score is NaN.

    Args:
        x: f32[T,E].

    Returns:
        f32[T,E] in 0..1.
    """
    is_nan = jnp.isnan(x)
    largest = jnp.where(is_nan, -np.float32(np.inf), x).max(axis=1, keepdims=True)
    e = exp(jnp.where(x == largest, np.float32(0), x - largest))
    total = tree_sum(jnp.where(is_nan, np.float32(0), e))
    return without_denormals(divide(e, jnp.broadcast_to(total, e.shape)))


def tree_sum(x: Float32[Array, "T E"]) -> Float32[Array, "T 1"]:
    """The sum of each row: zeros up to a power of two, then halves are added until one is left.

    It is the order in which a warp adds: registers first, then lanes at distances of 16, 8, 4, 2
    and 1.

    Args:
        x: f32[T,E], not negative.

    Returns:
        f32[T,1].
    """
    width = 1 << max(x.shape[1] - 1, 0).bit_length()
    x = jnp.pad(x, ((0, 0), (0, width - x.shape[1])))
    while width > 1:
        width //= 2
        x = x[:, :width] + x[:, width:]
    return x


def sqrtsoftplus(x: _Array) -> _Array:
    """`sqrt(softplus(x))`, as DeepSeek-V4 scores.

    In this order::

        t = exp(-|x|)
        d = (t + t) / (2 + t)
        log1p(t) = d + d (z q(z)),  z = s s, s = d / 2    (q by Horner: p = p z + c)
        sqrtsoftplus = sqrt(max(x, 0) + log1p(t))

    Args:
        x: f32[...].

    Returns:
        f32[...], not negative; infinity for infinity.
    """
    t = exp(-jnp.abs(x))
    d = divide(t + t, np.float32(2) + t)
    s = d * np.float32(0.5)
    z = multiply(s, s)
    log1p = d + multiply(d, multiply(z, _horner(z, ATANH, multiply)))
    return jnp.sqrt(jnp.maximum(x, np.float32(0)) + log1p)


def without_denormals(x: _Array) -> _Array:
    """`x`, and +0 for what is below 2^-126 in magnitude, -0 too."""
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, np.float32(0), x)


def _horner(x: _Array, coefficients: tuple[np.float32, ...], multiply: _Product) -> _Array:
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = multiply(x, total) + coefficient  # the first total is a constant
    return total
