"""The formulas of `pallas_kernels.scores` in Triton, bit for bit.

Kernels that call them are launched with `fuse_products=False`: a product may not be fused with the
sum after it. Values are f32 of any shape.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels import scores

_LARGEST_EXPONENT = tl.constexpr(float(scores.LARGEST_EXPONENT))
_LOG2_E = tl.constexpr(float(scores.LOG2_E))
_LN2_HIGH = tl.constexpr(float(scores.LN2_HIGH))
_LN2_LOW = tl.constexpr(float(scores.LN2_LOW))
_EXP_5 = tl.constexpr(float(scores.EXP[0]))
_EXP_4 = tl.constexpr(float(scores.EXP[1]))
_EXP_3 = tl.constexpr(float(scores.EXP[2]))
_EXP_2 = tl.constexpr(float(scores.EXP[3]))
_EXP_1 = tl.constexpr(float(scores.EXP[4]))
_EXP2_5 = tl.constexpr(float(scores.EXP2[0]))
_EXP2_4 = tl.constexpr(float(scores.EXP2[1]))
_EXP2_3 = tl.constexpr(float(scores.EXP2[2]))
_EXP2_2 = tl.constexpr(float(scores.EXP2[3]))
_EXP2_1 = tl.constexpr(float(scores.EXP2[4]))
_LOG1P_7 = tl.constexpr(float(scores.LOG1P[0]))
_LOG1P_6 = tl.constexpr(float(scores.LOG1P[1]))
_LOG1P_5 = tl.constexpr(float(scores.LOG1P[2]))
_LOG1P_4 = tl.constexpr(float(scores.LOG1P[3]))
_LOG1P_3 = tl.constexpr(float(scores.LOG1P[4]))
_LOG1P_2 = tl.constexpr(float(scores.LOG1P[5]))
_LOG1P_1 = tl.constexpr(float(scores.LOG1P[6]))
_LOG1P_0 = tl.constexpr(float(scores.LOG1P[7]))
_SOFTMAX_EXPONENT = tl.constexpr(float(scores.SOFTMAX_EXPONENT))
_SOFTMAX_LIMIT = tl.constexpr(float(scores.decay_limit(scores.SOFTMAX_EXPONENT)))
_SMALLEST_NORMAL = tl.constexpr(float(scores.SMALLEST_NORMAL))
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it is rounded to an integer
_ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def exp(x):
    """`scores.exp`."""
    inside = tl.where(x > _LARGEST_EXPONENT, _LARGEST_EXPONENT, x)
    inside = tl.where(inside < -_LARGEST_EXPONENT, -_LARGEST_EXPONENT, inside)
    shifted = inside * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = (inside - n * _LN2_HIGH) - n * _LN2_LOW
    q = r * _EXP_5 + _EXP_4
    q = r * q + _EXP_3
    q = r * q + _EXP_2
    q = r * q + _EXP_1
    y = (q * (r * r) + r) + 1.0
    exponent = shifted.to(tl.int32, bitcast=True) - _ROUND_BITS
    y = (y.to(tl.int32, bitcast=True) + (exponent << 23)).to(tl.float32, bitcast=True)
    y = tl.where(x < -_LARGEST_EXPONENT, 0.0, y)
    y = tl.where(x > _LARGEST_EXPONENT, float("inf"), y)
    return tl.where(x != x, x, y)


@triton.jit
def without_denormals(x):
    """`x`, and +0 for what is below 2^-126 in magnitude, -0 too."""
    return tl.where(tl.abs(x) < _SMALLEST_NORMAL, 0.0, x)


@triton.jit
def _decay(x, EXPONENT: tl.constexpr):
    """`scores.decay` of what is below its limit."""
    shifted = tl.fma(x, -_LOG2_E, _ROUND + EXPONENT)
    f = tl.fma(x, -_LOG2_E, (_ROUND + EXPONENT) - shifted)
    p = tl.fma(f, _EXP2_5, _EXP2_4)
    p = tl.fma(p, f, _EXP2_3)
    p = tl.fma(p, f, _EXP2_2)
    p = tl.fma(p, f, _EXP2_1)
    p = tl.fma(p, f, 1.0)
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return tl.where(bits >= 1 << 23, bits.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _of_softmax(x, best):
    """What a logit adds to the total; 0 of a NaN."""
    distance = tl.where(x == best, 0.0, best - x)
    return _decay(tl.where(distance < _SOFTMAX_LIMIT, distance, _SOFTMAX_LIMIT), _SOFTMAX_EXPONENT)


@triton.jit
def _sqrtsoftplus(x):
    size = tl.abs(x)
    t = _decay(tl.where(size < _LARGEST_EXPONENT, size, _LARGEST_EXPONENT), 0.0)
    t = tl.where(size > _LARGEST_EXPONENT, 0.0, t)
    q = tl.fma(t, _LOG1P_7, _LOG1P_6)
    q = tl.fma(q, t, _LOG1P_5)
    q = tl.fma(q, t, _LOG1P_4)
    q = tl.fma(q, t, _LOG1P_3)
    q = tl.fma(q, t, _LOG1P_2)
    q = tl.fma(q, t, _LOG1P_1)
    q = tl.fma(q, t, _LOG1P_0)
    y = tl.sqrt_rn(tl.fma(t, q, tl.where(x > 0, x, 0.0)))
    return tl.where(x != x, x, y)


@triton.jit
def largest(x):
    """Of the logits of a token those that are numbers; -inf where none is."""
    return tl.max(tl.where(x != x, -float("inf"), x), axis=0)


@triton.jit
def total(x, best, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """The sum of a softmax's exponentials in the order of `scores.tree_sum`.

    Args:
        x: f32[BLOCK] logits, NaN where no expert is.
        best: Their `largest`.
        BLOCK: A power of two.
        STEPS: Its logarithm.
    """
    e = _of_softmax(x, best)
    for step in tl.static_range(STEPS):
        e = tl.sum(tl.reshape(e, [2, BLOCK >> (step + 1)]), axis=0)
    return tl.sum(e, axis=0)


@triton.jit
def score(x, best, sum_of_all, SCORING: tl.constexpr):
    """What a router makes of logits.

    Args:
        x: f32 logits.
        best: Of a softmax, `largest` of all logits.
        sum_of_all: Of a softmax, `total` of all logits.
        SCORING: "sigmoid", "softmax" or "sqrtsoftplus".
    """
    if SCORING == "softmax":
        y = tl.where(x != x, x, _of_softmax(x, best) * tl.div_rn(1.0, sum_of_all))
    elif SCORING == "sqrtsoftplus":
        y = _sqrtsoftplus(x)
    else:
        y = tl.div_rn(1.0, 1.0 + exp(-x))
    return y
