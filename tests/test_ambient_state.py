"""What surrounds a call, by backend: the same bits everywhere, or one message of ours.

Meshes of one device do: types are what differs. Values on four devices: `test_surroundings.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe
from jax_moe import LayerInputs, nn
from jax_moe.checkpoint import pad_intermediate
from jax_moe.types import LayerWeights
from tests.backend_cases import EVERYWHERE, running
from tests.moe_inputs import array_arguments, bits, make_inputs, on_device, replaced

CONFIG = jax_moe.MoEConfig(top_k=2, n_group=1, topk_group=1)
INPUTS = make_inputs(
    4, num_experts=8, num_local_experts=8, hidden_size=128, intermediate_size=128, offset=0
)
SPECS = (P(), P(), P(), P(), *[P("x")] * 4, P(), P())  # experts over the mesh


def mesh(axes: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("x",), axis_types=(axes,))


def alone(layer: Callable[..., Any]) -> Callable[..., Any]:
    return layer


def in_scan(layer: Callable[..., Any]) -> Callable[..., Any]:
    """The layer's output is what the loop carries."""

    def scanned(*arguments: Any) -> Any:
        step = lambda out, _: (layer(*arguments), None)  # noqa: E731
        return jax.lax.scan(step, layer(*arguments), length=2)[0]

    return scanned


