"""`apply_routed`: the layer after any router, on every backend."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_moe
from jax_moe import ExpertWeights, LayerInputs, Routing
from tests.backend_cases import EVERYWHERE, running
from tests.moe_inputs import SMALL, bits, make_inputs, rank_specs, relative_error

NUM_EXPERTS, FACTOR = 32, 2.5
ON_A_GPU = [
    pytest.param(backend, num_tokens, marks=pytest.mark.gpu)
    for backend in ("mosaic", "triton")
    for num_tokens in (3, 70, 2000)
]


def routed_arguments(inputs, ids, weights):
    """The nine arguments of `apply_routed`."""
    x, scale, experts, routing, offset = inputs.routed(Routing(ids, weights))
    return (x, scale, *experts, *routing, offset)


@functools.partial(jax.jit, static_argnames="top_k")
def softmax_router(logits, top_k):
    """A router of one's own: softmax over all experts, the best k, weights that add up to 1."""
    weights, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=1), top_k)
    return Routing(ids.astype(jnp.int32), weights / weights.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("case", "num_tokens"),
    [*itertools.product(["xla"], [3, 70]), ("interpreted_mosaic", 3), *ON_A_GPU],
)
def test_a_router_of_ones_own(case, num_tokens):
    inputs = make_inputs(num_tokens)

    @jax.jit
    def layer(inputs):
        ids, weights = softmax_router(inputs.routing_logits, 3)
        arguments = routed_arguments(inputs, ids, weights)
        return jax_moe.apply_routed(*arguments, num_experts=NUM_EXPERTS, backend=backend)

    with running(case) as backend:
        out = layer(inputs)
    routing = softmax_router(inputs.routing_logits, 3)
    expected = jax_moe.reference_routed(
        *routed_arguments(inputs, *routing), num_experts=NUM_EXPERTS
    )
    assert out.shape == inputs.hidden_states.shape
    assert np.asarray(expected, np.float32).any()
    assert relative_error(out, expected) < 0.03


@pytest.mark.parametrize("case", EVERYWHERE)
def test_apply_is_route_and_apply_routed_bit_for_bit(case):
    inputs = make_inputs(61)
    with running(case) as backend:
        whole = jax_moe.apply(*inputs.arguments, config=SMALL, backend=backend, num_tokens=50)
        routing = jax_moe.route(
            inputs.routing_logits, inputs.routing_bias, FACTOR, config=SMALL, backend=backend
        )
        out = jax_moe.apply_routed(
            *routed_arguments(inputs, *routing),
            num_experts=NUM_EXPERTS,
            backend=backend,
            num_tokens=50,
        )
    np.testing.assert_array_equal(bits(out), bits(whole))


def test_the_oracles_agree_bit_for_bit():
    inputs = make_inputs(9)
    routing = jax_moe.route(
        inputs.routing_logits, inputs.routing_bias, FACTOR, config=SMALL, backend="xla"
    )
    routed = jax_moe.reference_routed(*routed_arguments(inputs, *routing), num_experts=NUM_EXPERTS)
    whole = jax_moe.reference(*inputs.arguments, config=SMALL)
    np.testing.assert_array_equal(bits(routed), bits(whole))


@pytest.mark.parametrize("case", EVERYWHERE)
def test_an_id_that_occurs_twice_counts_with_both_weights(case):
    inputs = make_inputs(6)
    once = np.array([[8], [9], [15], [8], [10], [12]], np.int32)
    twice = np.repeat(once, 2, axis=1)
    weights = np.linspace(0.2, 1.3, 12, dtype=np.float32).reshape(6, 2)
    with running(case) as backend:
        call = {"num_experts": NUM_EXPERTS, "backend": backend}
        out = jax_moe.apply_routed(*routed_arguments(inputs, twice, weights), **call)
    expected = jax_moe.reference_routed(
        *routed_arguments(inputs, once, weights.sum(axis=1, keepdims=True)),
        num_experts=NUM_EXPERTS,
    )
    assert relative_error(out, expected) < 0.03


@pytest.mark.parametrize("case", EVERYWHERE)
def test_ids_that_name_no_local_expert_are_skipped_whatever_their_weight(case):
    inputs = make_inputs(5)  # local experts are 8..15 of 32
    ids = np.array([[8, -1], [16, 7], [2**31 - 1, 15], [-(2**31), 32], [9, 40]], np.int32)
    local = (ids >= 8) & (ids < 16)
    weights = np.where(local, np.float32(0.7), np.float32("nan"))
    with running(case) as backend:
        out = jax_moe.apply_routed(
            *routed_arguments(inputs, ids, weights), num_experts=NUM_EXPERTS, backend=backend
        )
    expected = jax_moe.reference_routed(
        *routed_arguments(inputs, np.where(local, ids, -1), np.where(local, weights, 0)),
        num_experts=NUM_EXPERTS,
    )
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert not bits(out)[[1, 3]].any(), "a token without a local expert must be exactly zero"
    assert relative_error(out, expected) < 0.03


