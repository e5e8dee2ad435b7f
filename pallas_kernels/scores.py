"""A router's scores of its logits, as float32 formulas that are written out to the last bit.

The choice of experts hangs on comparisons, so two implementations agree in every id only if they
agree in every bit of what they compare. Library versions of `exp` and `log1p` differ in the last
bits; these formulas take nothing but operations that IEEE 754 defines: each product, sum and
quotient is rounded to nearest even on its own, so *no product may be fused with the sum after it*.
In `jax.numpy` that is `multiply`; PTX says `mul.rn.f32`, Triton `enable_fp_fusion=False`.

Where a formula says `fma`, product and sum are rounded once. A GPU has an instruction for that,
which halves the work of a polynomial; XLA has no such operation, and `fma` makes up for it.

Everything is f32. Scores are at most 3e-7 away from the exact ones, relative; those of a
sqrtsoftplus of a negative x `3e-7 + 4e-9 |x|`, those of a softmax `3e-7 + 8e-8 |x - max(x)|`, as
the difference is rounded. A share of a softmax below 2^-82 / total is 0.
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

EXP2 = tuple(
    map(
        np.float32,
        (
            0.00132647097923,
            0.00967151209694,
            0.0555073379772,
            0.240222421055,
            0.693146977582,
            1,
        ),
    )
)
"""`2^f` for |f| <= 1/2, highest power first: minimax, 9e-8."""

LOG1P = tuple(
    map(
        np.float32,
        (
            -0.00853916059079,
            0.0440894611583,
            -0.107681475172,
            0.177452251239,
            -0.244954571921,
            0.332754789094,
            -0.499974053618,
            0.999999805675,
        ),
    )
)
"""q with `log(1 + t) = t q(t)` for 0 <= t <= 1, highest power first: minimax, 2e-7."""

INTEGER = np.float32(1.5 * 2**23)
"""A sum with it is rounded to an integer, which its lowest bits hold."""

SOFTMAX_EXPONENT = -44
"""A softmax's exponentials come times two to this. Below 2^-126 they are 0, and of up to 2^18
others no share is an f32 denormal, nor the difference of one and a bias."""

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


def fma(a: _Array, b: Any, c: Any) -> _Array:
    """`a b + c`, rounded once, of finite numbers of which `a` is no constant.

    Where the product is not small beside `c` its last bits may be no denormals.

    The product is the sum of two numbers, by halves of 12 bits, whose products are exact: fused or
    not. Three numbers are added as Boldo and Melquiond do (doi:10.1109/TC.2007.70819): what is
    small is rounded to odd, so that no tie comes of it.
    """
    c = jnp.where(jnp.isnan(a), a, c)  # of sums with two constants XLA makes one with their sum
    a_high, b_high = _upper_half(a), _upper_half(b)
    a_low, b_low = a - a_high, b - b_high
    product = multiply(a, b)
    rest = ((a_high * b_high - product) + a_low * b_high) + a_high * b_low
    addend, lost = _two_sum(c, rest + a_low * b_low)
    total, rounded_off = _two_sum(product, addend)
    small, error = _two_sum(lost, rounded_off)
    bits = lax.bitcast_convert_type(small, jnp.int32)
    odd = bits + jnp.where((small > 0) == (error > 0), 1, -1)
    bits = jnp.where((error != 0) & (bits & 1 == 0), odd, bits)
    # Each number above is used more than once, and XLA's compiler for CPUs would write it anew each
    # time, over all steps of a polynomial.
    return lax.optimization_barrier(total + lax.bitcast_convert_type(bits, jnp.float32))


def _upper_half(x: Any) -> _Array:
    """The 12 highest bits of the significand."""
    bits = lax.bitcast_convert_type(jnp.asarray(x), jnp.int32)
    return lax.bitcast_convert_type(bits & np.int32(-(1 << 12)), jnp.float32)


def _two_sum(a: _Array, b: _Array) -> tuple[_Array, _Array]:
    """The sum, and what its rounding takes away."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def decay(x: _Array, exponent: int = 0) -> _Array:
    """`exp(-x) 2^exponent` of numbers that are not negative.

    In this order::

        i = fma(x, -LOG2_E, INTEGER + exponent)
        n = i - (INTEGER + exponent)
        decay = p(fma(x, -LOG2_E, -n)) 2^(n + exponent)   (p = EXP2 by Horner: p = fma(p, f, c);
                                                           i added to the exponent of p)

    It is 0 where that is below 2^-126, and for NaN.

    Args:
        x: f32[...].
        exponent: From -126 to 0.

    Returns:
        f32[...].
    """
    inside = jnp.minimum(x, decay_limit(exponent))  # which NaN stays, for the sake of `multiply`
    i = fma(inside, -LOG2_E, INTEGER + exponent)
    n = i - (INTEGER + exponent)
    p = _fma_horner(fma(inside, -LOG2_E, -n), EXP2)
    bits = lax.bitcast_convert_type(p, jnp.int32) + (lax.bitcast_convert_type(i, jnp.int32) << 23)
    # Down here n + exponent is -127 and p at least 1, or -126 and p less: no bits of a normal one.
    is_normal = (bits >= 1 << 23) & (x == x)
    return jnp.where(is_normal, lax.bitcast_convert_type(bits, jnp.float32), np.float32(0))


def decay_limit(exponent: int) -> np.float32:
    """What `decay` takes for all larger numbers: there it is 2^-126.9, which counts as 0."""
    return np.float32((126.9 + exponent) * np.log(2))


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
        e = decay(m - x, SOFTMAX_EXPONENT), as if m - x were 0 where x = m, also both infinite
        total = the sum of e, in the order of `tree_sum`
        softmax = e (1 / total)

    A NaN in the row counts in neither `m` nor `total`; its own score is NaN.

    Args:
        x: f32[T,E].

    Returns:
        f32[T,E] in 0..1.
    """
    largest = jnp.where(jnp.isnan(x), -np.float32(np.inf), x).max(axis=1, keepdims=True)
    e = decay(jnp.where(x == largest, np.float32(0), largest - x), SOFTMAX_EXPONENT)
    total = tree_sum(e)
    guess = divide(jnp.ones_like(total), total)
    inverse = fma(guess, fma(total, -guess, np.float32(1)), guess)  # if XLA divides to 2 ulp only
    return jnp.where(jnp.isnan(x), x, multiply(e, inverse))


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

        t = decay(|x|), and 0 for |x| > 87
        y = fma(t, q(t), max(x, 0))                       (q = LOG1P by Horner: q = fma(q, t, c))
        sqrtsoftplus = sqrt(y)

    Args:
        x: f32[...].

    Returns:
        f32[...], not negative; infinity for infinity, NaN for NaN.
    """
    size = jnp.abs(x)
    t = jnp.where(size > LARGEST_EXPONENT, np.float32(0), decay(size))
    q = _fma_horner(t, LOG1P)
    y = jnp.where(x > 0, fma(t, q, x), multiply(t, q))
    return jnp.where(x < np.float32(np.inf), jnp.sqrt(y), x)


def without_denormals(x: _Array) -> _Array:
    """`x`, and +0 for what is below 2^-126 in magnitude, -0 too."""
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, np.float32(0), x)


def _horner(x: _Array, coefficients: tuple[np.float32, ...], multiply: _Product) -> _Array:
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = multiply(x, total) + coefficient  # the first total is a constant
    return total


def _fma_horner(x: _Array, coefficients: tuple[np.float32, ...]) -> _Array:
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = fma(x, total, coefficient)  # the first total is a constant
    return total
