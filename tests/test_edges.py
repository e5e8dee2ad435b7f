"""Numbers at the edge of their range: right, and no NaN, wherever the float64 oracle is finite.

The quantizer's edges are in test_quantize.py, the routing's in test_routing.py.
"""

from __future__ import annotations

import numpy as np
import pytest

import jax_moe
from tests import numpy_oracle
from tests.backend_cases import EVERYWHERE, running
from tests.moe_inputs import SMALL, bits, make_inputs

TO_ORACLE = 0.06  # of each row's norm; e4m3 between the matmuls
TINY, HUGE = 1e-30, 3e38

everywhere = pytest.mark.parametrize("case", EVERYWHERE)


def apply(case, inputs):
    with running(case) as backend:
        out = jax_moe.apply(*inputs, config=SMALL, backend=backend)
    return np.asarray(out, np.float64)


def oracle(inputs):
    with np.errstate(over="ignore", invalid="ignore"):
        return numpy_oracle.layer(*inputs, config=SMALL)


def check_rows(found, expected):
    """Every row on its own: outputs of one call differ by many orders of magnitude."""
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - expected, axis=1)
    norm = np.linalg.norm(expected, axis=1)
    assert (error <= TO_ORACLE * norm + TINY).all(), error / norm


@everywhere
def test_activation_scales_over_sixty_decades(case):
    """One call, a decade a token; silu makes the output about the scale's square."""
    inputs = make_inputs(61)
    decades = np.arange(-30.0, 31.0)
    scales = inputs.hidden_states_scale * 10.0**decades
    out = apply(case, inputs._replace(hidden_states_scale=scales.astype(np.float32)))
    expected = oracle(inputs._replace(hidden_states_scale=scales))
    local = expected.any(axis=1)
    assert not out[~local].any()
    finite = decades <= 18  # the product of gate and up fits in f32
    check_rows(out[finite & local], expected[finite & local])
    assert (local & (decades > 19)).sum() > 3
    assert not np.isfinite(out[local & (decades > 19)]).all(axis=1).any(), "f32 has no such number"


@everywhere
@pytest.mark.parametrize("where", ["gemm1_weights_scale", "gemm2_weights_scale"])
def test_weight_scales_of_any_size(case, where):
    """An expert each: the largest one decides the rows of its tokens, the others theirs."""
    inputs = make_inputs(61)
    sizes = {
        "gemm1_weights_scale": [1e-30, 1e-15, 1e-8, 1e-3, 1.0, 1e3, 1e8, 1e15],
        "gemm2_weights_scale": [0.0, 1e-30, 1e-10, 1.0, 1e10, 1e20, 1e30, 1e36],
    }[where]
    value = getattr(inputs, where) * np.array(sizes, np.float32)[:, None, None]
    inputs = inputs._replace(**{where: value})
    check_rows(apply(case, inputs), oracle(inputs))


@everywhere
def test_zero_and_negative_scales(case):
    inputs = make_inputs(40)
    rng = np.random.default_rng(7)
    scales = {
        name: value * rng.choice([-1.0, 0.0, 1.0], value.shape, p=[0.4, 0.2, 0.4]).astype("f4")
        for name, value in inputs.arrays.items()
        if name.endswith("_scale")
    }
    assert len(scales) == 3
    scales["hidden_states_scale"][:, 3] = 0
    scales["gemm2_weights_scale"][2] = 0
    inputs = inputs._replace(**scales)
    expected = oracle(inputs)
    out = apply(case, inputs)
    assert not out[3].any()
    check_rows(out, expected)


@everywhere
@pytest.mark.parametrize("size", [1e4, 1e15, 1e30])
def test_gates_far_from_zero(case, size):
    """The sigmoid saturates at 0 and 1: silu(-1e30) is zero, never inf * 0."""
    inputs = make_inputs(33)
    scale = inputs.gemm1_weights_scale.copy()
    scale[:, 1:] *= np.float32(size)  # the gate is the second half
    scale[:, :1] /= np.float32(size)
    inputs = inputs._replace(gemm1_weights_scale=scale)
    check_rows(apply(case, inputs), oracle(inputs))


@everywhere
def test_zeros_of_either_sign(case):
    inputs = make_inputs(20)
    x = inputs.hidden_states.copy()
    x[:10] = 0.0
    x[10:15] = -0.0
    x[15:18, :128] = -0.0
    inputs = inputs._replace(hidden_states=x)
    out = apply(case, inputs)
    assert not out[:15].any()
    check_rows(out, oracle(inputs))


@everywhere
def test_denormal_activations(case):
    """Every e4m3 number below 2^-6 is one: they count like any other."""
    inputs = make_inputs(16)
    rng = np.random.default_rng(3)
    x = (rng.integers(-7, 8, inputs.hidden_states.shape) * 2.0**-9).astype("f4")
    scale = np.full_like(inputs.hidden_states_scale, 2.0**7)
    inputs = inputs._replace(
        hidden_states=x.astype(inputs.hidden_states.dtype), hidden_states_scale=scale
    )
    check_rows(apply(case, inputs), oracle(inputs))


@everywhere
@pytest.mark.parametrize("factor", [0.0, -2.5, 1e-30, 1e30])
def test_factors_of_any_size(case, factor):
    inputs = make_inputs(33)._replace(routed_scaling_factor=factor)
    check_rows(apply(case, inputs), oracle(inputs))


@everywhere
def test_unquantized_activations_of_any_size(case):
    """Rows from f32's denormals to 1e18, some with one value far above the rest."""
    inputs = make_inputs(49)
    x = np.random.default_rng(1).standard_normal((49, 256))
    x[::3, 7] *= 1e4
    x = (x * 10.0 ** np.arange(-45.0, 4.0)[:, None]).astype(np.float32)
    values, scales = numpy_oracle.quantize(x)
    quantized = inputs._replace(hidden_states=values, hidden_states_scale=scales)
    out = apply(case, inputs._replace(hidden_states=x, hidden_states_scale=None))
    np.testing.assert_array_equal(bits(out), bits(apply(case, quantized)))
    check_rows(out, oracle(quantized))
