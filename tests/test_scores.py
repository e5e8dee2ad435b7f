"""The scores of a router: every bit as written, and close to the exact ones."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import special

from pallas_kernels import scores
from tests.moe_inputs import bits

f32 = np.float32


def logits(count=400_000):
    """Normal logits, all sizes of them, and the edges of the formulas."""
    rng = np.random.default_rng(0)
    edges = [0, -0.0, 87, -87, 87.00001, -87.00001, 88.8, -104, 1e38, -1e38, 1e-38, 1e-45, 1e-7]
    return np.concatenate(
        [
            rng.standard_normal(count),
            rng.uniform(-90, 90, count),
            np.ldexp(rng.uniform(-1, 1, count // 4), rng.integers(-60, 0, count // 4)),
            [*edges, np.inf, -np.inf, np.nan],
        ]
    ).astype(f32)


def horner(x, coefficients):
    total = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total = total * x + c  # NumPy rounds the product and the sum
    return total


def exp(x):
    inside = np.clip(x, f32(-87), f32(87))
    n = np.rint(inside * scores.LOG2_E)
    r = (inside - n * scores.LN2_HIGH) - n * scores.LN2_LOW
    y = (horner(r, scores.EXP) * (r * r) + r) + f32(1)
    y = np.ldexp(y, n.astype(np.int32))
    y = np.where(x < -87, f32(0), np.where(x > 87, f32(np.inf), y))
    return np.where(np.isnan(x), x, y)


def sigmoid(x):
    return f32(1) / (f32(1) + exp(-x))


def sqrtsoftplus(x):
    t = exp(-np.abs(x))
    d = (t + t) / (f32(2) + t)
    s = d * f32(0.5)
    z = s * s
    return np.sqrt(np.maximum(x, f32(0)) + (d + d * (z * horner(z, scores.ATANH))))


def softmax(x):
    e = exp(x - x.max(axis=1, keepdims=True))
    total = np.zeros((len(x), 1 << (x.shape[1] - 1).bit_length()), f32)
    total[:, : x.shape[1]] = e
    while total.shape[1] > 1:
        total = total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2 :]
    quotient = e / total
    return np.where(quotient < scores.SMALLEST_NORMAL, f32(0), quotient)


EXACT = {
    "exp": np.exp,
    "sigmoid": special.expit,
    "sqrtsoftplus": lambda x: np.sqrt(np.logaddexp(0, x)),
    "softmax": lambda x: special.softmax(x, axis=1),
}


@pytest.mark.parametrize("name", ["exp", "sigmoid", "sqrtsoftplus"])
def test_every_bit_is_as_written_and_close_to_the_exact_value(name):
    x = logits()
    with np.errstate(all="ignore"):
        expected = globals()[name](x)
        exact = EXACT[name](x.astype(np.float64))
    found = np.asarray(jax.jit(getattr(scores, name))(x))
    np.testing.assert_array_equal(bits(found), bits(expected))
    normal = np.abs(x) <= 87  # NaN is not
    np.testing.assert_allclose(found[normal], exact[normal], rtol=2e-7)
    assert np.isnan(found[-1])


@pytest.mark.parametrize("num_experts", [1, 7, 32, 96, 512])
@pytest.mark.parametrize("spread", [1, 30])
def test_softmax_is_as_written(num_experts, spread):
    x = np.random.default_rng(1).standard_normal((2000, num_experts), f32) * f32(spread)
    with np.errstate(all="ignore"):
        expected = softmax(x)
    found = np.asarray(jax.jit(scores.softmax)(x))
    np.testing.assert_array_equal(bits(found), bits(expected))
    exact = EXACT["softmax"](x.astype(np.float64))
    distance = x.max(axis=1, keepdims=True) - x  # its rounding is most of the error
    assert (np.abs(found - exact) <= exact * (3e-7 + distance * 2**-24) + 1e-37).all()


def test_softmax_of_what_is_no_number_or_infinite():
    inf, nan = np.inf, np.nan
    x = np.array([[1, nan, 1, -inf], [inf, 3, inf, nan], [-inf] * 4, [nan] * 4], f32)
    found = np.asarray(scores.softmax(x))
    expected = [[0.5, nan, 0.5, 0], [0.5, 0, 0.5, nan], [0.25] * 4, [nan] * 4]
    np.testing.assert_array_equal(found, np.array(expected, f32))
