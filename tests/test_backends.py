"""The whole layer on every backend: right, isolated, repeatable."""

from __future__ import annotations

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import DEEPSEEK_V3, MoEConfig
from tests import numpy_oracle
from tests.backend_cases import EVERYWHERE, running, slow
from tests.moe_inputs import (
    E4M3,
    SMALL,
    bits,
    logits_for,
    make_inputs,
    named_arguments,
    on_device,
    relative_error,
    replaced,
)

TO_ORACLE = 0.03  # e4m3 between the matmuls
# A few values round to the neighbour; `mosaic` stages C in bf16, which makes them a few percent.
TO_REQUANTIZING_ORACLE = {"xla": 0.004, "triton": 0.006, "mosaic": 0.02}
PLAIN = MoEConfig(top_k=4, n_group=1, topk_group=1)


def apply(case, inputs, config=SMALL):
    with running(case) as backend:
        return jax_moe.apply(*inputs.arguments, config=config, backend=backend)


def check(case, inputs, config=SMALL):
    out = apply(case, inputs, config)
    assert out.dtype == jax.numpy.bfloat16
    assert out.shape == inputs.hidden_states.shape
    with np.errstate(over="ignore"):
        expected = numpy_oracle.layer(*inputs.arguments, config=config)
        requantized = numpy_oracle.layer(*inputs.arguments, config=config, requantize=True)
    is_zero = (expected == 0).all(axis=1)
    assert not bits(out)[is_zero].any(), "a token without a local expert must be exactly zero"
    if not is_zero.all():
        bound = TO_REQUANTIZING_ORACLE[case.removeprefix("interpreted_")]
        assert relative_error(out, expected) < TO_ORACLE
        assert relative_error(out, requantized) < bound
    return out


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("num_tokens", [1, slow(2), 7, 63, 64, 65, 601])
def test_token_counts(case, num_tokens):
    check(case, make_inputs(num_tokens))


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (DEEPSEEK_V3, {"num_experts": 256, "num_local_experts": 32, "offset": 96}),
        slow(DEEPSEEK_V3, {"num_experts": 256, "num_local_experts": 5, "offset": 251}),
        (MoEConfig(2, 1, 1), {"num_experts": 9, "num_local_experts": 9, "offset": 0}),
        slow(SMALL, {"hidden_size": 384, "intermediate_size": 256}),
    ],
)
def test_other_sizes(case, config, shape):
    check(case, make_inputs(61, **shape), config)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_unquantized_hidden_states_equal_quantizing_first(case, dtype):
    inputs = make_inputs(61)
    x = np.random.default_rng(5).standard_normal((61, 256)).astype(dtype)
    values, scales = numpy_oracle.quantize(x)
    first = apply(case, inputs._replace(hidden_states=values, hidden_states_scale=scales))
    inside = apply(case, inputs._replace(hidden_states=x, hidden_states_scale=None))
    np.testing.assert_array_equal(bits(inside), bits(first))


@pytest.mark.parametrize("case", EVERYWHERE)
def test_no_token(case):
    out = apply(case, make_inputs(0))
    assert out.shape == (0, 256)
    assert out.dtype == jax.numpy.bfloat16


@pytest.mark.parametrize("case", EVERYWHERE)
def test_no_local_token(case):
    inputs = make_inputs(64)
    bias = np.zeros(32, ml_dtypes.bfloat16)
    bias[[0, 1, 2, 3]] = 10
    assert not bits(apply(case, inputs._replace(routing_bias=bias))).any()


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("counts", [(62, 63, 64), (65, 66, 126, 127, 128), (129, 130, 256)])
def test_all_tokens_to_the_same_experts(case, counts):
    """Groups of exactly a tile's height, and one or two more or less."""
    bias = np.zeros(32, ml_dtypes.bfloat16)
    bias[[8, 9, 14, 15]] = 10
    for num_tokens in counts:
        check(case, make_inputs(num_tokens)._replace(routing_bias=bias))


ONE_EACH = [(expert,) for expert in range(8)]
PATTERNS = [p for size in range(2, 9) for p in itertools.combinations(range(8), size)]


