"""`apply` under JAX's transformations, with every kind of scalar, and what it compiles."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import backends, buckets, entry
from tests import numpy_oracle
from tests.backend_cases import EVERYWHERE, running, slow
from tests.moe_inputs import (
    SMALL,
    array_arguments,
    bits,
    make_inputs,
    on_device,
    rank_specs,
    relative_error,
)

apply = functools.partial(jax_moe.apply, config=SMALL, backend="xla")
# JAX promises nothing about how long jax-triton's calls can be read.
TRITON_CALLS = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]


@functools.cache
def jitted(backend="xla"):
    """One program for all tests: its ten arguments are traced, the scalars too."""
    return jax.jit(functools.partial(jax_moe.apply, config=SMALL, backend=backend))


@pytest.fixture(scope="module")
def inputs():
    return on_device(make_inputs(64))


@pytest.fixture(scope="module")
def expected(inputs):
    return bits(apply(*inputs.arguments))


@pytest.fixture
def traces(monkeypatch):
    """Counts how often the layer is traced."""
    count = []
    layer = entry.layer
    monkeypatch.setattr(entry, "layer", lambda *a, **k: count.append(1) or layer(*a, **k))
    entry._jitted.clear_cache()
    yield count
    entry._jitted.clear_cache()


def test_jit_equals_eager(inputs, expected):
    np.testing.assert_array_equal(bits(jitted()(*inputs.arguments)), expected)


def test_numpy_equals_jax(expected):
    np.testing.assert_array_equal(bits(apply(*make_inputs(64).arguments)), expected)


@pytest.mark.parametrize("scalar", [int, np.int64, np.uint8, np.asarray, jnp.int32, jnp.int8])
def test_kinds_of_offset(inputs, expected, scalar):
    out = apply(*inputs._replace(local_expert_offset=scalar(8)).arguments)
    np.testing.assert_array_equal(bits(out), expected)


@pytest.mark.parametrize("scalar", [float, np.float64, np.float16, np.asarray, jnp.float32])
def test_kinds_of_factor(inputs, expected, scalar):
    out = apply(*inputs._replace(routed_scaling_factor=scalar(2.5)).arguments)
    np.testing.assert_array_equal(bits(out), expected)


def test_new_scalars_do_not_recompile(inputs, traces):
    for offset, factor in [(0, 1), (8, 2.5), (np.int64(24), np.float64(3)), (jnp.int32(1), 0.0)]:
        apply(*array_arguments(inputs), offset, factor)
    assert len(traces) == 1
    jitted()(*array_arguments(inputs), 0, 2.5)
    before = jitted()._cache_size()
    for offset in range(1, 5):
        jitted()(*array_arguments(inputs), offset, 2.5)
    assert jitted()._cache_size() == before


def test_a_traced_offset_out_of_range_skips_experts_that_do_not_exist(inputs):
    for offset in (-3, 29, 1000, -(2**31), 2**31 - 1):
        expected = numpy_oracle.layer(*array_arguments(inputs), offset, 2.5, config=SMALL)
        out = np.asarray(jitted()(*array_arguments(inputs), offset, 2.5), np.float32)
        if expected.any():
            assert relative_error(out, expected) < 0.03
        else:
            assert not out.any()


@pytest.mark.parametrize("layer", ["zeros", slow("whole")])
def test_varying_token_counts_compile_at_most_ten_programs(traces, monkeypatch, layer):
    """What the layer computes does not change their number, so one of zeros shows it as well."""
    if layer == "zeros":

        def zeros(inputs, *_, **__):
            traces.append(1)
            return jnp.zeros(inputs.hidden_states.shape, jnp.bfloat16)

        monkeypatch.setattr(entry, "layer", zeros)
    inputs = make_inputs(256, hidden_size=128)
    with jax.log_compiles(False), _counting_compilations() as compilations:
        for n in (*range(1, 18), 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 200, 255, 256):
            inputs_n = inputs._replace(
                routing_logits=inputs.routing_logits[:n],
                hidden_states=inputs.hidden_states[:n],
                hidden_states_scale=inputs.hidden_states_scale[:, :n],
            )
            assert apply(*inputs_n.arguments).shape == (n, 128)
    assert 1 < len(traces) <= 10
    if jax.default_backend() == "cpu":  # elsewhere the padding itself is compiled, the layer not
        assert len(compilations) <= 10


class _counting_compilations:  # noqa: N801
    """Collects one entry for each program that XLA compiles."""

    def __enter__(self):
        self.durations = []
        self.listener = lambda event, seconds, **_: (
            self.durations.append(seconds) if event.endswith("backend_compile_duration") else None
        )
        jax.monitoring.register_event_duration_secs_listener(self.listener)
        return self.durations

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self.listener)


def test_buckets_are_few_and_close():
    assert [buckets.bucket(n) for n in (0, 1, 2, 3, 80, 256, 257, 901, 11948, 14107)] == [
        0, 1, 2, 4, 128, 256, 288, 960, 12288, 14336,
    ]  # fmt: skip
    sizes = {buckets.bucket(n) for n in range(1, 16385)}
    assert len(sizes) == 9 + 6 * 8
    assert all(buckets.bucket(size) == size for size in sizes)
    assert all(n <= buckets.bucket(n) <= 1.125 * n + 1 for n in range(257, 16385))


@pytest.mark.parametrize("num_tokens", [slow(3), 65])
def test_padding_to_a_bucket_changes_no_bit(num_tokens):
    inputs = make_inputs(num_tokens)
    exact = bits(jitted()(*inputs.arguments))
    np.testing.assert_array_equal(bits(apply(*inputs.arguments)), exact)
    np.testing.assert_array_equal(bits(apply(*on_device(inputs).arguments)), exact)


def test_num_tokens_marks_the_live_rows(inputs, expected):
    garbage = inputs._replace(
        routing_logits=inputs.routing_logits.at[40:].set(jnp.nan),
        hidden_states_scale=inputs.hidden_states_scale.at[:, 40:].set(jnp.inf),
    )
    counted = jax.jit(lambda n: apply(*garbage.arguments, num_tokens=n))
    for out in (apply(*garbage.arguments, num_tokens=40), counted(40)):
        np.testing.assert_array_equal(bits(out)[:40], expected[:40])
        assert not bits(out)[40:].any()
    for n in (0, 1, 64):
        out = bits(apply(*inputs.arguments, num_tokens=n))
        np.testing.assert_array_equal(out[:n], expected[:n])
        assert not out[n:].any()


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: jax.grad(lambda x: f(x).astype(jnp.float32).sum())(x),
        lambda f, x: jax.jvp(f, (x,), (x,)),
        lambda f, x: jax.vjp(f, x),
        lambda f, x: jax.jit(jax.jacfwd(f))(x),
    ],
)
def test_derivatives_are_refused_clearly(inputs, differentiate):
    for layer in (apply, functools.partial(jax_moe.reference, config=SMALL)):
        with pytest.raises(NotImplementedError, match="forward only"):
            differentiate(
                lambda logits, layer=layer: layer(
                    *inputs._replace(routing_logits=logits).arguments
                ),
                inputs.routing_logits,
            )


def test_vmap_runs_one_by_one(inputs):
    batch = jnp.stack([inputs.routing_logits, inputs.routing_logits[::-1]])
    offsets = jnp.array([8, 16])
    out = jax.vmap(
        lambda logits, offset: apply(
            *array_arguments(inputs._replace(routing_logits=logits)), offset, 2.5
        )
    )(batch, offsets)
    for i in range(2):
        one = apply(*array_arguments(inputs._replace(routing_logits=batch[i])), offsets[i], 2.5)
        np.testing.assert_array_equal(bits(out[i]), bits(one))


@pytest.mark.parametrize("case", EVERYWHERE)
def test_export_round_trip(inputs, case):
    pytest.importorskip("flatbuffers")
    with running(case) as backend:
        layer = jitted(backend)
    exported = jax.export.export(layer, disabled_checks=TRITON_CALLS)(*inputs.arguments)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(
        bits(again.call(*inputs.arguments)), bits(layer(*inputs.arguments))
    )


def test_donated_inputs(inputs, expected):
    donating = jax.jit(
        lambda x, rest: apply(*rest._replace(hidden_states=x).arguments), donate_argnums=0
    )
    x = jnp.array(inputs.hidden_states)
    rest = inputs._replace(hidden_states=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # XLA may not find a use for the buffer
        np.testing.assert_array_equal(bits(donating(x, rest)), expected)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_debug_nans_with_finite_inputs(inputs, case):
    with running(case) as backend:
        layer = functools.partial(jax_moe.apply, config=SMALL, backend=backend)
        clean = bits(layer(*inputs.arguments))
        with jax.debug_nans(True):
            np.testing.assert_array_equal(bits(layer(*inputs.arguments)), clean)
            jax_moe.reference(*inputs.arguments, config=SMALL)


def test_debug_nans_finds_nan_inputs(inputs):
    poisoned = inputs._replace(hidden_states_scale=inputs.hidden_states_scale * jnp.nan)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        jax.block_until_ready(apply(*poisoned.arguments))


def test_debug_infs_and_transfer_guard(inputs, expected):
    arguments = jax.device_put((*array_arguments(inputs), np.int32(8), np.float32(2.5)))
    jitted()(*arguments)
    with jax.transfer_guard("disallow"):
        np.testing.assert_array_equal(bits(jitted()(*arguments)), expected)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("num_tokens", [1, slow(64), 1024])
def test_temporary_memory_stays_below_the_stated_bound(case, num_tokens):
    inputs = make_inputs(num_tokens, hidden_size=512, intermediate_size=256)
    with running(case) as backend:
        layer = functools.partial(jax_moe.apply, config=SMALL, backend=backend)
        compiled = jax.jit(layer).lower(*inputs.arguments).compile()
        bound = jax_moe.workspace_bytes(
            num_tokens,
            num_local_experts=8,
            hidden_size=512,
            intermediate_size=256,
            config=SMALL,
            backend=backend,
        )
    assert 0 < compiled.memory_analysis().temp_size_in_bytes <= bound


def test_the_stated_bound_covers_the_copies_of_many_experts():
    """They are more than the rest of the workspace, so a bound without them is too low."""
    if jax.default_backend() != "cpu":
        pytest.skip("XLA makes these copies on a CPU only")
    specs = rank_specs(1, num_experts=32, num_local=32, hidden=512, intermediate=256)
    temporary = (
        jax.jit(apply).lower(*specs.arguments).compile().memory_analysis().temp_size_in_bytes
    )
    copies = 32 * 3 * 512 * 256
    bound = jax_moe.workspace_bytes(
        1, num_local_experts=32, hidden_size=512, intermediate_size=256, config=SMALL, backend="xla"
    )
    assert bound - copies < temporary <= bound


@pytest.mark.parametrize("backend", backends.NAMES)
def test_workspace_bound_at_full_size(backend):
    with jax_moe.assume_device("sm_90"):
        if reason := backends.unsupported_reason(backend):
            pytest.skip(reason)
        bound = jax_moe.workspace_bytes(
            14107, num_local_experts=32, hidden_size=7168, intermediate_size=2048, backend=backend
        )
    assert bound <= 2.5e9


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("num_tokens", -5, ValueError, r"num_tokens: expected 0\.\..*, got -5"),
        ("num_tokens", 1.5, TypeError, "num_tokens: expected an integer"),
        ("num_local_experts", 0, ValueError, r"num_local_experts: expected 1\.\."),
        ("hidden_size", 100, ValueError, "hidden_size: expected a multiple of 128 in 128.."),
        ("intermediate_size", 200, ValueError, "intermediate_size: expected a multiple of 128"),
        pytest.param("num_tokens", 10**5000, ValueError, "num_tokens: .* 16610 bits", id="huge"),
        ("config", None, TypeError, r"config: expected a jax_moe\.MoEConfig, got None"),
    ],
)
def test_a_bound_for_what_cannot_be_is_refused(field, value, error, message):
    sizes = {"num_local_experts": 8, "hidden_size": 512, "intermediate_size": 256}
    with pytest.raises(error, match=message):
        jax_moe.workspace_bytes(**({"num_tokens": 4, **sizes, "config": SMALL} | {field: value}))


@pytest.mark.parametrize("backend", ["xla", "auto"])
def test_no_token_takes_no_memory(backend):
    sizes = {"num_local_experts": 32, "hidden_size": 7168, "intermediate_size": 2048}
    assert jax_moe.workspace_bytes(0, **sizes, backend=backend) == 0
    assert jax_moe.workspace_bytes(1, **sizes, backend=backend) > 0


def test_the_oracle_of_no_token():
    inputs = make_inputs(0)
    for run in (jax_moe.reference, jax.jit(jax_moe.reference, static_argnames="config")):
        out = run(*inputs.arguments, config=SMALL)
        assert (out.shape, out.dtype) == ((0, 256), jnp.bfloat16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda rows: rows[:3],
            ValueError,
            r"expert_outputs: expected bfloat16 or float32 \[M, H\]",
        ),
        (lambda rows: rows[:, :100], ValueError, "positive multiple of 128, got 100"),
        (lambda rows: rows[0], ValueError, "expert_outputs: expected rank 2"),
        (
            lambda rows: rows.astype(jnp.float16),
            TypeError,
            "expert_outputs: expected bfloat16 or float32",
        ),
        (lambda rows: None, TypeError, "expert_outputs: expected a JAX or NumPy array"),
    ],
)
def test_combine_refuses_rows_that_do_not_fit_the_plan(change, error, message):
    """Or the kernels would read past them."""
    ids = np.tile(np.arange(4, dtype=np.int32), (5, 1))
    plan = jax_moe.plan_groups(ids, 0, num_local_experts=8, num_experts=32, backend="xla")
    rows = jnp.zeros((plan.row_token.size, 128), jnp.bfloat16)
    weights = np.ones((5, 4), np.float32)
    assert jax_moe.unpermute(rows, weights, plan, backend="xla").shape == (5, 128)
    with pytest.raises(error, match=message):
        jax_moe.unpermute(change(rows), weights, plan, backend="xla")
