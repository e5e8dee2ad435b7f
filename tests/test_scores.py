"""The scores of a router: every bit as written, and close to the exact ones."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from scipy import special

from pallas_kernels import scores
from tests.fused import fma
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


def decay(x, exponent=0):
    integer = f32(1.5 * 2**23 + exponent)
    limit = scores.decay_limit(exponent)
    x = np.where(x < limit, x, limit)
    i = fma(x, -scores.LOG2_E, integer)
    n = i - integer
    p = fused_horner(fma(x, -scores.LOG2_E, -n), scores.EXP2)
    y = np.ldexp(p.astype(np.float64), n.astype(np.int32) + exponent).astype(f32)
    return np.where(y < scores.SMALLEST_NORMAL, f32(0), y)


def fused_horner(x, coefficients):
    total = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total = fma(total, x, c)
    return total


def sqrtsoftplus(x):
    t = np.where(np.abs(x) > 87, f32(0), decay(np.abs(x)))
    y = np.sqrt(fma(t, fused_horner(t, scores.LOG1P), np.where(x > 0, x, f32(0))))
    return np.where(x < np.inf, y, x)


def softmax(x):
    e = decay(x.max(axis=1, keepdims=True) - x, -44)
    total = np.zeros((len(x), 1 << (x.shape[1] - 1).bit_length()), f32)
    total[:, : x.shape[1]] = e
    while total.shape[1] > 1:
        total = total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2 :]
    return e * (f32(1) / total)


EXACT = {
    "exp": np.exp,
    "sigmoid": special.expit,
    "sqrtsoftplus": lambda x: np.sqrt(np.logaddexp(0, x)),
    "softmax": lambda x: special.softmax(x, axis=1),
}


RTOL = {"exp": 2e-7, "sigmoid": 2e-7, "sqrtsoftplus": 7e-7}


@pytest.mark.parametrize("name", ["exp", "sigmoid", "sqrtsoftplus"])
def test_every_bit_is_as_written_and_close_to_the_exact_value(name):
    x = logits()
    with np.errstate(all="ignore"):
        expected = globals()[name](x)
        exact = EXACT[name](x.astype(np.float64))
    found = np.asarray(jax.jit(getattr(scores, name))(x))
    np.testing.assert_array_equal(bits(found), bits(expected))
    normal = np.abs(x) <= 87  # NaN is not
    np.testing.assert_allclose(found[normal], exact[normal], rtol=RTOL[name])
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
    bound = exact * (4e-7 + distance * 8e-8)
    assert (np.abs(found - exact) <= np.where(distance > 56, 2**-81, bound)).all()


@pytest.mark.parametrize("size", [1, 1e-3, 1e-7, 1e5, 0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_products_and_sums_are_rounded_once(size):
    """Also where they cancel (size 0) and where little is missing to a tie."""
    rng = np.random.default_rng(2)
    a, b, c = rng.standard_normal((3, 100_000)).astype(f32)
    c = c * f32(size) if size else -a * b
    near = 1 + rng.integers(0, 8, (3, 100_000)) * 2.0**-23
    near *= 2.0 ** rng.integers([[0], [0], [-30]], [[1], [1], [30]], near.shape)
    found = jax.jit(scores.fma)
    np.testing.assert_array_equal(bits(found(a, b, c)), bits(fma(a, b, c)))
    np.testing.assert_array_equal(bits(found(*near.astype(f32))), bits(fma(*near.astype(f32))))


def test_softmax_of_what_is_no_number_or_infinite():
    inf, nan = np.inf, np.nan
    x = np.array([[1, nan, 1, -inf], [inf, 3, inf, nan], [-inf] * 4, [nan] * 4], f32)
    found = np.asarray(scores.softmax(x))
    expected = [[0.5, nan, 0.5, 0], [0.5, 0, 0.5, nan], [0.25] * 4, [nan] * 4]
    np.testing.assert_array_equal(found, np.array(expected, f32))


_ROUTE = """
import jax.numpy as jnp, jax_moe
for scoring in ("softmax", "sqrtsoftplus"):
    config = jax_moe.MoEConfig(top_k=2, n_group=1, topk_group=1, scoring=scoring)
    jax_moe.route(jnp.ones((4, 16)), jnp.zeros(16), 1.0, config=config, backend="xla")
"""


def test_a_router_compiles_as_users_compile():
    """In a process whose XLA optimizes, other than here: there it did not come to an end once."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", _ROUTE], env=environment, check=True, timeout=120)