def test_experts_past_the_last_are_skipped_under_a_range_that_overhangs():
    inputs = make_inputs(2)
    ids = np.array([[31, 33], [35, 30]], np.int32)  # 30 and 31 exist, 33 and 35 do not
    weights = np.ones((2, 2), np.float32)

    known = np.where(ids < 32, ids, -1)
    for function in (
        functools.partial(jax_moe.apply_routed, backend="xla"),
        jax_moe.reference_routed,
    ):

        @jax.jit
        def of(ids, offset, function=function):
            arguments = routed_arguments(inputs, ids, weights)[:-1]
            return function(*arguments, offset, num_experts=32)

        offset = np.int32(28)
        np.testing.assert_array_equal(bits(of(ids, offset)), bits(of(known, offset)))


@pytest.mark.parametrize("case", EVERYWHERE)
def test_expected_rows_choose_the_tile_and_not_the_result(case):
    inputs = make_inputs(40)
    routing = softmax_router(inputs.routing_logits, 3)
    arguments = routed_arguments(inputs, *routing)
    with running(case) as backend:
        call = {"num_experts": NUM_EXPERTS, "backend": backend}
        outs = [jax_moe.apply_routed(*arguments, expected_rows=rows, **call) for rows in (1.0, 40)]
        counts = {"num_local_experts": 8, "num_experts": NUM_EXPERTS, "backend": backend}
        plans = [
            jax_moe.plan_groups(routing.topk_ids, 8, expected_rows=rows, **counts)
            for rows in (1.0, 40)
        ]
    assert plans[0].block_m < plans[1].block_m
    assert relative_error(outs[1], outs[0]) < 0.01


