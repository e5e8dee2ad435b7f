"""`precision="high"`: 16-bit activations and float32 rows, against the float32 oracle."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export

import jax_moe
from jax_moe import MoEConfig
from jax_moe.backends import xla
from jax_moe.parallel import exchange
from jax_moe.parallel.ranks import Ranks
from tests.backend_cases import EVERYWHERE, running
from tests.moe_inputs import SMALL, bits, make_inputs, relative_error, replaced

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
# The oracle's own bf16 result is 0.0017 off the exact one, and so is every bf16 result.
BOUND = 0.004


def inputs_of(kind, num_tokens=41, **sizes):
    inputs = make_inputs(num_tokens, **sizes)
    if kind == "e4m3":
        return inputs
    x = np.random.default_rng(5).standard_normal(inputs.hidden_states.shape, np.float32)
    return inputs._replace(hidden_states=x.astype(DTYPES[kind]), hidden_states_scale=None)


def matched_ratio(found, expected, tolerance=0.01):
    """The share of elements that flashinfer-bench calls equal at its default tolerance."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    return float((np.abs(found - expected) <= tolerance * (1 + np.abs(expected))).mean())


def high(inputs, backend="xla", config=SMALL, **options):
    return jax_moe.apply(
        *inputs.arguments, config=config, backend=backend, precision="high", **options
    )


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(
    ("kind", "num_tokens"),
    [("e4m3", 41), ("bf16", 41), slow("f16", 41), slow("f32", 41), slow("e4m3", 1)],
)
def test_the_oracle_is_met(case, kind, num_tokens):
    inputs = inputs_of(kind, num_tokens)
    with running(case) as backend:
        out = high(inputs, backend)
    oracle = jax_moe.reference(*inputs.arguments, config=SMALL)
    assert relative_error(out, oracle) <= BOUND
    assert matched_ratio(out, oracle) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["e4m3", "bf16"])
def test_fast_errs_more(kind):
    inputs = inputs_of(kind)
    fast = jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla", precision="fast")
    oracle = jax_moe.reference(*inputs.arguments, config=SMALL)
    assert relative_error(fast, oracle) > 4 * relative_error(high(inputs), oracle)


def test_fast_is_the_default():
    inputs = inputs_of("bf16")

    def program(**options):
        layer = functools.partial(jax_moe.apply, config=SMALL, backend="xla", **options)
        return str(jax.make_jaxpr(layer)(*inputs.arguments))

    assert program() == program(precision="fast")
    assert program() != program(precision="high")
    # Nothing is quantized to FP8, so the format of its scales is without effect.
    assert program(precision="high") == program(precision="high", scale_format="ue8m0")


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e6, 1e12])
def test_magnitudes_far_beyond_f16(case, size):
    """The oracle is finite, so the result is; f16 alone would end at 65504."""
    inputs = inputs_of("bf16")
    # One half of the gated product grows with the other, so the weights shrink to match.
    x = np.asarray(inputs.hidden_states, np.float32) * np.float32(size)
    inputs = replaced(
        inputs,
        hidden_states=x.astype(ml_dtypes.bfloat16),
        gemm2_weights_scale=inputs.weights.gemm2_weights_scale / np.float32(max(size, 1 / size)),
    )
    with running(case) as backend:
        out = np.asarray(high(inputs, backend), np.float64)
    oracle = np.asarray(jax_moe.reference(*inputs.arguments, config=SMALL), np.float64)
    assert np.isfinite(oracle).all()
    assert np.isfinite(out).all()
    if size >= 1:  # small ones reach float32's denormals, which the CPU drops
        assert relative_error(out, oracle) <= BOUND


@pytest.mark.parametrize("case", EVERYWHERE)
def test_a_broken_token_does_not_touch_the_others(case):
    inputs = inputs_of("bf16")
    broken = np.array(inputs.hidden_states)
    broken[4, 130], broken[6, 3] = np.nan, np.inf
    with running(case) as backend:
        whole = high(inputs, backend)
        out = high(inputs._replace(hidden_states=broken), backend)
    others = [t for t in range(41) if t not in (4, 6)]
    np.testing.assert_array_equal(bits(out)[others], bits(whole)[others])
    oracle = np.asarray(
        jax_moe.reference(*inputs._replace(hidden_states=broken).arguments, config=SMALL),
        np.float32,
    )
    np.testing.assert_array_equal(np.isnan(out)[4], np.isnan(oracle)[4])
    assert not np.isfinite(np.asarray(out, np.float32)[6]).all() or (oracle[6] == 0).all()


