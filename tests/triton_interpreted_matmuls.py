"""Both Triton matmuls and unpermute in Triton's own CPU interpreter (`triton_on_cpu`)."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from interop.triton_launch import launch_torch
from jax_moe import GroupPlan, Quantized
from pallas_kernels.triton import (
    down_projection,
    group_quant,
    tilings,
    unpermute,
    up_projection,
)
from pallas_kernels.triton.grouped_matmul import MatmulConfig
from tests import numpy_oracle, triton_on_cpu
from tests.moe_inputs import SMALL, bits, make_inputs, relative_error, replaced
from tests.pairwise import product
from tests.test_options import OPTIONS, THE_FIVE, config_of, inputs_of
from tests.triton_on_cpu import plan_of, route, run, to_numpy, to_torch

pytestmark = triton_on_cpu.QUIET
mended_interpreter = triton_on_cpu.mended_interpreter

HIGH = {"precision": "high"}


def router_inputs(inputs):
    return inputs.routing_logits, inputs.routing_bias, inputs.routed_scaling_factor


def layer(inputs, config, tiling, precision="fast", chosen=None, **epilogue):
    """The stages one after the other, and what came out of each.

    Experts are `chosen`, or those of the plain backend, which takes less time.
    """
    w13, s13, w2, s2 = map(to_torch, inputs.weights)
    if inputs.hidden_states_scale is None:
        form = epilogue.get("scale_format", "f32")
        x, x_scale = launch_torch(
            group_quant.launch(to_torch(inputs.hidden_states), form, precision)
        )
    else:
        x, x_scale = map(to_torch, (inputs.hidden_states, inputs.hidden_states_scale))
    if precision == "high":
        x = x.half()
    if chosen is None:
        chosen = jax_moe.route(*router_inputs(inputs), config=config, backend="xla")
    ids, weights = map(np.asarray, chosen)
    plan = plan_of(
        ids, inputs.local_expert_offset, len(w13), inputs.routing_logits.shape[1], tiling.block_m
    )
    tiles = (to_torch(plan.tile_expert), to_torch(plan.num_tiles))
    limits = {"config": tiling, "num_sms": 2}
    up = launch_torch(
        up_projection.launch(
            x, x_scale, w13, s13, to_torch(plan.row_token), *tiles, **limits, **epilogue
        )
    )
    (down,) = launch_torch(down_projection.launch(*up, w2, s2, *tiles, **limits))
    (out,) = run(unpermute.launch(down, to_torch(weights), to_torch(plan.pair_row)))
    return plan, [to_numpy(a) for a in up], to_numpy(down), out


@pytest.mark.parametrize(
    ("tiling", "hidden_size", "intermediate_size", "epilogue"),
    [
        (MatmulConfig(16), 384, 256, {}),
        (MatmulConfig(16, swap_ab=True), 384, 256, {"swiglu_limit": 0.75}),
        (MatmulConfig(32, programs_per_sm=1, swap_ab=True), 256, 128, {"scale_format": "ue8m0"}),
        (MatmulConfig(16, swap_ab=True), 256, 256, HIGH | {"swiglu_limit": 0.75}),
    ],
)
def test_stages_equal_the_plain_backend(tiling, hidden_size, intermediate_size, epilogue):
    inputs = make_inputs(
        21, num_experts=32, num_local_experts=4, hidden_size=hidden_size,
        intermediate_size=intermediate_size, offset=8,
    )  # fmt: skip
    plan, up, down, out = layer(inputs, SMALL, tiling, **epilogue)
    on_jax = GroupPlan(*map(jnp.asarray, plan))
    live = plan.row_token >= 0
    expected = jax_moe.up_project(
        inputs.hidden_states,
        inputs.hidden_states_scale,
        inputs.weights.gemm1_weights,
        inputs.weights.gemm1_weights_scale,
        on_jax,
        backend="xla",
        **epilogue,
    )
    assert relative_error(up[1][:, live], np.asarray(expected.scales)[:, live]) < 1e-5
    dequantized, expected_dequantized = (
        q.values.astype(np.float32) * np.repeat(np.asarray(q.scales).T, 128, axis=1)
        for q in (Quantized(*up), Quantized(*map(np.asarray, expected)))
    )
    assert relative_error(dequantized[live], expected_dequantized[live]) < 1e-3
    up = Quantized(*map(jnp.asarray, up))
    expected = np.asarray(
        jax_moe.down_project(
            up,
            inputs.weights.gemm2_weights,
            inputs.weights.gemm2_weights_scale,
            on_jax,
            backend="xla",
        ),
        np.float32,
    )
    is_high = "precision" in epilogue
    assert down.dtype == (np.float32 if is_high else ml_dtypes.bfloat16)
    assert relative_error(down[live].astype(np.float32), expected[live]) < (
        1e-5 if is_high else 4e-3
    )
    expected = jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla", **epilogue)
    assert relative_error(out, expected) < 4e-3
    assert not bits(out)[(plan.pair_row < 0).all(axis=1)].any()


@pytest.mark.parametrize(
    ("swap_ab", "dtype"),
    [(False, ml_dtypes.float8_e4m3fn), (True, ml_dtypes.float8_e4m3fn), (True, np.float16)],
)
def test_distinct_scales_and_exact_values_are_exact(swap_ab, dtype):
    """Powers of two per (row, block) and small integers: nothing rounds before the last store."""
    rng = np.random.default_rng(5)
    rows, hidden_size, intermediate_size, experts = 32, 384, 256, 2
    values = rng.integers(-2, 3, (rows, intermediate_size)).astype(dtype)
    if dtype == np.float16:
        values *= dtype(1 + 2**-10)  # 11 bits, which only f16 holds
    scales = np.exp2(rng.integers(-3, 4, (2, rows))).astype(np.float32) * rng.choice(
        [-1, 1], (2, rows)
    )
    weights = np.zeros((experts, hidden_size, intermediate_size), np.float32)
    weights[..., ::37] = rng.integers(-2, 3, weights[..., ::37].shape)
    weights_scale = np.exp2(rng.integers(-2, 3, (experts, 3, 2))).astype(np.float32)
    launch = down_projection.launch(
        *map(to_torch, (values, scales.astype(np.float32))),
        to_torch(weights.astype(ml_dtypes.float8_e4m3fn)),
        to_torch(weights_scale),
        to_torch(np.array([1, 0], np.int32)),
        to_torch(np.array([2], np.int32)),
        config=MatmulConfig(16, swap_ab=swap_ab),
        num_sms=1,
    )
    (found,) = run(launch)
    x = values.astype(np.float64) * np.repeat(scales.T, 128, axis=1)
    w = weights * np.repeat(np.repeat(weights_scale, 128, axis=1), 128, axis=2)
    expected = np.concatenate([x[:16] @ w[1].T, x[16:] @ w[0].T]).astype(found.dtype)
    assert found.dtype == (np.float32 if dtype == np.float16 else ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("epilogue", [{}, {"swiglu_limit": 0.75, "scale_format": "ue8m0"}, HIGH])
def test_nan_stays_with_its_token_and_its_expert(epilogue):
    inputs = make_inputs(
        13, num_experts=16, num_local_experts=4, hidden_size=128, intermediate_size=128, offset=4
    )
    clean_plan, _, _, clean = layer(inputs, SMALL, MatmulConfig(16, swap_ab=True), **epilogue)
    poisoned = replaced(
        inputs,
        hidden_states_scale=inputs.hidden_states_scale.copy(),
        gemm1_weights_scale=inputs.weights.gemm1_weights_scale.copy(),
    )
    poisoned.hidden_states_scale[:, 0] = np.nan  # padding rows read token 0
    poisoned.weights.gemm1_weights_scale[2] = np.nan
    _, _, _, out = layer(poisoned, SMALL, MatmulConfig(16, swap_ab=True), **epilogue)
    first, last = clean_plan.group_offsets[2:4]
    reached = np.isin(np.arange(13), clean_plan.row_token[first:last]) | (np.arange(13) == 0)
    local = (clean_plan.pair_row >= 0).any(axis=1)
    assert np.isnan(out[reached & local].astype(np.float32)).all()
    np.testing.assert_array_equal(bits(out)[~reached], bits(clean)[~reached])


@pytest.mark.slow
def test_a_token_has_its_bits_in_any_batch():
    """In the tile that all plans of `batch_invariant=True` have, wherever in it a row lies."""
    tiling = MatmulConfig(tilings.INVARIANT_BLOCK_M)
    inputs = make_inputs(
        19, num_experts=16, num_local_experts=1, hidden_size=128, intermediate_size=128, offset=4
    )
    *_, out = layer(inputs, SMALL, tiling)
    tokens = np.flatnonzero(bits(out).any(axis=1))[[3, 0]]
    few = inputs._replace(
        routing_logits=inputs.routing_logits[tokens],
        hidden_states=inputs.hidden_states[tokens],
        hidden_states_scale=np.ascontiguousarray(inputs.hidden_states_scale[:, tokens]),
    )
    *_, found = layer(few, SMALL, tiling)
    np.testing.assert_array_equal(bits(found), bits(out)[tokens])


def test_combine_skips_what_is_not_local_and_takes_any_width():
    outputs = np.random.default_rng(0).standard_normal((8, 384)).astype(ml_dtypes.bfloat16)
    outputs[3] = np.nan
    pair_row = np.array([[0, 7], [-1, 2], [-1, -1]], np.int32)
    weights = np.array([[0.5, 2.0], [np.nan, 1.0], [np.inf, np.nan]], np.float32)
    (found,) = run(unpermute.launch(*map(to_torch, (outputs, weights, pair_row))))
    rows = outputs.astype(np.float32)
    expected = np.stack([0.5 * rows[0] + 2 * rows[7], rows[2], 0 * rows[0]])
    np.testing.assert_array_equal(bits(found), bits(expected.astype(ml_dtypes.bfloat16) + 0))


def test_unpermute_adds_float32_rows():
    rng = np.random.default_rng(0)
    rows, factors = rng.standard_normal((8, 384), np.float32), np.float32([[3, 7], [0.5, 1]])
    pair_row = np.array([[3, -1], [0, 7]], np.int32)
    (found,) = run(
        unpermute.launch(*map(to_torch, (rows, factors, pair_row)), output_dtype="float32")
    )
    expected = np.stack([3 * rows[3], np.float32(0.5) * rows[0] + rows[7]])
    np.testing.assert_array_equal(found, expected)


def test_the_oracle_is_met_at_any_magnitude():
    """Tokens beyond what f16 holds, each compared on its own."""
    inputs = make_inputs(13, num_experts=16, num_local_experts=4, hidden_size=128, offset=4)
    sizes = np.float32([1e-30, 1e-12, 1, 1e6, 1e12, 1e18])[np.arange(13) % 6]
    x = np.random.default_rng(5).standard_normal((13, 128), np.float32) * sizes[:, None]
    inputs = inputs._replace(hidden_states=x.astype(ml_dtypes.bfloat16), hidden_states_scale=None)
    plan, _, _, out = layer(inputs, SMALL, MatmulConfig(32, swap_ab=True), **HIGH)
    oracle = np.asarray(jax_moe.reference(*inputs.arguments, config=SMALL), np.float64)
    assert np.isfinite(oracle).all()
    assert np.isfinite(out.astype(np.float32)).all()
    compared = np.flatnonzero((plan.pair_row >= 0).any(axis=1) & (sizes >= 1))
    assert len(compared) > 3
    for token in compared:
        assert relative_error(out[token], oracle[token]) <= 0.004


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("fast", 0.012), ("high", 0.004)])
@pytest.mark.parametrize("row", product({name: OPTIONS[name] for name in THE_FIVE}), ids=str)
def test_every_combination(row, precision, bound):
    """Of routers, options and precisions; here the kernel chooses the experts."""
    row = {"renormalize": True, "groups": (1, 1), "logits": np.float32} | row
    config, inputs = config_of(row), inputs_of(row, num_tokens=13)
    epilogue = {name: row[name] for name in ("swiglu_limit", "scale_format")}
    chosen = route(*router_inputs(inputs), config)
    tiling = MatmulConfig(16, swap_ab=True)
    _, _, _, out = layer(inputs, config, tiling, precision, chosen, **epilogue)
    oracle = numpy_oracle.layer(*inputs.arguments, config=config, requantize=precision == "fast")
    assert relative_error(out, oracle) <= bound