def test_it_transforms_as_apply_does():
    inputs = make_inputs(4)
    routing = Routing(*map(np.asarray, softmax_router(inputs.routing_logits, 3)))
    call = {"num_experts": NUM_EXPERTS, "backend": "xla"}

    def layer(x, ids, weights):
        changed = inputs._replace(hidden_states=x)
        return jax_moe.apply_routed(*routed_arguments(changed, ids, weights), **call)

    batch = jax.tree.map(lambda a: np.stack([a, a]), (inputs.hidden_states, *routing))
    plain = bits(layer(inputs.hidden_states, *routing))
    np.testing.assert_array_equal(bits(jax.vmap(layer)(*batch))[1], plain)
    exported = export.export(jax.jit(layer))(inputs.hidden_states, *routing)
    np.testing.assert_array_equal(bits(exported.call(inputs.hidden_states, *routing)), plain)
    x = np.zeros((0, 256), jnp.bfloat16)
    empty = inputs._replace(hidden_states=x, hidden_states_scale=None)
    none = np.zeros((0, 3), np.int32), np.zeros((0, 3), np.float32)
    assert jax_moe.apply_routed(*routed_arguments(empty, *none), **call).shape == (0, 256)
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(lambda w: layer(inputs.hidden_states, routing[0], w).astype(float).sum())(
            routing.topk_weights
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_ids": np.zeros((4, 3))}, TypeError, r"topk_ids: expected int32 .*got float64"),
        ({"topk_ids": np.zeros((5, 3), np.int32)}, ValueError, "topk_ids: .*T = 4"),
        ({"topk_ids": np.zeros((4, 0), np.int32)}, ValueError, "topk_ids: expected k of at least"),
        ({"topk_weights": np.zeros((4, 2), np.float32)}, ValueError, "topk_weights: .*k = 3"),
        ({"topk_weights": None}, TypeError, "topk_weights: .*got None"),
        ({"local_expert_offset": 25}, ValueError, r"local_expert_offset: expected 0\.\.24, got 25"),
        ({"num_experts": 7}, ValueError, "E_local in 1..num_experts = 1..7, got 8"),
        ({"num_experts": True}, TypeError, "num_experts: expected an integer"),
        ({"expected_rows": 0}, ValueError, "expected_rows: expected a positive number"),
        ({"expected_rows": "few"}, TypeError, "expected_rows: expected a real number"),
        ({"num_tokens": 5}, ValueError, r"num_tokens: expected 0\.\.4, got 5"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    inputs = make_inputs(4)
    names = [*inspect.signature(jax_moe.apply_routed).parameters][:9]
    ids, weights = np.zeros((4, 3), np.int32), np.ones((4, 3), np.float32)
    arguments = dict(zip(names, routed_arguments(inputs, ids, weights), strict=True))
    arguments |= {"num_experts": NUM_EXPERTS} | change
    with pytest.raises(error, match=message):
        jax_moe.apply_routed(**arguments, backend="xla")


def test_a_plan_needs_a_choice():
    counts = {"num_local_experts": 8, "num_experts": NUM_EXPERTS, "backend": "xla"}
    with pytest.raises(ValueError, match=r"topk_ids: expected k of at least 1, got int32 \[4, 0\]"):
        jax_moe.plan_groups(np.zeros((4, 0), np.int32), 0, **counts)


def test_the_workspace_depends_on_k():
    sizes = {"num_local_experts": 8, "hidden_size": 256, "intermediate_size": 128}
    bounds = [jax_moe.workspace_bytes(512, top_k=k, backend="xla", **sizes) for k in (1, 4, 8)]
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[2] == jax_moe.workspace_bytes(512, backend="xla", **sizes)
    with pytest.raises(ValueError, match=r"top_k: expected 1\.\.1073741824, got 0"):
        jax_moe.workspace_bytes(1, top_k=0, **sizes)


def test_values_travel_by_name():
    named = make_inputs(3)
    assert LayerInputs.of(*named.arguments) == named
    weights = named.weights.check()
    assert (weights.num_local_experts, weights.hidden_size, weights.intermediate_size) == (
        8,
        256,
        128,
    )
    doubled = jax.tree.map(lambda a: a[:4], weights)  # a plain pytree
    assert isinstance(doubled, ExpertWeights)
    assert doubled.check().num_local_experts == 4
    shapes = jax.eval_shape(lambda w: w, weights)
    assert shapes.gemm1_weights.shape == weights.gemm1_weights.shape
    with pytest.raises(ValueError, match=r"gemm2_weights: .*E_local = 8 from gemm1_weights"):
        weights._replace(gemm2_weights=weights.gemm2_weights[:2]).check()
    jax.tree.map(lambda _: None, weights)  # building one checks nothing


def test_weights_of_hugging_face_have_the_gate_first():
    weights = make_inputs(1).weights
    swapped = [np.concatenate(np.split(a, 2, axis=1)[::-1], axis=1) for a in weights[:2]]
    for kind in (np.asarray, jnp.asarray):
        given = map(kind, (*swapped, *weights[2:]))
        for got, expected in zip(ExpertWeights.from_gate_up(*given), weights, strict=True):
            assert isinstance(got, type(kind(expected)))
            np.testing.assert_array_equal(bits(got), bits(expected))
    with pytest.raises(ValueError, match=r"gate_up_weights: expected \[E_local, 2\*n, m\]"):
        ExpertWeights.from_gate_up(swapped[0][0], *swapped[1:], *weights[2:])


@pytest.mark.parametrize(
    "name", ["gate_up_weights", "gate_up_weights_scale", "down_weights", "down_weights_scale"]
)
def test_gate_first_weights_that_are_no_arrays(name):
    arrays = dict.fromkeys(("gate_up_weights", "gate_up_weights_scale"), np.zeros((1, 2, 1)))
    arrays |= dict.fromkeys(("down_weights", "down_weights_scale"), np.zeros((1, 1, 1)))
    gone = jnp.zeros((1, 2, 1))
    gone.delete()
    for value in (
        None,
        [[[1.0], [1.0]]],
        5,
        "x",
        jax.ShapeDtypeStruct((1, 2, 1), np.float32),
        gone,
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected a.*, got "):
            ExpertWeights.from_gate_up(**arrays | {name: value})


@pytest.mark.parametrize(
    ("old", "new"),
    [("combine", "unpermute"), ("plan_dispatch", "plan_groups"), ("DispatchPlan", "GroupPlan")],
)
def test_names_of_version_0_1_warn_and_name_the_new_one(old, new):
    with pytest.warns(DeprecationWarning, match=rf"jax_moe\.{old} is now called jax_moe\.{new}"):
        assert getattr(jax_moe, old) is getattr(jax_moe, new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(jax_moe, "no_such_name")


def test_a_router_and_the_layer_after_it_are_one_graph():
    pytest.importorskip("jax_cuda13_plugin")
    from tests.h100_target import compile_for_h100

    inputs = rank_specs(1, num_local=8, hidden=1024, intermediate=512)

    def layer(inputs):
        arguments = routed_arguments(inputs, *softmax_router(inputs.routing_logits, 8))
        return jax_moe.apply_routed(*arguments, num_experts=256, backend="mosaic")

    with jax_moe.assume_device("sm_90"):
        report = compile_for_h100(layer, inputs)
    assert report.launches_outside_command_buffers == 0, str(report)
    assert max(kernel.spill_bytes for kernel in report.kernels) == 0
