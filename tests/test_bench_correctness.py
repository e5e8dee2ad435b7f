"""The two matched ratios, the relative error, and what is wrong whatever the ratio."""

import jax.numpy as jnp
import numpy as np
import pytest

from bench.correctness import Check, Tolerance, check

BF16 = jnp.bfloat16


def as_bf16(values):
    return jnp.asarray(values, BF16)


def test_ratios_follow_the_published_formulas():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((50, 256)).astype(np.float32)
    output = reference + 0.2 * rng.standard_normal(reference.shape).astype(np.float32)
    x, y = as_bf16(output), as_bf16(reference)
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    d = np.abs(a - b)
    found = check(x, y, Tolerance(rtol=0.2, atol=0.1, required_matched_ratio=0.5))
    fails = (d > 0.1) & (d / (np.abs(b) + 1e-8) > 0.2)
    assert found.matched_ratio == pytest.approx(1 - fails.mean(), abs=1e-6)
    assert found.matched_ratio_sum == pytest.approx((d <= 0.1 + 0.2 * np.abs(b)).mean(), abs=1e-6)
    assert found.matched_ratio < found.matched_ratio_sum < 1
    expected = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert found.relative_error == pytest.approx(expected, rel=1e-5)
    assert found.problem is None
    strict = check(x, y, Tolerance(required_matched_ratio=found.matched_ratio + 0.01))
    assert strict.problem is not None
    assert "is below" in strict.problem


def test_a_share_that_equals_the_required_one_is_right():
    reference = jnp.ones((4, 5), BF16)
    output = reference.at[0].set(3)
    assert check(output, reference, Tolerance(required_matched_ratio=0.75)).problem is None
    assert check(reference, reference, Tolerance(0, 0, 1.0)).problem is None
    found = check(output, reference, Tolerance(required_matched_ratio=0.7501))
    assert found.problem == "matched ratio 0.7500 is below 0.7501"


def test_equal_outputs_match_exactly_also_where_the_reference_is_zero():
    zero = jnp.zeros((3, 256), BF16)
    assert check(zero, zero, Tolerance()) == Check(1.0, 1.0, 0.0, None)
    assert check(zero + 1, zero, Tolerance()).relative_error == float("inf")
    empty = jnp.zeros((0, 256), BF16)
    assert check(empty, empty, Tolerance()) == Check(1.0, 1.0, 0.0, None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_wrong(value):
    reference = jnp.ones((100, 256), BF16)
    found = check(reference.at[3, 5].set(value), reference, Tolerance())
    assert found.problem == "output holds Inf or NaN"
    assert found.matched_ratio == pytest.approx(1 - 1 / 25600, abs=1e-6)


def test_wrong_shape_and_dtype_are_wrong():
    reference = jnp.ones((4, 256), BF16)
    for output, said in (
        (reference[:3], "wrong shape: expected (4, 256), got (3, 256)"),
        (reference.astype("float32"), "wrong dtype: expected bfloat16, got float32"),
    ):
        assert check(output, reference, Tolerance()) == Check(0.0, 0.0, float("inf"), said)


def test_a_row_is_as_good_as_its_worst_trial():
    good, bad = Check(0.99, 0.98, 0.01, None), Check(0.5, 0.999, 0.4, "too far")
    assert good.worse(bad) == bad.worse(good) == Check(0.5, 0.98, 0.4, "too far")