def check_patterns(case, patterns, num_tokens):
    """Token t of a pattern goes to its (t mod n)-th expert: the bits of that expert alone."""
    inputs = on_device(make_inputs(num_tokens, num_experts=12, offset=0))
    config = MoEConfig(1, 1, 1)
    tokens = np.arange(num_tokens)
    with running(case) as backend:
        run = jax.jit(
            lambda logits: jax_moe.apply(
                *inputs._replace(routing_logits=logits).arguments, config=config, backend=backend
            )
        )

        def taken_by(experts):
            return bits(run(logits_for(np.resize(experts, num_tokens)[:, None], 12, 1)))

        alone = np.stack([taken_by(expert) for expert in ONE_EACH])
        assert not taken_by((11,)).any(), "no expert has a token: the 256th pattern"
        for pattern in patterns:
            expected = alone[np.resize(pattern, num_tokens), tokens]
            np.testing.assert_array_equal(taken_by(pattern), expected, err_msg=str(pattern))
    mixed = logits_for(tokens[:, None] % 8, 12, 1)
    expected = numpy_oracle.layer(*inputs._replace(routing_logits=mixed).arguments, config=config)
    out = alone[tokens % 8, tokens].view(ml_dtypes.bfloat16)
    assert relative_error(out, expected) < TO_ORACLE


@pytest.mark.parametrize("case", EVERYWHERE)
def test_every_pattern_of_empty_experts(case):
    """All 256 of 8 local experts."""
    assert len(ONE_EACH) + len(PATTERNS) + 1 == 256
    check_patterns(case, PATTERNS, num_tokens=24)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="all patterns run for real there")
