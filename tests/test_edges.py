"""Numbers at the edge of their range: right, and no NaN, wherever the float64 oracle is finite.

The quantizer's edges are in test_quantize.py, the routing's in test_routing.py.
"""

from __future__ import annotations

import numpy as np
import pytest

import jax_moe
from jax_moe import MoEConfig
from tests import numpy_oracle
from tests.backend_cases import EVERYWHERE, running
from tests.moe_inputs import (
    SMALL,
    bits,
    logits_for,
    make_inputs,
    named_arguments,
    named_arrays,
    replaced,
)

TO_ORACLE = 0.06  # of each row's norm; e4m3 between the matmuls
TINY = float(np.finfo(np.float32).tiny)
ONE_EXPERT = MoEConfig(top_k=1, n_group=1, topk_group=1)
CENTERS = np.arange(-28.0, 29.0, 8.0)  # the decade that each of the 8 local experts undoes

everywhere = pytest.mark.parametrize("case", EVERYWHERE)


def apply(case, inputs, config=SMALL):
    with running(case) as backend:
        out = jax_moe.apply(*inputs.arguments, config=config, backend=backend)
    return np.asarray(out, np.float64)


def oracle(inputs, config=SMALL):
    with np.errstate(over="ignore", invalid="ignore"):
        return numpy_oracle.layer(*inputs.arguments, config=config)


def check_rows(found, expected, *, zeros):
    """Every row on its own: outputs of one call differ by many orders of magnitude.

    Exactly `zeros` rows of the oracle are zero, and no other is near the end of f32's range.
    """
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - expected, axis=1)
    norm = np.linalg.norm(expected, axis=1)
    assert (norm == 0).sum() == zeros
    assert ((norm == 0) | (norm > 1e-33)).all(), norm
    assert (error <= TO_ORACLE * norm).all(), error / norm


def all_local(num_tokens):
    """Inputs whose tokens have four of the eight experts each, all local."""
    return make_inputs(num_tokens, num_experts=8, offset=0)


def sent_to(experts):
    """Inputs whose tokens have one local expert each, for the config `ONE_EXPERT`."""
    inputs = make_inputs(len(experts))
    choices = inputs.local_expert_offset + np.asarray(experts)[:, None]
    return inputs._replace(routing_logits=logits_for(choices, 32, top_k=1))


def undoing(inputs):
    """Each expert's first weights scaled down by its center."""
    undo = (10.0**-CENTERS).astype(np.float32)
    return replaced(
        inputs, gemm1_weights_scale=inputs.weights.gemm1_weights_scale * undo[:, None, None]
    )


def nearest(decades):
    """The expert that brings a token of each decade to between 1e-4 and 1e4."""
    return np.abs(np.asarray(decades)[:, None] - CENTERS).argmin(axis=1)


def scaled(inputs, decades):
    scales = inputs.hidden_states_scale * 10.0**decades
    return inputs._replace(hidden_states_scale=scales.astype(np.float32))


@everywhere
def test_activation_scales_over_sixty_decades(case):
    """One call, a decade a token, undone by the first weights of its expert.

    The last tokens go where nothing undoes them: f32 has no such number as their gate times up.
    """
    held, lost = np.arange(-30.0, 31.0), np.arange(20.0, 31.0)
    experts = np.concatenate([nearest(held), np.full(len(lost), nearest([0.0])[0])])
    inputs = scaled(undoing(sent_to(experts)), np.concatenate([held, lost]))
    out = apply(case, inputs, ONE_EXPERT)
    check_rows(out[: len(held)], oracle(inputs, ONE_EXPERT)[: len(held)], zeros=0)
    assert not np.isfinite(out[len(held) :]).all(axis=1).any()


@everywhere
def test_results_over_sixty_decades(case):
    """The weights undo nothing: silu makes the output about the square of the token's scale."""
    decades = np.arange(-15.0, 19.0)
    inputs = scaled(sent_to(np.arange(len(decades)) % 8), decades)
    expected = oracle(inputs, ONE_EXPERT)
    assert np.ptp(np.log10(np.linalg.norm(expected, axis=1))) > 60
    check_rows(apply(case, inputs, ONE_EXPERT), expected, zeros=0)


@everywhere
@pytest.mark.parametrize(
    ("where", "sizes"),
    [
        ("gemm1_weights_scale", [1e-16, 1e-12, 1e-8, 1e-3, 1.0, 1e3, 1e8, 1e15]),
        ("gemm2_weights_scale", [0.0, 1e-30, 1e-10, 1.0, 1e10, 1e20, 1e30, 1e36]),
    ],
)
def test_weight_scales_of_any_size(case, where, sizes):
    """One an expert; of the first matmul, silu makes the output about their square."""
    inputs = sent_to(np.arange(64) % 8)
    value = named_arguments(inputs)[where] * np.array(sizes, np.float32)[:, None, None]
    inputs = replaced(inputs, **{where: value})
    zeros = 8 * sizes.count(0.0)
    check_rows(apply(case, inputs, ONE_EXPERT), oracle(inputs, ONE_EXPERT), zeros=zeros)


