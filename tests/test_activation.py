"""Between the matmuls: the clamp, the activation and its requantization, on every backend."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import jax_moe
from tests import numpy_oracle
from tests.backend_cases import EVERYWHERE, running
from tests.moe_inputs import E4M3, bits

LIMIT = 24.0
GROUP_SIZES = (140, 9, 51)  # of three experts: whole tiles of every height and narrow ones
# Rows that an expert is likely to get choose the height of tiles: all heights of the kernels.
TILES = [
    ("xla", 40),
    *(
        pytest.param(backend, rows, marks=pytest.mark.gpu)
        for backend in ("mosaic", "triton")
        for rows in (1, 12, 40, 1000)
    ),
]


def up_project(case, x, weights, scales, experts, *, expected_rows=None, **options):
    """The stage on rows `x` of scale 1, each for one of the experts; in the order of `x`."""
    counts = {"num_local_experts": len(weights), "num_experts": len(weights)}
    ids = np.asarray(experts, np.int32)[:, None]
    x_scale = np.ones((x.shape[1] // 128, len(x)), np.float32)
    with running(case) as backend:
        plan = jax_moe.plan_groups(ids, 0, **counts, expected_rows=expected_rows, backend=backend)
        arrays = x.astype(E4M3), x_scale, weights, scales
        found = jax_moe.up_project(*arrays, plan, **options, backend=backend)
    rows = np.asarray(plan.pair_row)[:, 0]
    return np.asarray(found.values)[rows], np.asarray(found.scales)[:, rows]


def exact_case(seed):
    """Rows that pick columns of weights, with gates so large that their sigmoid is 1 in float32.

    So the activation is a product of integers. With the limit it fits bf16, too.
    """
    rng = np.random.default_rng(seed)
    up = rng.choice([-40, -32, -26, -24, -15, -9, -2, 0, 1, 7, 13, 22, 30, 36], (3, 256, 256))
    up[:, :128, :16] = 0  # blocks of zeros
    up[:, :128, 16:32] //= 16
    gate = rng.choice([20, 24, 26, 40], (3, 256, 256))
    weights = np.concatenate([up, gate], axis=1).astype(E4M3)
    experts = rng.permutation(np.repeat(np.arange(3), GROUP_SIZES))
    picked = rng.integers(0, 256, len(experts))
    x = np.zeros((len(experts), 256), np.float32)
    x[np.arange(len(experts)), picked] = 1
    halves = (half[experts, :, picked].astype(np.float32) for half in (up, gate))
    return x, weights, np.ones((3, 4, 2), np.float32), experts, *halves


@pytest.mark.parametrize(("case", "expected_rows"), TILES)
def test_what_does_not_round_has_the_bits_of_numpy(case, expected_rows):
    *arrays, up, gate = exact_case(expected_rows)
    options = {"swiglu_limit": LIMIT, "scale_format": "ue8m0", "expected_rows": expected_rows}
    found = up_project(case, *arrays, **options)
    activation = np.minimum(gate, LIMIT) * np.clip(up, -LIMIT, LIMIT)
    assert (activation.astype(ml_dtypes.bfloat16) == activation).all()
    for part, expected in zip(found, numpy_oracle.quantize(activation, "ue8m0"), strict=True):
        np.testing.assert_array_equal(bits(part), bits(expected))


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(
    "options", [{}, {"swiglu_limit": LIMIT}, {"scale_format": "ue8m0"}], ids=str
)
def test_each_option_by_itself(case, options):
    *arrays, up, gate = exact_case(5)
    values, scales = up_project(case, *arrays, **options)
    limit = options.get("swiglu_limit", np.inf)
    activation = np.minimum(gate, limit) * np.clip(up, -limit, limit)
    expected_values, expected_scales = numpy_oracle.quantize(
        activation.astype(np.float32), options.get("scale_format", "f32")
    )
    np.testing.assert_allclose(scales, expected_scales, rtol=0.005)  # bf16 before the amax
    found, expected = (v.astype(np.float32) for v in (values, expected_values))
    assert (np.abs(found - expected) <= np.abs(expected) / 8 + 2**-9).all(), "one step of e4m3"
    assert (found == expected).mean() > 0.9


@pytest.mark.parametrize("case", EVERYWHERE)
def test_a_clamp_acts_before_the_activation(case):
    """One expert of one block whose gate and up half are known: the rows of x pick its columns."""
    weights = np.zeros((1, 256, 128), E4M3)
    weights[0, 0, :3] = [-8, 8, 2]  # up
    weights[0, 128, :3] = [8, -8, 2]  # gate
    values, scales = up_project(
        case, np.eye(3, 128), weights, np.ones((1, 2, 1), np.float32), [0] * 3, swiglu_limit=4.0
    )
    silu = [g / (1 + np.exp(-g)) for g in (4.0, -8.0, 2.0)]
    expected = [-4 * silu[0], 4 * silu[1], 2 * silu[2]]
    found = values[:, 0].astype(np.float32) * scales[0]
    rtol = 2**-8 if case == "mosaic" else 1e-6  # it rounds to bf16 before
    np.testing.assert_allclose(found, expected, rtol=rtol)


@pytest.mark.parametrize(("case", "expected_rows"), TILES)
def test_a_clamp_keeps_nan(case, expected_rows):
    """NaN in the gate of one expert, in the other half of another, and in a row of a third."""
    x, weights, scales, experts, *_ = exact_case(6)
    options = {"swiglu_limit": LIMIT, "expected_rows": expected_rows}
    clean = up_project(case, x, weights, scales, experts, **options)
    scales[0, 2], scales[1, 1] = np.nan, np.nan  # gate of columns 0..127, up half of 128..255
    x[np.flatnonzero(experts == 2)[3]] = np.nan
    found = up_project(case, x, weights, scales, experts, **options)
    is_nan = np.zeros((len(x), 2), bool)
    is_nan[experts == 0, 0], is_nan[experts == 1, 1], is_nan[np.isnan(x[:, 0])] = True, True, True
    dequantized = found[0].astype(np.float32).reshape(-1, 2, 128) * found[1].T[:, :, None]
    np.testing.assert_array_equal(np.isnan(dequantized).all(axis=2), is_nan)
    np.testing.assert_array_equal(found[1].T[~is_nan], clean[1].T[~is_nan])
    finite = ~is_nan.repeat(128, axis=1)
    np.testing.assert_array_equal(bits(found[0])[finite], bits(clean[0])[finite])