@pytest.mark.parametrize("case", EVERYWHERE)
def test_dead_tokens_and_no_tokens(case):
    inputs = inputs_of("bf16")
    with running(case) as backend:
        whole = high(inputs, backend)
        part = high(inputs, backend, num_tokens=5)
        nothing = high(inputs_of("bf16", 0), backend)
    np.testing.assert_array_equal(bits(part)[:5], bits(whole)[:5])
    assert (bits(part)[5:] == 0).all()
    assert nothing.shape == (0, 256)
    assert nothing.dtype == jnp.bfloat16


@pytest.mark.slow
def test_the_clamp_works():
    inputs = inputs_of("bf16")
    config = MoEConfig(4, 4, 2, swiglu_limit=0.5)
    out = high(inputs, config=config)
    assert relative_error(out, jax_moe.reference(*inputs.arguments, config=config)) <= BOUND
    assert relative_error(out, high(inputs)) > 0.01


@pytest.mark.parametrize("case", EVERYWHERE)
def test_the_stages_are_the_layer(case):
    with running(case) as backend:
        check_stages(backend)


def check_stages(backend):
    inputs = inputs_of("bf16")
    on_it = {"backend": backend, "precision": "high"}
    route = jax_moe.route(
        inputs.routing_logits,
        inputs.routing_bias,
        inputs.routed_scaling_factor,
        config=SMALL,
        backend=backend,
    )
    ids, weights = route
    plan = jax_moe.plan_groups(ids, 8, num_local_experts=8, num_experts=32, **on_it)
    rows = jax_moe.quantize(inputs.hidden_states, **on_it)
    assert rows.values.dtype == jnp.float16
    activations = jax_moe.up_project(
        *rows, inputs.weights.gemm1_weights, inputs.weights.gemm1_weights_scale, plan, **on_it
    )
    assert activations.values.dtype == jnp.float16
    expert_outputs = jax_moe.down_project(
        activations,
        inputs.weights.gemm2_weights,
        inputs.weights.gemm2_weights_scale,
        plan,
        backend=backend,
    )
    assert expert_outputs.dtype == jnp.float32
    out = jax_moe.unpermute(expert_outputs, weights, plan, backend=backend)
    np.testing.assert_array_equal(bits(out), bits(high(inputs, backend)))
    routed = jax_moe.apply_routed(
        inputs.hidden_states,
        inputs.hidden_states_scale,
        *inputs.weights,
        *route,
        8,
        num_experts=32,
        **on_it,
    )
    np.testing.assert_array_equal(bits(routed), bits(out))


def test_rows_in_f16_are_exact_where_their_bits_fit():
    quantize = jax.jit(functools.partial(xla.quantize, precision="high"))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 384), np.float32) * 10.0 ** rng.integers(-36, 36, (5, 1))
    x[0, :128], x[1, 5], x[2, 7], x[2, 200] = 0, np.inf, np.nan, np.finfo(np.float32).max
    for dtype in (ml_dtypes.bfloat16, np.float16):
        narrow = x.astype(np.float32) if dtype != np.float16 else np.clip(x, -6e4, 6e4)
        narrow = narrow.astype(dtype)
        values, scales = quantize(narrow)
        back = np.asarray(values, np.float32).reshape(5, 3, 128) * np.asarray(scales.T)[:, :, None]
        back, exact = back.reshape(5, 384), narrow.astype(np.float32)
        mantissa, _ = np.frexp(np.asarray(scales))
        assert (mantissa == 0.5).all()
        amax = np.abs(np.where(np.isfinite(exact), exact, 0)).reshape(5, 3, 128).max(2)
        amax[1, 0] = np.finfo(np.float32).max  # beside an infinity
        tiny = np.abs(exact) <= np.repeat(amax, 128, 1).reshape(5, 384) * 2.0**-29
        tiny |= np.abs(exact) < 2.0**-100
        np.testing.assert_array_equal(back[~tiny], exact[~tiny])
    values, scales = quantize(np.full((1, 128), np.finfo(np.float32).max))
    assert np.isfinite(np.asarray(values, np.float32) * np.asarray(scales)).all()


