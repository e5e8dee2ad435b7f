"""FP8 group quantization: every backend gives the bits of the NumPy oracle."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import jax_moe
from tests import numpy_oracle
from tests.backend_cases import EVERYWHERE, running, slow
from tests.moe_inputs import bits

TINY = float(np.finfo(np.float32).tiny)


def check(case: str, x: np.ndarray, scale_format: str = "f32") -> jax_moe.Quantized:
    with running(case) as backend:
        found = jax_moe.quantize(x, scale_format=scale_format, backend=backend)
    for part, expected in zip(found, numpy_oracle.quantize(x, scale_format), strict=True):
        is_nan = np.isnan(expected.astype(np.float32))  # of which there are many
        np.testing.assert_array_equal(np.isnan(np.asarray(part, np.float32)), is_nan)
        np.testing.assert_array_equal(bits(part)[~is_nan], bits(expected)[~is_nan])
    return found


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        *((np.float32, rows) for rows in (1, 2, 7, 130)),
        *((dtype, rows) for dtype in (ml_dtypes.bfloat16, np.float16) for rows in (1, 130)),
        *(slow(dtype, rows) for dtype in (ml_dtypes.bfloat16, np.float16) for rows in (2, 7)),
    ],
)
def test_bits_equal_numpy(case, dtype, rows):
    x = np.random.default_rng(rows).standard_normal((rows, 384)).astype(dtype)
    check(case, x)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_bits_equal_numpy_over_the_whole_range_of_f32(case):
    rng = np.random.default_rng(0)
    exponents = rng.integers(-126, 127, (512, 1)) + rng.integers(-10, 1, (512, 256))
    x = np.ldexp(rng.uniform(-2, 2, (512, 256)), exponents).astype(np.float32)
    check(case, x)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_every_e4m3_number_survives_a_scale_of_one(case):
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    numbers = numbers[np.isfinite(numbers.astype(np.float32))].astype(np.float32)
    x = np.zeros((1, 256), np.float32)
    x[0, :127], x[0, 128:255] = numbers[:127], numbers[127:]  # both halves hold a 448
    found = check(case, x)
    np.testing.assert_array_equal(found.scales, np.ones((2, 1), np.float32))
    np.testing.assert_array_equal(np.asarray(found.values, np.float32), x)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(
    "edge",
    [447.9, 448.0, 464.0, 465.0, 1e30, 3.4e38, 1e-30, TINY, -TINY, TINY / 2, 1e-45, -0.0, 0.0],
)
def test_edges_stay_finite(case, edge):
    x = np.zeros((3, 128), np.float32)
    x[0, :3], x[1, 5], x[2] = (edge, 1.0, -448.0), edge, edge
    found = check(case, x)
    assert np.isfinite(np.asarray(found.values, np.float32)).all()
    assert (np.asarray(found.scales) >= TINY).all()


@pytest.mark.parametrize("case", EVERYWHERE)
def test_denormals_and_zeros_are_zero_and_the_scale_has_a_floor(case):
    x = np.array([[0.0], [-0.0], [1e-40], [-TINY / 2]], np.float32).repeat(128, axis=1)
    found = check(case, x)
    assert not bits(found.values).any()
    np.testing.assert_array_equal(found.scales, np.full((1, 4), TINY, np.float32))


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_group(case, poison):
    x = np.random.default_rng(1).standard_normal((5, 384)).astype(np.float32)
    clean = numpy_oracle.quantize(x)
    x[2, 200] = poison
    with running(case) as backend:
        values, scales = map(np.asarray, jax_moe.quantize(x, backend=backend))
    with np.errstate(invalid="ignore"):
        dequantized = values.astype(np.float32).reshape(5, 3, 128) * scales.T[:, :, None]
    assert np.isnan(dequantized[2, 1]).all()
    values, scales = values.copy(), scales.copy()
    values[2, 128:256], scales[1, 2] = clean[0][2, 128:256], clean[1][1, 2]
    np.testing.assert_array_equal(bits(values), bits(clean[0]))
    np.testing.assert_array_equal(bits(scales), bits(clean[1]))


@pytest.mark.parametrize("case", EVERYWHERE)
def test_no_nan_is_dropped_among_many_rows(case):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1003, 256)).astype(np.float32)
    poisoned = rng.random(x.shape) < 0.003
    x[poisoned] = rng.choice([np.nan, np.inf, -np.inf], poisoned.sum())
    with running(case) as backend:
        values, scales = map(np.asarray, jax_moe.quantize(x, backend=backend))
    expected_values, expected_scales = numpy_oracle.quantize(x)
    np.testing.assert_array_equal(scales, expected_scales)
    finite = np.isfinite(expected_scales).T.repeat(128, axis=1)
    np.testing.assert_array_equal(bits(values)[finite], bits(expected_values)[finite])
    with np.errstate(invalid="ignore"):
        dequantized = values.astype(np.float32) * scales.T.repeat(128, axis=1)
    np.testing.assert_array_equal(np.isnan(dequantized), ~finite)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_powers_of_two_are_rounded_up_and_exact(case):
    rng = np.random.default_rng(4)
    exponents = rng.integers(-126, 127, (512, 1)) + rng.integers(-10, 1, (512, 256))
    x = np.ldexp(rng.uniform(-2, 2, (512, 256)), exponents).astype(np.float32)
    x[0, :128], x[1, :128], x[2, :128] = 448, 448 * (1 + 2**-20), 448 * (1 - 2**-20)
    x[3], x[4, 5], x[5, 200] = 0, np.nan, np.inf
    found = check(case, x, "ue8m0")
    mantissas = np.frexp(np.asarray(found.scales)[:, np.r_[0:4, 6:512]])[0]
    assert (mantissas == 0.5).all()
    np.testing.assert_array_equal(np.asarray(found.scales)[0, :4], [1, 2, 1, TINY])
    assert np.isnan(found.scales[0, 4])
    assert np.isinf(found.scales[1, 5])
    as_bytes = np.asarray(found.scales).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert (np.isnan(as_bytes) == ~np.isfinite(found.scales)).all()
    finite = np.isfinite(found.scales)
    np.testing.assert_array_equal(as_bytes[finite], np.asarray(found.scales)[finite])


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_powers_of_two_of_every_dtype(case, dtype):
    check(case, np.random.default_rng(7).standard_normal((7, 384)).astype(dtype), "ue8m0")
