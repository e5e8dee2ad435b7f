"""The float32 oracle against float64 NumPy."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import DEEPSEEK_V3, MoEConfig
from tests import numpy_oracle
from tests.backend_cases import slow
from tests.moe_inputs import SMALL, bits, make_inputs, named_arrays, relative_error, replaced

BF16_ROUNDING = 2e-3  # of a correctly rounded result, in the Frobenius norm


def check(inputs, config):
    out = jax_moe.reference(*inputs.arguments, config=config)
    assert out.dtype == jax.numpy.bfloat16
    assert out.shape == inputs.hidden_states.shape
    expected = numpy_oracle.layer(*inputs.arguments, config=config)
    assert relative_error(out, expected) < BF16_ROUNDING
    is_zero = (expected == 0).all(axis=1)
    assert not bits(out)[is_zero].any(), "a token without a local expert must be exactly zero"
    return out, is_zero


@pytest.mark.parametrize("num_tokens", [1, slow(7), 64, slow(601)])
def test_against_float64(num_tokens):
    check(make_inputs(num_tokens), SMALL)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (DEEPSEEK_V3, {"num_experts": 256, "num_local_experts": 32, "offset": 96}),
        slow(DEEPSEEK_V3, {"num_experts": 256, "num_local_experts": 5, "offset": 251}),
        (MoEConfig(2, 1, 1), {"num_experts": 9, "num_local_experts": 9, "offset": 0}),
        (SMALL, {"hidden_size": 128, "intermediate_size": 384}),
    ],
)
def test_other_sizes(config, shape):
    _, is_zero = check(make_inputs(61, **shape), config)
    if shape.get("num_local_experts", 8) < 9:
        assert is_zero.any()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_unquantized_hidden_states_are_used_as_they_are(dtype):
    inputs = make_inputs(31)
    x = np.random.default_rng(5).standard_normal((31, 256)).astype(dtype)
    check(inputs._replace(hidden_states=x, hidden_states_scale=None), SMALL)


def test_distinct_negative_and_zero_scales():
    inputs = make_inputs(64)
    rng = np.random.default_rng(7)
    scales = {
        name: rng.standard_normal(value.shape).astype(np.float32)
        for name, value in named_arrays(inputs).items()
        if name.endswith("_scale")
    }
    scales["hidden_states_scale"][:, 3] = 0
    scales["gemm1_weights_scale"][2] = 0
    check(replaced(inputs, **scales), SMALL)


def test_every_token_in_one_expert_takes_several_tiles():
    inputs = make_inputs(1100)
    bias = np.zeros(32, np.float32)
    bias[[8, 9, 10, 11]] = 10
    check(inputs._replace(routing_bias=bias), SMALL)


def test_gate_is_the_second_half():
    inputs = make_inputs(16)
    swapped = replaced(
        inputs,
        gemm1_weights=np.roll(inputs.weights.gemm1_weights, 128, axis=1),
        gemm1_weights_scale=np.roll(inputs.weights.gemm1_weights_scale, 1, axis=1),
    )
    expected = numpy_oracle.layer(*inputs.arguments, config=SMALL)
    assert relative_error(jax_moe.reference(*swapped.arguments, config=SMALL), expected) > 0.5


def test_gates_far_below_zero_stay_finite():
    inputs = make_inputs(16)
    out = jax_moe.reference(
        *replaced(inputs, gemm1_weights_scale=inputs.weights.gemm1_weights_scale * 1e4).arguments,
        config=SMALL,
    )
    assert np.isfinite(np.asarray(out, np.float32)).all()