@pytest.mark.slow
def test_under_jit_vmap_and_export():
    inputs = inputs_of("bf16", 6)
    layer = functools.partial(
        jax_moe.apply, config=SMALL, backend="xla", precision="high", expected_rows=1.0
    )
    whole = layer(*inputs.arguments)
    np.testing.assert_array_equal(bits(jax.jit(layer)(*inputs.arguments)), bits(whole))
    stacked = np.stack([inputs.hidden_states] * 2)
    mapped = jax.vmap(lambda x: layer(*inputs._replace(hidden_states=x).arguments))(stacked)
    np.testing.assert_array_equal(bits(mapped)[1], bits(whole))
    program = export.export(jax.jit(lambda x: layer(*inputs._replace(hidden_states=x).arguments)))
    exported = export.deserialize(program(inputs.hidden_states).serialize())
    np.testing.assert_array_equal(bits(exported.call(inputs.hidden_states)), bits(whole))


def test_the_workspace_counts_the_wider_rows():
    sizes = {"num_local_experts": 8, "hidden_size": 256, "intermediate_size": 128}
    fast, wide = (
        jax_moe.workspace_bytes(256, config=SMALL, backend="xla", precision=precision, **sizes)
        for precision in ("fast", "high")
    )
    assert wide - fast >= 256 * SMALL.top_k * (2 * 256 + 128)  # rows in float32, values in f16
    inputs = inputs_of("bf16", 16)
    wide = jax_moe.workspace_bytes(16, config=SMALL, backend="xla", precision="high", **sizes)
    layer = jax.jit(functools.partial(jax_moe.apply, config=SMALL, backend="xla", precision="high"))
    memory = layer.lower(*inputs.arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= wide


def test_a_wrong_precision_is_refused_by_name():
    inputs = make_inputs(2)
    message = r"precision: expected one of \('fast', 'high'\), got 'best'"
    with pytest.raises(ValueError, match=message):
        jax_moe.apply(*inputs.arguments, config=SMALL, precision="best")
    with pytest.raises(ValueError, match=message):
        jax_moe.quantize(np.zeros((1, 128), np.float32), precision="best")
    with pytest.raises(ValueError, match=message):
        jax_moe.workspace_bytes(
            1, num_local_experts=1, hidden_size=128, intermediate_size=128, precision="best"
        )
    ids, weights = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
    with pytest.raises(ValueError, match=r"precision: .*got \['high'\]"):
        jax_moe.apply_routed(
            inputs.hidden_states,
            inputs.hidden_states_scale,
            *inputs.weights,
            ids,
            weights,
            8,
            num_experts=32,
            precision=["high"],
        )
    plan = jax_moe.plan_groups(ids, 0, num_local_experts=8, num_experts=32, backend="xla")
    x = np.zeros((2, 256), np.float16), np.ones((2, 2), np.float32)
    with pytest.raises(TypeError, match="hidden_states: expected float8_e4m3fn"):
        jax_moe.up_project(
            *x,
            inputs.weights.gemm1_weights,
            inputs.weights.gemm1_weights_scale,
            plan,
            backend="xla",
        )


def test_an_exchange_without_it_names_it():
    message = "exchange='nvlink': precision='high' is not supported, only 'fast'"
    high = exchange.Place(Ranks(("expert",), (2,)), "mosaic", "high")
    with pytest.raises(NotImplementedError, match=message):
        exchange.select("nvlink", high, 1)
    assert exchange.select("nvlink", high._replace(precision="fast"), 1) == "nvlink"
    for name in ("collectives", "auto"):
        assert exchange.select(name, high, 1) == "collectives"


@pytest.mark.parametrize("backend", ["mosaic", "triton"])
def test_it_is_another_program(backend):
    """Traced for a Hopper GPU, which needs none."""
    inputs = make_inputs(3)

    def program(precision):
        layer = functools.partial(jax_moe.apply, config=SMALL, backend=backend, precision=precision)
        with jax_moe.assume_device("sm_90"):
            return str(jax.make_jaxpr(layer)(*inputs.arguments))

    assert program("high") != program("fast")