@pytest.mark.slow
def test_patterns_of_empty_experts_in_the_interpreter():
    check_patterns("interpreted_mosaic", PATTERNS[3::38], num_tokens=9)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_a_distinct_scale_everywhere_is_exact(case):
    """Powers of two all along, so that a scale of the wrong row or block shows in the bits.

    Each row and block has one non-zero element. The gate is large, so silu is the identity.
    """
    rng = np.random.default_rng(0)
    tokens, hidden, intermediate, experts = 40, 512, 256, 4
    blocks = hidden // 128

    def power(*shape, low=-3, high=4):
        return np.exp2(rng.integers(low, high, shape)).astype(np.float32)

    x = np.zeros((tokens, hidden), E4M3)
    pick = rng.integers(0, blocks, tokens)  # the one block of a row that is not zero
    x[np.arange(tokens), pick * 128 + rng.integers(0, 128, tokens)] = 1
    w13 = np.ones((experts, 2 * intermediate, hidden), E4M3)
    s13 = power(experts, 2 * intermediate // 128, blocks)
    s13[:, intermediate // 128 :] = 2.0**7  # the gate: 2^7 times an activation scale of 2^2 up
    w2 = np.zeros((experts, hidden, intermediate), E4M3)
    columns = rng.integers(0, intermediate, (experts, hidden))
    np.put_along_axis(w2, columns[:, :, None], np.ones((experts, hidden, 1), E4M3), axis=2)
    s2 = power(experts, blocks, intermediate // 128)
    x_scale = power(blocks, tokens, low=2)
    choices = np.stack([np.arange(tokens) % 4, np.arange(tokens) % 4 + 4], axis=1)
    logits = np.full((tokens, 8), -200, np.float32)
    np.put_along_axis(logits, choices, np.float32(50), axis=1)  # both sigmoids are 1
    out = apply(
        case,
        jax_moe.LayerInputs.of(
            logits, np.zeros(8, np.float32), x, x_scale, w13, s13, w2, s2, 0, 2.0
        ),
        MoEConfig(2, 1, 1),
    )
    token, expert = np.arange(tokens), choices[:, 0]
    scale = x_scale[pick, token]
    up = scale[:, None] * s13[expert, : intermediate // 128, pick]
    hidden_blocks = up * (scale * 2.0**7)[:, None]  # [T, I/128]
    column_block = columns[expert] // 128  # [T, H]
    expected = np.take_along_axis(hidden_blocks, column_block, axis=1)
    expected *= s2[expert[:, None], np.arange(hidden) // 128, column_block]
    np.testing.assert_array_equal(np.asarray(out, np.float32), expected)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["hidden_states", "hidden_states_scale", "routing_logits"])
def test_poison_in_one_token_stays_there(case, poison, where):
    inputs = make_inputs(70)
    clean = bits(apply(case, inputs))
    victim = int(np.flatnonzero(clean.any(axis=1))[3])
    value = named_arguments(inputs)[where].copy()
    if where == "hidden_states":
        value[victim, 7] = np.nan  # e4m3 has no infinity
    elif where == "hidden_states_scale":
        value[1, victim] = poison
    else:
        value[victim] = poison
    out = apply(case, replaced(inputs, **{where: value}))
    others = np.arange(70) != victim
    np.testing.assert_array_equal(bits(out)[others], clean[others])
    if where != "routing_logits":
        assert np.isnan(np.asarray(out, np.float32)[victim]).all()


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("poison", [np.nan, np.inf, 0.0, -1.0, 3e38])
@pytest.mark.parametrize("where", ["gemm1_weights_scale", "gemm2_weights_scale"])
def test_poison_in_one_expert_reaches_its_tokens_only(case, poison, where):
    inputs = make_inputs(70)
    clean = bits(apply(case, inputs))
    value = named_arguments(inputs)[where].copy()
    value[3] = poison
    out = bits(apply(case, replaced(inputs, **{where: value})))
    ids, _ = numpy_oracle.route(inputs.routing_logits, inputs.routing_bias, 2.5, SMALL)
    routed = (ids == inputs.local_expert_offset + 3).any(axis=1)
    assert routed.any()
    np.testing.assert_array_equal(out[~routed], clean[~routed])
    assert (out[routed] != clean[routed]).any(axis=1).all()
    if np.isnan(poison):
        assert np.isnan(out[routed].view(ml_dtypes.bfloat16).astype(np.float32)).all()


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("where", ["gemm1_weights", "gemm2_weights"])
def test_one_nan_weight_reaches_the_tokens_of_its_expert_only(case, where):
    inputs = make_inputs(70)
    clean = bits(apply(case, inputs))
    value = named_arguments(inputs)[where].copy()
    value[3, 5, 11] = np.nan
    out = apply(case, replaced(inputs, **{where: value}))
    ids, _ = numpy_oracle.route(inputs.routing_logits, inputs.routing_bias, 2.5, SMALL)
    routed = (ids == inputs.local_expert_offset + 3).any(axis=1)
    np.testing.assert_array_equal(bits(out)[~routed], clean[~routed])
    spread = np.isnan(np.asarray(out, np.float32)).mean(axis=1)
    # One row of gemm2_weights makes one output; one of gemm1_weights spoils a block, so all.
    np.testing.assert_array_equal(spread, routed * (1.0 if where == "gemm1_weights" else 1 / 256))


@pytest.mark.parametrize("case", EVERYWHERE)
def test_unselected_experts_are_never_read_into_a_result(case):
    inputs = make_inputs(5)
    clean = bits(apply(case, inputs))
    ids, _ = numpy_oracle.route(inputs.routing_logits, inputs.routing_bias, 2.5, SMALL)
    unused = ~np.isin(np.arange(8) + inputs.local_expert_offset, ids)
    assert 0 < unused.sum() < 8
    poisoned = {}
    for name, value in inputs.weights._asdict().items():
        poisoned[name] = value.copy()
        poisoned[name][unused] = np.nan
    np.testing.assert_array_equal(bits(apply(case, replaced(inputs, **poisoned))), clean)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(
    ("size", "gate"),
    [(1e-30, 1.0), (1e-16, 1e-16), (1e-10, 1e-10), (1e-5, 1e5), (1e15, 1e15), (1e30, 1.0)],
)
def test_activation_scales_of_any_size(case, size, gate):
    """The gate's own weights bring it to `gate`, the second weights every result to order one."""
    inputs = make_inputs(33)
    w13_scale = inputs.weights.gemm1_weights_scale.copy()
    w13_scale[:, 1:] *= np.float32(gate / size)  # the gate is the second half
    inputs = replaced(
        inputs,
        hidden_states_scale=inputs.hidden_states_scale * np.float32(size),
        gemm1_weights_scale=w13_scale,
        gemm2_weights_scale=inputs.weights.gemm2_weights_scale / np.float32(size * gate),
    )
    found = np.asarray(apply(case, inputs), np.float64)
    expected = np.asarray(jax_moe.reference(*inputs.arguments, config=SMALL), np.float64)
    assert np.isfinite(found).all()
    assert np.isfinite(expected).all()
    norm = np.linalg.norm(expected, axis=1)
    local = norm > 0
    assert local.sum() == 19
    assert (norm[local] > 1).all()
    assert not found[~local].any()
    # Of each row's norm; few rows, so that one exceeds the bound on all of them.
    assert (np.linalg.norm(found - expected, axis=1) <= 2 * TO_ORACLE * norm).all()
    assert relative_error(found, expected) < TO_ORACLE


@pytest.mark.parametrize("case", EVERYWHERE)
def test_repeats_bit_for_bit_whatever_ran_in_between(case):
    small, large = on_device(make_inputs(5)), on_device(make_inputs(120, seed=1))
    poisoned = large._replace(hidden_states_scale=np.full((2, 120), np.nan, np.float32))
    first = [bits(apply(case, inputs)) for inputs in (small, large)]
    for _ in range(3):
        apply(case, poisoned)
        again = [bits(apply(case, inputs)) for inputs in (small, large)]
        np.testing.assert_array_equal(again[0], first[0])
        np.testing.assert_array_equal(again[1], first[1])


@pytest.mark.parametrize("case", EVERYWHERE)
def test_stages_compose_to_the_layer(case):
    inputs = make_inputs(64)
    logits, bias, x, x_scale, w13, s13, w2, s2, offset, factor = inputs.arguments
    with running(case) as backend:
        routing = jax_moe.route(logits, bias, factor, config=SMALL, backend=backend)
        plan = jax_moe.plan_groups(
            routing.topk_ids, offset, num_local_experts=8, num_experts=32, backend=backend
        )
        activations = jax_moe.up_project(x, x_scale, w13, s13, plan, backend=backend)
        expert_outputs = jax_moe.down_project(activations, w2, s2, plan, backend=backend)
        out = jax_moe.unpermute(expert_outputs, routing.topk_weights, plan, backend=backend)
        whole = jax_moe.apply(*inputs.arguments, config=SMALL, backend=backend)
    np.testing.assert_array_equal(bits(out), bits(whole))


@pytest.mark.parametrize("case", EVERYWHERE)
def test_padding_rows_are_never_read_into_a_result(case):
    """Between the stages all rows that no pair owns are filled with NaN."""
    inputs = make_inputs(64)
    logits, bias, x, x_scale, w13, s13, w2, s2, offset, factor = inputs.arguments
    with running(case) as backend:
        expected = jax_moe.apply(*inputs.arguments, config=SMALL, backend=backend)
        routing = jax_moe.route(logits, bias, factor, config=SMALL, backend=backend)
        plan = jax_moe.plan_groups(
            routing.topk_ids, offset, num_local_experts=8, num_experts=32, backend=backend
        )
        padding = np.asarray(plan.row_token) < 0

        def poison(leaf):
            leaf = np.asarray(leaf).copy()
            rows = leaf.shape.index(len(padding))
            np.moveaxis(leaf, rows, 0)[padding] = np.nan
            return jax.numpy.asarray(leaf)

        activations = jax_moe.up_project(x, x_scale, w13, s13, plan, backend=backend)
        activations = jax.tree.map(poison, activations)
        expert_outputs = jax_moe.down_project(activations, w2, s2, plan, backend=backend)
        expert_outputs = jax.tree.map(poison, expert_outputs)
        out = jax_moe.unpermute(expert_outputs, routing.topk_weights, plan, backend=backend)
    assert padding.any()
    assert padding[-1]
    np.testing.assert_array_equal(bits(out), bits(expected))
