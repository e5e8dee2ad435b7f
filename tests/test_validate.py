"""Bad input: errors name the argument, what was expected and what came; nothing compiles."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import MoEConfig
from tests.moe_inputs import (
    E4M3,
    SMALL,
    bits,
    make_inputs,
    named_arrays,
    on_device,
    replaced,
)

INPUTS = make_inputs(5, hidden_size=384, intermediate_size=128)


def call(function=jax_moe.apply, *, config=SMALL, **changes):
    return function(*replaced(INPUTS, **changes).arguments, config=config)


def refuses(error, *said, function=jax_moe.apply, **changes):
    """Asserts the error, each text of its message, and that XLA was not asked for anything."""
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if "compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        with pytest.raises(error) as raised:
            call(function, **changes)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []
    for text in said:
        assert text in str(raised.value)


def test_the_inputs_are_good():
    assert call().shape == (5, 384)


@pytest.mark.parametrize("function", [jax_moe.apply, jax_moe.reference])
@pytest.mark.parametrize("name", list(named_arrays(INPUTS)))
@pytest.mark.parametrize("dtype", [np.float64, np.int64, ml_dtypes.float8_e5m2, np.bool_, object])
def test_dtypes(function, name, dtype):
    wrong = np.zeros(named_arrays(INPUTS)[name].shape, dtype)
    wanted = {"routing_bias": "bfloat16 or float32", "hidden_states": "float8_e4m3fn or bfloat16"}
    expected = wanted.get(name) or np.dtype(named_arrays(INPUTS)[name].dtype).name
    refuses(TypeError, f"{name}: expected {expected}", "got", function=function, **{name: wrong})


FULL_WIDTH = sorted(set(named_arrays(INPUTS)) - {"routing_logits", "routing_bias", "hidden_states"})


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_half_precision_scales_and_e4m3fnuz_weights(name):
    value = named_arrays(INPUTS)[name]
    dtype = ml_dtypes.float8_e4m3fnuz if value.dtype == E4M3 else np.float16
    refuses(TypeError, f"{name}: expected", np.dtype(dtype).name, **{name: value.astype(dtype)})


@pytest.mark.parametrize("name", list(named_arrays(INPUTS)))
@pytest.mark.parametrize("value", [None, [[1.0]], 3.0, "text"])
def test_things_that_are_no_arrays(name, value):
    if name == "routing_bias" and value is None:
        return  # no bias
    kind = "None" if value is None else type(value).__name__
    refuses(TypeError, f"{name}: expected a JAX or NumPy array", kind, **{name: value})


@pytest.mark.parametrize("name", list(named_arrays(INPUTS)))
def test_ranks(name):
    value = named_arrays(INPUTS)[name]
    refuses(ValueError, f"{name}: expected rank {value.ndim}", **{name: value[None]})
    refuses(ValueError, f"{name}: expected rank {value.ndim}", **{name: np.asarray(value[0])})


@pytest.mark.parametrize(
    ("name", "axis", "said"),
    [
        ("routing_bias", 0, "(E = 32 from routing_logits)"),
        ("hidden_states", 0, "(T = 5 from routing_logits)"),
        ("hidden_states_scale", 0, "(H = 384 from hidden_states)"),
        ("hidden_states_scale", 1, "(T = 5 from routing_logits)"),
        ("gemm1_weights", 2, "(H = 384 from hidden_states)"),
        ("gemm1_weights_scale", 0, "(E_local = 8 from gemm1_weights)"),
        ("gemm1_weights_scale", 1, "(I = 128 from gemm1_weights)"),
        ("gemm1_weights_scale", 2, "(H = 384 from hidden_states)"),
        ("gemm2_weights", 0, "(E_local = 8 from gemm1_weights)"),
        ("gemm2_weights", 1, "(H = 384 from hidden_states)"),
        ("gemm2_weights", 2, "(I = 128 from gemm1_weights)"),
        ("gemm2_weights_scale", 0, "(E_local = 8 from gemm1_weights)"),
        ("gemm2_weights_scale", 1, "(H = 384 from hidden_states)"),
        ("gemm2_weights_scale", 2, "(I = 128 from gemm1_weights)"),
    ],
)
def test_shapes(name, axis, said):
    value = named_arrays(INPUTS)[name]
    wrong = np.concatenate([value, value], axis=axis)
    found = f"got {np.dtype(value.dtype).name} {list(wrong.shape)}"
    refuses(ValueError, f"{name}: expected", said, found, f"axis {axis} differs", **{name: wrong})


def test_sizes_that_are_no_multiple_of_the_block():
    narrow = INPUTS.hidden_states[:, :200]
    refuses(ValueError, "hidden_states: expected H", "128, got 200", hidden_states=narrow)
    refuses(ValueError, "hidden_states: expected H", "got 0", hidden_states=narrow[:, :0])
    weights = INPUTS.weights.gemm1_weights[:, :192]
    refuses(ValueError, "gemm1_weights: expected I", "128, got 96", gemm1_weights=weights)
    refuses(ValueError, "gemm1_weights: expected", gemm1_weights=weights[:, :191])


def test_a_transposed_activation_scale():
    transposed = INPUTS.hidden_states_scale.T
    refuses(
        ValueError,
        "hidden_states_scale: expected float32 [H/128, T] = [3, 5]",
        "got float32 [5, 3] (transposed?)",
        hidden_states_scale=transposed,
    )


def test_a_square_activation_scale_is_taken_as_block_major():
    square = make_inputs(3, hidden_size=384, intermediate_size=128, seed=4)
    assert square.hidden_states_scale.shape == (3, 3)
    one = [
        jax_moe.apply(
            *square._replace(
                routing_logits=square.routing_logits[t : t + 1],
                hidden_states=square.hidden_states[t : t + 1],
                hidden_states_scale=square.hidden_states_scale[:, t : t + 1],
            ).arguments,
            config=SMALL,
        )
        for t in range(3)
    ]
    np.testing.assert_array_equal(
        bits(jax_moe.apply(*square.arguments, config=SMALL)), bits(np.stack(one)[:, 0])
    )


def test_scale_and_dtype_of_the_activations_must_agree():
    refuses(TypeError, "hidden_states_scale: expected", "got None", hidden_states_scale=None)
    refuses(
        ValueError,
        "hidden_states_scale: expected None, as hidden_states is bfloat16 [5, 384]",
        "got float32 [3, 5]",
        hidden_states=INPUTS.hidden_states.astype(ml_dtypes.bfloat16),
    )


@pytest.mark.parametrize("offset", [-1, 25, 2**40, np.int64(-(2**40)), np.array(25), jnp.int32(-1)])
def test_known_offsets_out_of_range(offset):
    refuses(ValueError, "local_expert_offset: expected 0..24, got", local_expert_offset=offset)


@pytest.mark.parametrize("offset", [1.0, "8", None, True, np.float32(8), jnp.float32(8), 1j])
def test_offsets_that_are_no_integers(offset):
    refuses(TypeError, "local_expert_offset: expected an integer", local_expert_offset=offset)


@pytest.mark.parametrize("name", ["routing_logits", "gemm1_weights_scale"])
def test_foreign_byte_order(name):
    value = named_arrays(INPUTS)[name]
    said = f"got big-endian float32 {list(value.shape)}"
    refuses(TypeError, f"{name}: expected float32", said, **{name: value.astype(">f4")})
    assert call(local_expert_offset=np.array(8, ">i4")).shape == (5, 384)  # a scalar has a value


def test_masked_arrays():
    """NumPy would drop the mask."""
    said = "a masked array, whose mask would be lost; pass float32 [5, 32] from filled()"
    masked = np.ma.masked_invalid(INPUTS.routing_logits)
    refuses(TypeError, "routing_logits: expected", said, routing_logits=masked)
    for scalar in (np.ma.masked, np.ma.array(1.0)):
        refuses(TypeError, "routed_scaling_factor", "mask", routed_scaling_factor=scalar)


def test_keys_of_random_numbers():
    """JAX's own dtypes lack what NumPy's have."""
    keys = jax.random.split(jax.random.key(0), (5, 32))
    with pytest.raises(TypeError, match=r"routing_logits: expected .*got key<fry> \[5, 32\]"):
        call(routing_logits=keys)


@pytest.mark.parametrize("name", ["routing_logits", "gemm2_weights", "routed_scaling_factor"])
def test_deleted_arrays(name):
    array = jnp.asarray(named_arrays(INPUTS).get(name, np.float32(2.5)))
    array.delete()
    said = f"{name}: expected an array with memory, got a deleted or donated one"
    refuses(ValueError, said, **{name: array})


@pytest.mark.parametrize("value", ["no", 1, None, jnp.array(True)])
def test_what_is_true_and_no_bool(value):
    with pytest.raises(TypeError, match="batch_invariant: expected a bool, got"):
        jax_moe.apply(*INPUTS.arguments, config=SMALL, batch_invariant=value)
    with pytest.raises(TypeError, match="routed: expected a bool, got"):
        jax_moe.partition_specs("expert", routed=value)


@pytest.mark.parametrize("name", ["routing_bias", "gemm2_weights"])
def test_torch_tensors(name):
    torch = pytest.importorskip("torch")
    said = "got torch.Tensor (interop.torch_moe takes torch tensors, interop.to_jax converts them)"
    refuses(TypeError, f"{name}: expected a JAX", said, **{name: torch.zeros(32)})
    refuses(TypeError, "local_expert_offset", "torch_moe", local_expert_offset=torch.tensor(8))


def test_offsets_that_are_no_scalars():
    refuses(
        ValueError,
        "local_expert_offset: expected a scalar, got int64 [1]",
        local_expert_offset=np.array([8]),
    )


@pytest.mark.parametrize("factor", ["2.5", None, True, 1j, np.complex64(1), np.array(True)])
def test_factors_that_are_no_numbers(factor):
    refuses(TypeError, "routed_scaling_factor: expected a real", routed_scaling_factor=factor)


@pytest.mark.parametrize("name", ["local_expert_offset", "num_tokens", "num_experts"])
def test_integers_of_more_digits_than_python_prints(name):
    counts = {"local_expert_offset": 0, "num_local_experts": 8, "num_experts": 32}
    if name == "num_tokens":
        call = functools.partial(
            jax_moe.apply, *INPUTS.arguments, config=SMALL, num_tokens=10**5000
        )
    else:
        counts[name] = 10**5000
        call = functools.partial(jax_moe.plan_groups, np.zeros((1, 2), np.int32), **counts)
    with pytest.raises(ValueError, match=f"{name}: expected .* got an integer of 16610 bits"):
        call()


LIKE_A_TENSOR = type("Tensor", (), {"__index__": lambda self: 2})()
HUGE = [pytest.param(-(10**400), id="401 digits"), pytest.param(10**5000, id="5001 digits")]


@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf, 1e39, *HUGE, np.array([2.5])])
def test_factors_out_of_range(factor):
    refuses(ValueError, "routed_scaling_factor: expected a", routed_scaling_factor=factor)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an integer, got 2.0"),
        ({"top_k": True}, TypeError, "top_k: expected an integer, got True"),
        ({"top_k": LIKE_A_TENSOR}, TypeError, "top_k: expected an integer, got "),
        ({"n_group": 0}, ValueError, "n_group: expected at least 1, got 0"),
        ({"topk_group": 0}, ValueError, "topk_group: expected 1..n_group (= 1), got 0"),
        ({"n_group": 8, "topk_group": 9}, ValueError, "expected 1..n_group (= 8), got 9"),
        pytest.param(
            {"top_k": 10**5000}, ValueError, "top_k: expected at most 1073741824", id="huge"
        ),
        ({"block_size": 64}, ValueError, "block_size: only 128 is supported, got 64"),
        ({"scoring": "relu"}, ValueError, "scoring: expected one of ('sigmoid', 'softmax', "),
        ({"scoring": None}, ValueError, "got None"),
        ({"renormalize": 1}, TypeError, "renormalize: expected a bool, got 1"),
        ({"swiglu_limit": -1.0}, ValueError, "swiglu_limit: expected a positive"),
        ({"swiglu_limit": "7"}, TypeError, "swiglu_limit: expected a number or None, got '7'"),
        ({"scale_format": "bf16"}, ValueError, "scale_format: expected one of ('f32', 'ue8m0')"),
    ],
)
def test_configs(fields, error, said):
    with pytest.raises(error, match=re.escape(said)):
        MoEConfig(**fields)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MoEConfig(8, 5, 3), "n_group to split the 32 experts of routing_logits"),
        (MoEConfig(8, 5, 3), "got 5"),
        (MoEConfig(8, 32, 16), "equal groups of at least 2, or to be 1, got 32"),
        (MoEConfig(17, 4, 2), "top_k of at most 16"),
        (MoEConfig(33, 1, 1), "top_k of at most 32"),
    ],
)
def test_configs_that_do_not_fit_the_experts(config, said):
    refuses(ValueError, "config: expected", said, config=config)


def test_a_config_that_is_none():
    refuses(TypeError, "config: expected a jax_moe.MoEConfig, got dict", config={})


def test_more_local_experts_than_experts():
    wrong = make_inputs(5, num_experts=32, num_local_experts=33, hidden_size=384)
    changes = wrong.weights._asdict()
    refuses(ValueError, "gemm1_weights: expected E_local in 1..E = 1..32, got 33", **changes)


def test_one_local_expert_is_enough_and_none_is_not():
    apply = functools.partial(jax_moe.apply, config=SMALL)
    one = make_inputs(5, num_local_experts=1)
    assert jax.eval_shape(apply, *one.arguments).shape == (5, 256)
    none = {name: value[:0] for name, value in INPUTS.weights._asdict().items()}
    refuses(ValueError, "gemm1_weights: expected E_local in 1..E = 1..32, got 0", **none)


def test_choices_of_a_router_of_ones_own():
    """Any number of experts per token from one on."""
    _, _, *arrays, offset, _ = INPUTS.arguments

    def shape_of(top_k):
        ids = np.zeros((5, top_k), np.int32)
        call = functools.partial(jax_moe.apply_routed, num_experts=32)
        return jax.eval_shape(call, *arrays, ids, ids.astype(np.float32), offset).shape

    assert shape_of(1) == shape_of(2) == (5, 384)
    with pytest.raises(ValueError, match=r"topk_ids: expected k of at least 1, got int32 \[5, 0\]"):
        shape_of(0)


def test_more_pairs_than_int32_counts():
    many = jax.ShapeDtypeStruct((2**28, 32), jnp.float32)
    with pytest.raises(ValueError, match="T \\* top_k below 2\\^30, got 268435456 \\* 4"):
        jax.eval_shape(
            functools.partial(jax_moe.route, routed_scaling_factor=1.0, config=SMALL),
            many,
            jax.ShapeDtypeStruct((32,), jnp.float32),
        )


def test_as_many_logits_as_int32_offsets_reach():
    """T * E of 2^31 is the last that fits: its last logit has the offset 2^31 - 1."""
    bias = jax.ShapeDtypeStruct((128,), jnp.float32)
    route = functools.partial(
        jax_moe.route, routed_scaling_factor=1.0, config=MoEConfig(1, 1, 1), backend="xla"
    )
    largest = jax.ShapeDtypeStruct((2**24, 128), jnp.float32)
    assert jax.eval_shape(route, largest, bias).topk_ids.shape == (2**24, 1)
    with pytest.raises(ValueError, match=r"T \* E of at most 2\^31, got 16777217 \* 128"):
        jax.eval_shape(route, jax.ShapeDtypeStruct((2**24 + 1, 128), jnp.float32), bias)


@pytest.mark.parametrize("backend", ["cuda", "", None, "XLA"])
def test_unknown_backends(backend):
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'mosaic'"):
        jax_moe.apply(*INPUTS.arguments, config=SMALL, backend=backend)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (6, ValueError), (2.0, TypeError)])
def test_num_tokens(value, error):
    with pytest.raises(error, match="num_tokens: expected"):
        jax_moe.apply(*INPUTS.arguments, config=SMALL, num_tokens=value)


def test_tracers_are_checked_the_same():
    wrong = INPUTS._replace(hidden_states_scale=INPUTS.hidden_states_scale.T)
    with pytest.raises(ValueError, match="transposed"):
        jax.jit(functools.partial(jax_moe.apply, config=SMALL))(*wrong.arguments)


def test_stages():
    good = on_device(INPUTS)
    _, _, x, x_scale, w13, s13, w2, s2, offset, _ = good.arguments
    with pytest.raises(TypeError, match="x: expected bfloat16 or float16 or float32"):
        jax_moe.quantize(x)
    with pytest.raises(ValueError, match="x: expected C to be a positive multiple of 128"):
        jax_moe.quantize(jnp.zeros((3, 100)))
    plan_groups = functools.partial(jax_moe.plan_groups, num_local_experts=8, num_experts=32)
    ids = jnp.tile(jnp.arange(4, dtype=jnp.int32), (5, 1))
    with pytest.raises(TypeError, match="topk_ids: expected int32"):
        plan_groups(ids.astype(jnp.uint32), offset)
    with pytest.raises(ValueError, match=r"local_expert_offset: expected 0\.\.24, got 25"):
        plan_groups(ids, 25)
    with pytest.raises(ValueError, match=r"num_local_experts: expected 1\.\.32, got 33"):
        plan_groups(ids, 0, num_local_experts=33)
    with pytest.raises(ValueError, match=r"num_experts: expected 1\.\.1073741824, got 0"):
        plan_groups(ids, 0, num_experts=0)
    plan = plan_groups(ids, offset)
    with pytest.raises(TypeError, match=r"plan: expected a jax_moe\.GroupPlan, got tuple"):
        jax_moe.up_project(x, x_scale, w13, s13, tuple(plan))
    with pytest.raises(ValueError, match=r"plan\.pair_row: expected int32 \[T, k\]"):
        jax_moe.up_project(x[:3], x_scale[:, :3], w13, s13, plan)
    with pytest.raises(TypeError, match="hidden_states: expected float8_e4m3fn"):
        jax_moe.up_project(x.astype(jnp.bfloat16), None, w13, s13, plan)
    activations = jax_moe.up_project(x, x_scale, w13, s13, plan)
    with pytest.raises(TypeError, match=r"activations: expected a jax_moe\.Quantized"):
        jax_moe.down_project(tuple(activations), w2, s2, plan)
    with pytest.raises(ValueError, match=r"gemm2_weights: expected .* \(I = 128 from activations"):
        jax_moe.down_project(activations, jnp.zeros((8, 384, 256), E4M3), s2, plan)
    with pytest.raises(ValueError, match=r"plan\.pair_row: expected int32 \[T, k\] = \[6, 4\]"):
        jax_moe.unpermute(jnp.zeros((plan.row_token.size, 384)), jnp.zeros((6, 4)), plan)
