"""Group-limited top-k: ids, weights, ties, NaN."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import DEEPSEEK_V3, MoEConfig
from tests import numpy_oracle
from tests.backend_cases import EVERYWHERE, running, slow
from tests.moe_inputs import SMALL, bits

CONFIGS = [
    (256, DEEPSEEK_V3),
    (32, SMALL),
    (16, MoEConfig(top_k=4, n_group=4, topk_group=2)),
    (64, MoEConfig(top_k=6, n_group=1, topk_group=1)),
    (72, MoEConfig(top_k=3, n_group=3, topk_group=2)),
    (128, MoEConfig(top_k=1, n_group=8, topk_group=1)),
    (16, MoEConfig(top_k=8, n_group=4, topk_group=2)),  # all that the kept groups hold
    (384, MoEConfig(top_k=8, n_group=1, topk_group=1)),
    (300, MoEConfig(top_k=10, n_group=6, topk_group=2)),
    (1024, MoEConfig(top_k=16, n_group=1, topk_group=1)),
    (1, MoEConfig(top_k=1)),
]


def route(case, logits, bias, factor=2.5, *, config=DEEPSEEK_V3):
    with running(case) as backend:
        routing = jax_moe.route(logits, bias, factor, config=config, backend=backend)
    return np.asarray(routing.topk_ids), np.asarray(routing.topk_weights)


def draw(num_tokens, num_experts, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((num_tokens, num_experts), np.float32)
    return logits, (rng.standard_normal(num_experts) / 10).astype(ml_dtypes.bfloat16)


# Two ulp of a group's score: a sum of two sigmoids and biases, it may lie in 2..4.
TWO_ULP = 2 * np.spacing(np.float32(2))


def assert_valid(ids, num_experts):
    assert (ids >= 0).all()
    assert (ids < num_experts).all()
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(), "an expert was chosen twice"


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(
    ("num_experts", "config", "num_tokens"),
    [
        *((*row, 1009) for row in CONFIGS),
        *((*CONFIGS[0], num_tokens) for num_tokens in (1, 67)),
        *(slow(*row, num_tokens) for row in CONFIGS[1:] for num_tokens in (1, 67)),
    ],
)
def test_against_float64(case, num_experts, config, num_tokens):
    logits, bias = draw(num_tokens, num_experts)
    ids, weights = route(case, logits, bias, config=config)
    expected_ids, expected_weights = numpy_oracle.route(logits, bias, 2.5, config)
    clear = numpy_oracle.routing_gaps(logits, bias, config) > TWO_ULP
    assert clear.mean() > 0.98
    np.testing.assert_array_equal(np.sort(ids)[clear], np.sort(expected_ids)[clear])
    weights, expected_weights = (
        np.take_along_axis(w, np.argsort(i), axis=1)[clear]
        for w, i in ((weights, ids), (expected_weights, expected_ids))
    )
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6)


@pytest.mark.parametrize("case", [*EVERYWHERE, "interpreted_mosaic"])
@pytest.mark.parametrize(("num_experts", "has_bias"), [(40, True), (40, False), (300, True)])
def test_lanes_past_the_last_expert_are_never_chosen(case, num_experts, has_bias):
    logits, _ = draw(4, num_experts)
    logits[:, -1] = 6  # the last expert is what such lanes read
    logits[:, 0] = 5  # or, were they not held back, the next token's first one
    config = MoEConfig(top_k=3, n_group=1, topk_group=1)
    bias = np.zeros(num_experts, np.float32) if has_bias else None
    ids, _ = route(case, logits, bias, config=config)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1)[:, :3])


@pytest.mark.parametrize("case", EVERYWHERE)
def test_ties_on_a_bf16_grid_go_to_the_lowest_id(case):
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((2003, 256)) * 0.656 - 1.67
    logits = np.round(logits * 16).astype(np.float32) / 16  # coarse: most tokens tie
    bias = np.where(np.arange(256) % 3 == 0, 0.25, 0.5).astype(ml_dtypes.bfloat16)
    ids, _ = route(case, logits, bias)
    expected, _ = numpy_oracle.route(logits, bias, 2.5, DEEPSEEK_V3)
    clear = numpy_oracle.routing_gaps(logits, bias, DEEPSEEK_V3) > TWO_ULP
    assert clear.mean() > 0.98
    np.testing.assert_array_equal(np.sort(ids)[clear], np.sort(expected)[clear])


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("logit", [0.0, 3.25, -1e4, 1e4])
def test_all_equal(case, logit):
    logits = np.full((5, 256), logit, np.float32)
    ids, weights = route(case, logits, np.zeros(256, ml_dtypes.bfloat16))
    np.testing.assert_array_equal(ids, np.tile(np.arange(8), (5, 1)))
    expected = 0.0 if logit == -1e4 else 2.5 / 8
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(("low", "high"), [(-80, -60), (-60, -40), (-48, -44), (60, 90)])
def test_weight_sums_near_zero(case, low, high):
    """The 1e-20 in the denominator is part of the definition: tiny scores give tiny weights."""
    logits = np.random.default_rng(0).uniform(low, high, (9, 256)).astype(np.float32)
    ids, weights = route(case, logits, np.zeros(256, ml_dtypes.bfloat16))
    assert_valid(ids, 256)
    scores = 1 / (1 + np.exp(-np.take_along_axis(logits, ids, axis=1).astype(np.float64)))
    expected = scores / (scores.sum(axis=1, keepdims=True) + 1e-20) * 2.5
    np.testing.assert_allclose(weights, expected, rtol=2e-6)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_a_tie_made_by_the_bias(case):
    logits = np.zeros((1, 256), np.float32)
    bias = np.zeros(256, ml_dtypes.bfloat16)
    bias[[40, 41, 200, 201]] = 1.0  # groups 1 and 6; the other groups tie
    ids, weights = route(case, logits, bias)
    assert sorted(ids[0]) == [0, 1, 2, 3, 40, 41, 200, 201]
    np.testing.assert_allclose(weights, 2.5 / 8, rtol=1e-6)  # the bias is not in the weights


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["one", "group", "all"])
def test_non_finite_logits_stay_in_their_row(case, poison, where):
    logits, bias = draw(9, 256)
    clean = route(case, logits, bias)
    poisoned = logits.copy()
    poisoned[4, {"one": 77, "group": slice(64, 96), "all": slice(None)}[where]] = poison
    ids, weights = route(case, poisoned, bias)
    assert_valid(ids, 256)
    others = np.arange(9) != 4
    np.testing.assert_array_equal(ids[others], clean[0][others])
    np.testing.assert_array_equal(bits(weights)[others], bits(clean[1])[others])
    chosen = poisoned[4][ids[4]]
    assert np.isnan(weights[4]).all() == np.isnan(chosen).any()
    assert np.isnan(weights[4]).any() == np.isnan(chosen).any()
    if where == "all" and np.isnan(poison):
        np.testing.assert_array_equal(ids[4], np.arange(8))
    elif np.isnan(poison):
        assert not np.isnan(chosen).any(), "a NaN was chosen before a number"


@pytest.mark.parametrize("case", EVERYWHERE)
def test_nan_ranks_below_minus_infinity(case):
    config = MoEConfig(top_k=3, n_group=1, topk_group=1)
    bias = np.array([np.nan, -np.inf, -1e30, np.nan, -np.inf, np.nan], np.float32)
    ids, weights = route(case, np.zeros((1, 6), np.float32), bias, config=config)
    np.testing.assert_array_equal(ids, [[2, 1, 4]])
    np.testing.assert_allclose(weights, 2.5 / 3, rtol=1e-6)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30])
@pytest.mark.parametrize("where", [slice(5, 6), slice(0, 32), slice(None)])
def test_extreme_bias_never_reaches_the_weights(case, value, where):
    logits, bias = draw(33, 256)
    bias = bias.astype(np.float32)
    bias[where] = value
    ids, weights = route(case, logits, bias)
    assert_valid(ids, 256)
    np.testing.assert_allclose(weights.sum(axis=1), 2.5, rtol=1e-5)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("factor", [1, 0.0, -2.5, np.float32(1e-6), np.float64(1e20)])
def test_the_factor_scales_the_weights(case, factor):
    logits, bias = draw(5, 256)
    plain = route(case, logits, bias, 1.0)
    ids, weights = route(case, logits, bias, factor)
    np.testing.assert_array_equal(ids, plain[0])
    np.testing.assert_allclose(weights, plain[1] * np.float32(factor), rtol=1e-6)


SCORINGS = ["sigmoid", "softmax", "sqrtsoftplus"]


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(
    ("scoring", "has_bias"),
    [
        ("sigmoid", False),
        ("softmax", True),
        ("sqrtsoftplus", False),
        slow("sigmoid", True),
        slow("softmax", False),
        slow("sqrtsoftplus", True),
    ],
)
def test_other_scores_against_float64(case, scoring, has_bias):
    for num_experts, groups, renormalize in ((128, (8, 3), True), (96, (1, 1), False)):
        config = MoEConfig(6, *groups, scoring=scoring, renormalize=renormalize)
        logits, bias = draw(257, num_experts)
        logits, bias = logits * 3, bias / 16 if has_bias else None  # some softmax scores are alike
        ids, weights = route(case, logits, bias, config=config)
        expected_ids, expected_weights = numpy_oracle.route(logits, bias, 2.5, config)
        clear = numpy_oracle.routing_gaps(logits, bias, config) > TWO_ULP
        assert clear.mean() > 0.98
        np.testing.assert_array_equal(ids[clear], expected_ids[clear])
        np.testing.assert_allclose(weights[clear], expected_weights[clear], rtol=3e-6)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels run for real there")
@pytest.mark.parametrize(
    ("scoring", "has_bias", "num_experts", "groups"),
    [
        slow("softmax", False, 72, (3, 2)),
        slow("softmax", True, 300, (1, 1)),
        slow("sigmoid", False, 288, (4, 2)),
        ("sqrtsoftplus", True, 16, (4, 3)),
    ],
)
def test_the_interpreted_kernel_gives_the_ids_of_the_plain_backend(
    scoring, has_bias, num_experts, groups
):
    config = MoEConfig(3, *groups, scoring=scoring, renormalize=has_bias)
    logits, bias = draw(7, num_experts)
    logits[0] = np.round(logits[0] * 8) / 8  # ties
    logits[1, 1::2], logits[2], logits[3, :3] = np.nan, np.nan, np.inf
    logits[4] *= np.float32(1e-40)
    group = num_experts // groups[0]
    logits[5, :group], logits[5, 1] = np.nan, 9  # its group's sum is no number
    if groups[0] == 4:  # sums of groups, without scores: -2^-127, which is 0, 0, 3 and 3
        logits[6], tiny = -np.inf, 2.0**-126
        bias[8:] = -abs(bias[8:])
        bias[:8] = [tiny, -1.5 * tiny, -1, -1, 0, 0, -1, -1]
        bias[[8, 12]] = 3
    ids, weights = route("interpreted_mosaic", logits, bias if has_bias else None, config=config)
    expected = route("xla", logits, bias if has_bias else None, config=config)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(weights, expected[1], rtol=1e-6)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_without_a_bias_logits_are_compared_and_not_their_rounded_scores(case, scoring):
    config = MoEConfig(3, scoring=scoring)
    logits = np.full((1, 64), -50, np.float32)
    logits[0, [7, 9, 40, 50]] = [30, 40, 35, 30]  # all sigmoids are 1
    logits[0, [3, 4]] = [0, -0.0]
    ids, _ = route(case, logits, None, config=config)
    np.testing.assert_array_equal(ids, [[9, 40, 7]])
    logits[0, [7, 9, 40, 50]] = -50
    ids, _ = route(case, logits, None, config=config)
    np.testing.assert_array_equal(ids, [[3, 4, 0]])  # -0 and 0 tie
    if scoring == "sigmoid":
        logits[0, [7, 9, 40, 50]] = [30, 40, 35, 30]
        ids, _ = route(case, logits, np.zeros(64, np.float32), config=config)
        np.testing.assert_array_equal(ids, [[7, 9, 40]])


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_logits_of_half_the_width_are_used_as_float32(case, dtype):
    logits, bias = draw(33, 256)
    logits = logits.astype(dtype)
    ids, weights = route(case, logits, bias)
    expected = route(case, logits.astype(np.float32), bias)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(bits(weights), bits(expected[1]))


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("scoring", ["softmax", "sqrtsoftplus"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_nan_and_infinite_logits_of_other_scores(case, scoring, has_bias):
    config = MoEConfig(2, scoring=scoring)
    nan, inf = np.nan, np.inf
    rows = [[1, nan, 2, 0], [nan, nan, nan, 1], [-inf, 3, -inf, -inf], [inf, 3, 2, 1], [nan] * 4]
    bias = np.zeros(4, np.float32) if has_bias else None
    ids, weights = route(case, np.array(rows, np.float32), bias, 1.0, config=config)
    np.testing.assert_array_equal(ids, [[2, 0], [3, 0], [1, 0], [0, 1], [0, 1]])
    np.testing.assert_allclose(weights[0].sum(), 1, rtol=1e-6)
    assert np.isnan(weights[[1, 4]]).all()
    np.testing.assert_allclose(weights[2], [1, 0], rtol=1e-6)
    if scoring == "softmax":
        np.testing.assert_allclose(weights[3], [1, 0], rtol=1e-6)
    else:
        assert np.isnan(weights[3, 0])