def in_cond(layer: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(*arguments: Any) -> Any:
        both = lambda: layer(*arguments), lambda: 2 * layer(*arguments)
        return jax.lax.cond(LayerInputs.of(*arguments).routing_logits[0, 0] < 1e9, *both)

    return chosen


def in_vmap(layer: Callable[..., Any]) -> Callable[..., Any]:
    def batched(*arguments: Any) -> Any:
        axes = [0] + [None] * 9
        logits, *rest = arguments
        return jax.vmap(layer, axes)(jnp.stack([logits] * 2), *rest)[1]

    return batched


def in_shard_map(axes: AxisType, check_vma: bool, inner: Callable[..., Any] = alone) -> Any:
    """Experts over the mesh; `inner` surrounds each rank's part."""

    def wrap(layer: Callable[..., Any]) -> Callable[..., Any]:
        def rank(*arguments: Any) -> Any:
            offset = jax.lax.axis_index("x") * 8
            inputs = LayerInputs.of(*arguments)._replace(local_expert_offset=offset)
            part = inner(layer)(*inputs.arguments)
            return jax.lax.psum(part.astype(jnp.float32), "x").astype(jnp.bfloat16)

        return jax.shard_map(
            rank, mesh=mesh(axes), in_specs=SPECS, out_specs=P(), check_vma=check_vma
        )

    return wrap


class Surrounding(NamedTuple):
    """How the layer is called.

    Attributes:
        wrap: Makes the function that is called of the layer.
        context: Around the call.
        axes: The arguments are on a mesh with such axes; None leaves them on their device.
        specs: How they are placed on it.
    """

    wrap: Callable[..., Any] = alone
    context: Callable[[], Any] = contextlib.nullcontext
    axes: AxisType | None = None
    specs: tuple[P, ...] = (P(),) * 10


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SURROUNDINGS = {
    "nothing": Surrounding(),
    "Auto mesh": Surrounding(axes=AUTO),
    "Explicit mesh": Surrounding(axes=EXPLICIT),
    "Explicit mesh, scan": Surrounding(in_scan, axes=EXPLICIT),
    "Explicit mesh, cond": Surrounding(in_cond, axes=EXPLICIT),
    "Explicit mesh, vmap": Surrounding(in_vmap, axes=EXPLICIT),
    "set_mesh, Auto": Surrounding(context=lambda: jax.set_mesh(mesh(AUTO))),
    "set_mesh, Explicit": Surrounding(context=lambda: jax.set_mesh(mesh(EXPLICIT))),
    "shard_map": Surrounding(in_shard_map(AUTO, True), axes=AUTO, specs=SPECS),
    "shard_map, no vma": Surrounding(in_shard_map(AUTO, False), axes=AUTO, specs=SPECS),
    "shard_map, Explicit": Surrounding(in_shard_map(EXPLICIT, True), axes=EXPLICIT, specs=SPECS),
    "shard_map, Explicit, no vma": Surrounding(
        in_shard_map(EXPLICIT, False), axes=EXPLICIT, specs=SPECS
    ),
    "scan in shard_map": Surrounding(in_shard_map(AUTO, True, in_scan), axes=AUTO, specs=SPECS),
    "cond in shard_map": Surrounding(in_shard_map(AUTO, True, in_cond), axes=AUTO, specs=SPECS),
    "scan in shard_map, Explicit, no vma": Surrounding(
        in_shard_map(EXPLICIT, False, in_scan), axes=EXPLICIT, specs=SPECS
    ),
    "cond in shard_map, Explicit": Surrounding(
        in_shard_map(EXPLICIT, True, in_cond), axes=EXPLICIT, specs=SPECS
    ),
    "scan": Surrounding(in_scan),
    "cond": Surrounding(in_cond),
    "rank promotion raises": Surrounding(context=lambda: jax.numpy_rank_promotion("raise")),
    "dtype promotion strict": Surrounding(context=lambda: jax.numpy_dtype_promotion("strict")),
    "transfer guard": Surrounding(context=lambda: jax.transfer_guard("disallow")),
}

# Tested by default: each kind once. The rest of the products runs with `make test-slow`.
JITTED = {
    "Explicit mesh", "Explicit mesh, vmap", "set_mesh, Explicit", "shard_map, Explicit",
    "scan in shard_map, Explicit, no vma", "cond in shard_map", "transfer guard",
}  # fmt: skip
EAGER = {"nothing", "Explicit mesh", "rank promotion raises", "transfer guard"}
LOWERED = {"Explicit mesh", "shard_map, Explicit", "rank promotion raises"}


def cells(default: set[str]) -> list[Any]:
    return [
        pytest.param(name, id=name, marks=[] if name in default else pytest.mark.slow)
        for name in SURROUNDINGS
    ]


def layer(backend: str) -> Callable[..., Any]:
    return lambda *arguments: jax_moe.apply(*arguments, config=CONFIG, backend=backend)


def placed(surrounding: Surrounding) -> list[Any]:
    arrays = [*array_arguments(INPUTS), np.int32(INPUTS.local_expert_offset), np.float32(2.5)]
    if surrounding.axes is None:
        return [jnp.asarray(array) for array in arrays]
    on = mesh(surrounding.axes)
    pairs = zip(arrays, surrounding.specs, strict=True)
    return [jax.device_put(array, NamedSharding(on, spec)) for array, spec in pairs]


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """Bits by backend, of the call that nothing surrounds."""
    return {}


def check(expected: dict[str, np.ndarray], name: str, case: str, jitted: bool) -> None:
    surrounding = SURROUNDINGS[name]
    with running(case) as backend:
        if backend not in expected:
            expected[backend] = bits(layer(backend)(*INPUTS.arguments))
        arguments = placed(surrounding)
        called = surrounding.wrap(layer(backend))
        with surrounding.context():
            out = (jax.jit(called) if jitted else called)(*arguments)
    np.testing.assert_array_equal(bits(out), expected[backend])


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("name", cells(JITTED))
def test_jit(expected, name, case):
    check(expected, name, case, jitted=True)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("name", cells(EAGER))
def test_eager(expected, name, case):
    check(expected, name, case, jitted=False)


@pytest.mark.parametrize("backend", ["mosaic", "triton"])
@pytest.mark.parametrize("name", cells(LOWERED))
def test_lowered_for_hopper(name, backend):
    """The kernels, where there is no GPU."""
    surrounding = SURROUNDINGS[name]
    arguments = placed(surrounding)
    with jax_moe.assume_device("sm_90"), surrounding.context():
        traced = jax.jit(surrounding.wrap(layer(backend))).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert lowered.out_info.shape == (4, 128)
    assert "custom_call" in lowered.as_text()


def split(name: str, spec: P) -> list[Any]:
    """The arguments over an Explicit mesh, one of them split."""
    specs = replaced(LayerInputs.of(*[P()] * 10), **{name: spec})
    return placed(Surrounding(axes=EXPLICIT, specs=specs.arguments))


@pytest.mark.parametrize("backend", jax_moe.backends.NAMES)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("routing_logits", P("x")),
        ("hidden_states", P(None, "x")),
        ("gemm1_weights", P("x")),
        ("gemm2_weights_scale", P(None, None, "x")),
    ],
)
def test_arrays_split_over_explicit_axes_are_refused(name, spec, jitted, backend):
    arguments = split(name, spec)
    called = layer(backend)
    said = rf"^{name}: expected an array that is whole .* split as P\(.*'x'.*jax\.shard_map"
    with jax_moe.assume_device("sm_90"), pytest.raises(ValueError, match=said):
        (jax.jit(called) if jitted else called)(*arguments)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    "name", ["hidden_states", "params.gate_weight", "params.experts.gemm1_weights"]
)
def test_the_whole_layer_names_them_as_its_caller_does(name, batch_invariant):
    inputs = LayerInputs.of(*placed(SURROUNDINGS["nothing"]))
    experts, (num_tokens, hidden_size) = inputs.weights, inputs.hidden_states.shape
    held, _, intermediate_size = experts.gemm2_weights.shape
    config = nn.LayerConfig(CONFIG, held, hidden_size, intermediate_size, has_routing_bias=False)
    given = {
        "hidden_states": jnp.ones((num_tokens, hidden_size), jnp.bfloat16),
        "params.gate_weight": jnp.ones((held, hidden_size), jnp.bfloat16),
        "params.experts.gemm1_weights": experts.gemm1_weights,
    }
    given[name] = jax.device_put(given[name], NamedSharding(mesh(EXPLICIT), P("x")))
    x, gate_weight, gemm1_weights = given.values()
    params = LayerWeights(experts._replace(gemm1_weights=gemm1_weights), gate_weight)
    with pytest.raises(ValueError, match=rf"^{name}: expected an array that is whole .*'x'"):
        nn.moe_layer(params, x, config=config, batch_invariant=batch_invariant)