@everywhere
@pytest.mark.parametrize("where", ["gemm1_weights_scale", "gemm2_weights_scale"])
def test_the_largest_expert_decides_its_tokens(case, where):
    """Four experts of different sizes a token, all local."""
    inputs = all_local(61)
    sizes = 10.0 ** np.arange(-14.0, 15.0, 4.0)
    value = named_arguments(inputs)[where] * sizes.astype(np.float32)[:, None, None]
    inputs = replaced(inputs, **{where: value})
    check_rows(apply(case, inputs), oracle(inputs), zeros=0)


@everywhere
def test_zero_and_negative_scales(case):
    inputs = all_local(40)
    rng = np.random.default_rng(7)
    scales = {
        name: value * rng.choice([-1.0, 0.0, 1.0], value.shape, p=[0.4, 0.2, 0.4]).astype("f4")
        for name, value in named_arrays(inputs).items()
        if name.endswith("_scale")
    }
    assert len(scales) == 3
    scales["hidden_states_scale"][:, 3] = 0
    scales["gemm2_weights_scale"][2] = 0
    inputs = replaced(inputs, **scales)
    expected = oracle(inputs)
    out = apply(case, inputs)
    assert not out[3].any()
    check_rows(out, expected, zeros=4)  # of three more tokens no block meets another


@everywhere
@pytest.mark.parametrize("size", [1e4, 1e15, 1e30])
def test_gates_far_from_zero(case, size):
    """The sigmoid saturates at 0 and 1: silu(-1e30) is zero, never inf * 0."""
    inputs = all_local(33)
    scale = inputs.weights.gemm1_weights_scale.copy()
    scale[:, 1:] *= np.float32(size)  # the gate is the second half
    scale[:, :1] /= np.float32(size)
    inputs = replaced(inputs, gemm1_weights_scale=scale)
    check_rows(apply(case, inputs), oracle(inputs), zeros=0)


@everywhere
def test_zeros_of_either_sign(case):
    inputs = all_local(20)
    x = inputs.hidden_states.copy()
    x[:10] = 0.0
    x[10:15] = -0.0
    x[15:18, :128] = -0.0
    inputs = inputs._replace(hidden_states=x)
    out = apply(case, inputs)
    assert not out[:15].any()
    check_rows(out, oracle(inputs), zeros=15)


@everywhere
def test_denormal_activations(case):
    """Every e4m3 number below 2^-6 is one: they count like any other."""
    inputs = all_local(16)
    rng = np.random.default_rng(3)
    x = (rng.integers(-7, 8, inputs.hidden_states.shape) * 2.0**-9).astype("f4")
    scale = np.full_like(inputs.hidden_states_scale, 2.0**7)
    inputs = inputs._replace(
        hidden_states=x.astype(inputs.hidden_states.dtype), hidden_states_scale=scale
    )
    check_rows(apply(case, inputs), oracle(inputs), zeros=0)


@everywhere
@pytest.mark.parametrize("factor", [0.0, -2.5, 1e-30, 1e30])
def test_factors_of_any_size(case, factor):
    inputs = all_local(33)._replace(routed_scaling_factor=factor)
    check_rows(apply(case, inputs), oracle(inputs), zeros=0 if factor else 33)


@everywhere
def test_unquantized_activations_of_any_size(case):
    """Rows from f32's denormals to 1e33, some with one value far above the rest.

    The first weights undo their size: rows below 2^-126 are the only zeros.
    """
    decades = np.arange(-45.0, 34.0)
    inputs = undoing(sent_to(nearest(decades)))
    x = np.random.default_rng(1).standard_normal((79, 256))
    x[::3, 7] *= 1e4
    x = (x * 10.0 ** decades[:, None]).astype(np.float32)
    values, scales = numpy_oracle.quantize(x)
    quantized = inputs._replace(hidden_states=values, hidden_states_scale=scales)
    inputs = inputs._replace(hidden_states=x, hidden_states_scale=None)
    out = apply(case, inputs, ONE_EXPERT)
    np.testing.assert_array_equal(bits(out), bits(apply(case, quantized, ONE_EXPERT)))
    check_rows(out, oracle(quantized, ONE_EXPERT), zeros=(np.abs(x) < TINY).all(axis=1).sum())