def test_stages_refuse_them_as_well():
    logits, bias, *_ = split("routing_logits", P("x"))
    with pytest.raises(ValueError, match=r"^routing_logits: .*jax\.shard_map"):
        jax_moe.route(logits, bias, 2.5, config=CONFIG)
    with pytest.raises(ValueError, match=r"^x: .*jax\.shard_map"):
        jax_moe.quantize(jax.device_put(jnp.ones((2, 128)), logits.sharding))
    ids = jax.device_put(jnp.zeros((4, 2), jnp.int32), logits.sharding)
    plan_groups = functools.partial(jax_moe.plan_groups, num_local_experts=8, num_experts=8)
    with pytest.raises(ValueError, match=r"^topk_ids: .*jax\.shard_map"):
        plan_groups(ids, 0)
    plan = plan_groups(np.asarray(ids), 0)
    plan = plan._replace(pair_row=jax.device_put(plan.pair_row, logits.sharding))
    inputs = LayerInputs.of(*placed(SURROUNDINGS["nothing"]))
    with pytest.raises(ValueError, match=r"^plan\.pair_row: .*jax\.shard_map"):
        jax_moe.up_project(
            inputs.hidden_states,
            inputs.hidden_states_scale,
            inputs.weights.gemm1_weights,
            inputs.weights.gemm1_weights_scale,
            plan,
        )
    rows = jnp.zeros((plan.row_token.size, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"^plan\.pair_row: .*jax\.shard_map"):
        jax_moe.unpermute(rows, jnp.ones((4, 2)), plan)
    activations = jax_moe.quantize(rows)
    with pytest.raises(ValueError, match=r"^plan\.pair_row: .*jax\.shard_map"):
        jax_moe.down_project(
            activations, inputs.weights.gemm2_weights, inputs.weights.gemm2_weights_scale, plan
        )


@pytest.mark.parametrize("spelled", [int, np.int32, jnp.int32], ids=["int", "numpy", "jax"])
def test_numbers_cross_a_transfer_guard(spelled):
    """Ours to upload; a NumPy array is the caller's, and the guard stops it."""
    inputs = on_device(INPUTS)
    nothing = inputs._replace(
        routing_logits=inputs.routing_logits[:0],
        hidden_states=inputs.hidden_states[:0],
        hidden_states_scale=inputs.hidden_states_scale[:, :0],
    )
    arrays, empty = array_arguments(inputs), array_arguments(nothing)
    offset, live, factor = spelled(0), spelled(3), jnp.float32(2.5)
    with jax.transfer_guard("disallow"):
        out = layer("xla")(*arrays, offset, factor)
        some = jax_moe.apply(*arrays, offset, 2.5, num_tokens=live, config=CONFIG, backend="xla")
        routing = jax_moe.route(inputs.routing_logits, inputs.routing_bias, 2.5, config=CONFIG)
        jax_moe.plan_groups(routing.topk_ids, offset, num_local_experts=8, num_experts=8)
        jax_moe.reference(*arrays, offset, 2.5, config=CONFIG)
        none = layer("xla")(*empty, offset, 2.5)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
            layer("xla")(*array_arguments(INPUTS), offset, factor)
    assert none.shape == (0, 128)
    np.testing.assert_array_equal(bits(some)[:3], bits(out)[:3])
    assert not bits(some)[3].any()


def test_weights_that_are_made_under_a_transfer_guard():
    weights = INPUTS.weights
    short = weights._replace(
        gemm1_weights=weights.gemm1_weights[:, :192], gemm2_weights=weights.gemm2_weights[:, :, :96]
    )
    on_host = jax_moe.ExpertWeights.from_gate_up(*weights), pad_intermediate(short, first_row=8)
    there, short_there = jax.tree.map(jnp.asarray, (weights, short))
    with jax.transfer_guard("disallow"):
        made = (
            jax_moe.ExpertWeights.from_gate_up(*there),
            pad_intermediate(short_there, first_row=8),
        )
    for array, wanted in zip(jax.tree.leaves(made), jax.tree.leaves(on_host), strict=True):
        assert isinstance(array, jax.Array)
        np.testing.assert_array_equal(bits(array), bits(wanted))
