"""Bad input of the layer over several ranks, and how it behaves under JAX; needs eight CPU devices.

`tests/test_parallel.py` runs this file in a process of its own.
"""

from __future__ import annotations

import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe
from jax_moe import ExpertWeights, entry
from jax_moe.parallel import sharded
from tests import h100_target
from tests.moe_inputs import SMALL, bits, make_inputs, relative_error, replaced, sharded_arguments
from tests.parallel_cases import (
    FACTOR,
    NUM_EXPERTS,
    Case,
    arguments,
    expected,
    inputs_of,
    mesh_of,
    placement_of,
)

CASE = Case(ranks=4, tokens=3)
LITTLE = functools.partial(jax_moe.expert_parallel, config=SMALL)


def mesh(count=4, axis="expert", kind=AxisType.Auto):
    return jax.make_mesh((count,), (axis,), axis_types=(kind,), devices=jax.devices()[:count])


def changed(**arrays):
    names = dict(zip(sharded._Static(None, (), None, ()).names, arguments(CASE), strict=True))
    assert not set(arrays) - set(names)
    return (names | arrays).values()


def call(count=4, placement=None, num_tokens=None, changes=None, **options):
    layer = LITTLE(mesh(count), "expert", **options)
    return layer(*changed(**changes or {}), placement=placement, num_tokens=num_tokens)


def test_high_precision_sends_16_bits_and_brings_float32_home():
    x = np.random.default_rng(1).standard_normal((12, 256), np.float32).astype(jnp.bfloat16)
    inputs = inputs_of(CASE)._replace(hidden_states=x, hidden_states_scale=None)
    given = sharded_arguments(inputs)
    layer = LITTLE(mesh(), "expert", precision="high", expected_rows=2.0)
    oracle = jax_moe.reference(*inputs.arguments, config=SMALL)
    assert relative_error(layer(*given), oracle) <= 0.004
    program = str(jax.make_jaxpr(layer)(*given))
    assert re.search(r"u16\[12,256\]\S* = all_gather", program)
    assert re.search(r"f32\[4,3,256\]\S* = all_to_all", program)
    bound = functools.partial(
        jax_moe.workspace_bytes, 3, num_local_experts=8, hidden_size=256, intermediate_size=128,
        config=SMALL, num_ranks=4, backend="xla",
    )  # fmt: skip
    assert bound(precision="high") > bound()
    with refused(ValueError, "precision: expected one of .*got 'best'"):
        LITTLE(mesh(), "expert", precision="best")
    with refused(ValueError, "expected_rows: expected a positive number"):
        LITTLE(mesh(), "expert", expected_rows=0)


def test_a_token_has_its_bits_on_any_rank_and_among_any_others(monkeypatch):
    case = Case(ranks=4, tokens=5)
    layer = LITTLE(mesh(), "expert", batch_invariant=True)
    inputs = inputs_of(case)
    seen, compute = [], entry.layer

    def watched(*arrays, options, **static):
        seen.append(options.batch_invariant)
        return compute(*arrays, options=options, **static)

    monkeypatch.setattr(entry, "layer", watched)
    turned = inputs._replace(
        routing_logits=inputs.routing_logits[::-1],
        hidden_states=inputs.hidden_states[::-1],
        hidden_states_scale=inputs.hidden_states_scale[:, ::-1],
    )
    whole = bits(layer(*sharded_arguments(inputs)))
    assert seen == [True]
    np.testing.assert_array_equal(bits(layer(*sharded_arguments(turned))), whole[::-1])
    copies = Case(ranks=4, tokens=5, placement="copies")
    with refused(ValueError, "placement: expected one slot for each of 32 experts", "got 48"):
        layer(*sharded_arguments(inputs_of(copies)), placement=placement_of(copies))
    with refused(TypeError, "batch_invariant: expected a bool, got 'yes'"):
        LITTLE(mesh(), "expert", batch_invariant="yes")


def refused(error, *parts):
    return pytest.raises(error, match=".*".join(parts))


def test_tokens_that_ranks_cannot_share():
    whole = inputs_of(CASE)
    rows = whole.hidden_states[:11]
    cut = {"routing_logits": whole.routing_logits[:11], "hidden_states": rows}
    with refused(ValueError, "hidden_states: expected rows that 4 ranks share equally", "got 11"):
        call(changes=cut | {"hidden_states_scale": whole.hidden_states_scale[:, :11]})
    with refused(ValueError, r"hidden_states: expected .*= \[12, H\]", r"got .*\[11, 256\]"):
        call(changes={"hidden_states": rows})


def test_experts_that_ranks_do_not_hold():
    weights = inputs_of(CASE).weights._asdict()
    with refused(ValueError, "gemm1_weights: expected E_local = E / N = 32 / 4 = 8", "got 4"):
        call(changes={name: array[:16] for name, array in weights.items()})
    with refused(ValueError, "gemm1_weights: expected experts that 4 ranks share", "got 30"):
        call(changes={name: array[:30] for name, array in weights.items()})
    three = Case(ranks=3, tokens=4)
    with refused(ValueError, "axis_name: expected a number of ranks that divides E = 32", "got 3"):
        fewer = {name: array[:30] for name, array in weights.items()}
        LITTLE(mesh(3), "expert")(*sharded_arguments(replaced(inputs_of(three), **fewer)))


def test_a_placement_that_does_not_fit():
    every = np.arange(NUM_EXPERTS, dtype=np.int32)
    with refused(ValueError, "placement: expected every expert of 0..31", "expert 5"):
        call(placement=np.where(every == 5, 4, every))
    with refused(ValueError, r"placement: expected .*\[32\]", r"got int32 \[31\]"):
        call(placement=every[:31])
    with refused(ValueError, r"placement: expected expert ids in 0\.\.31, got 32"):
        call(placement=np.where(every == 5, 32, every))
    with refused(TypeError, "placement: expected int32", "got int64"):
        call(placement=every.astype(np.int64))
    with refused(TypeError, "placement: expected a JAX or NumPy array", "got list"):
        call(placement=every.tolist())


def test_an_expert_without_a_slot_in_a_traced_placement_is_seen():
    every = np.arange(NUM_EXPERTS, dtype=np.int32)
    logits = np.zeros((12, NUM_EXPERTS), np.float32)
    logits[:, :4] = 4
    logits[7, 5] = 8  # only token 7 picks expert 5
    traced = jax.jit(
        lambda placement: call(placement=placement, changes={"routing_logits": logits})
    )
    out = np.asarray(traced(np.where(every == 5, 4, every)), np.float32)
    assert np.isnan(out[7]).all()
    assert np.isfinite(np.delete(out, 7, axis=0)).all()


def test_axes_that_are_not_there():
    with refused(ValueError, "axis_name: expected axes of the mesh", "'expert'", "got 'model'"):
        LITTLE(mesh(), "model")
    for wrong, said in ((3, "got 3"), (10**5000, "got an integer of 16610 bits")):
        with refused(TypeError, "axis_name: expected a mesh axis or", said):
            LITTLE(mesh(), wrong)
    for wrong in (("a", "b", "c"), ("a", "a"), ()):
        with refused(ValueError, "axis_name: expected one axis or two different ones"):
            jax_moe.partition_specs(wrong)
    with refused(ValueError, "axis_name: expected a call inside of jax.shard_map", "outside"):
        jax_moe.apply_expert_parallel(*arguments(CASE), axis_name="expert", config=SMALL)

    def inside(*arrays):
        return jax_moe.apply_expert_parallel(*arrays, axis_name="model", config=SMALL)

    in_specs, out_specs = jax_moe.partition_specs("expert")
    layer = jax.shard_map(inside, mesh=mesh(), in_specs=in_specs, out_specs=out_specs)
    with refused(
        ValueError, "axis_name: expected axes that the surrounding", "'expert'", "'model'"
    ):
        layer(*arguments(CASE))


def test_a_mesh_of_several_kinds():
    with refused(TypeError, "mesh: expected a jax.sharding.Mesh, got AbstractMesh"):
        LITTLE(mesh().abstract_mesh, "expert")
    several = np.array([h100_target.h100_sharding()._device, jax.devices()[0]])
    for function in (LITTLE, jax_moe.describe_exchange):
        with refused(ValueError, "mesh: expected devices of one kind, got NVIDIA H100.*, cpu"):
            function(jax.sharding.Mesh(several, ("expert",)), "expert")


def test_options_that_do_not_exist_or_fit():
    with refused(ValueError, "exchange: expected one of 'auto', ", "got 'carrier pigeon'"):
        call(exchange="carrier pigeon")
    for wrong in (10**5000, ["auto"], np.zeros(2), None):
        with refused(ValueError, "exchange: expected one of 'auto', "):
            LITTLE(mesh(), "expert", exchange=wrong)
    with refused(NotImplementedError, "exchange='two_level': needs axis_name=", "got 'expert'"):
        call(exchange="two_level")
    with refused(NotImplementedError, "exchange='nvlink': needs backend 'mosaic', got 'xla'"):
        call(exchange="nvlink")
    with refused(ValueError, "backend: expected one of", "got 'none'"):
        call(backend="none")
    with refused(NotImplementedError, "backend='mosaic': needs an NVIDIA GPU"):
        call(backend="mosaic")
    with refused(ValueError, r"max_rows_at_once: expected 4\.\.", "got 3"):
        call(max_rows_at_once=3)
    with refused(TypeError, "config: expected a jax_moe.MoEConfig"):
        LITTLE(mesh(), "expert", config=None)
    for flag in ("with_load", "check_vma"):
        with refused(TypeError, f"{flag}: expected a bool, got 'no'"):
            LITTLE(mesh(), "expert", **{flag: "no"})
    for factor, error in (("2.5", TypeError), (np.nan, ValueError)):
        with refused(error, "routed_scaling_factor: expected a"):
            call(changes={"routed_scaling_factor": factor})
    with refused(ValueError, r"num_tokens: expected int32 \[N\] = \[4\]", r"got int32 \[3\]"):
        call(num_tokens=np.ones(3, np.int32))
    for wrong in (-1, 4, 10**9):  # of three tokens of each rank
        each = np.array([3, wrong, 0, 1], np.int32)
        for known in (wrong, np.int64(wrong), each, jnp.array(each)):
            with refused(ValueError, rf"num_tokens: expected 0\.\.3, got {wrong}$"):
                call(num_tokens=known)
    for wrong, found in (([1] * 4, "list"), (1.5, "float"), (True, "bool")):
        expected_kinds = r"num_tokens: expected an integer or int32 \[N\] = \[4\]"
        with refused(TypeError, expected_kinds, f"got {found}"):
            call(num_tokens=wrong)
    with refused(ValueError, "num_ranks: expected 1..", "got 0"):
        jax_moe.workspace_bytes(
            8, num_local_experts=8, hidden_size=256, intermediate_size=128, num_ranks=0
        )


def test_arguments_by_name():
    layer = LITTLE(mesh(), "expert")
    given = arguments(CASE)
    named = dict(zip(sharded._Static(None, (), None, ()).names, given, strict=True))
    out = layer(*given)
    for count in (0, 3):
        rest = dict(reversed(list(named.items())[count:]))
        assert (bits(layer(*given[:count], **rest)) == bits(out)).all()
    few = r"expert_parallel: expected 9 arguments \(routing_logits, .*; .* by name\), got"
    with refused(TypeError, f"{few} 2; missing hidden_states, hidden_states_scale, gemm1_weights,"):
        layer(1, 2)
    with refused(TypeError, f"{few} 9; missing routed_scaling_factor; unknown factor"):
        layer(*given[:-1], factor=2.5)
    with refused(TypeError, f"{few} 10; twice routing_bias"):
        layer(*given, routing_bias=given[1])


def test_a_router_of_ones_own():
    inputs = inputs_of(CASE)
    routing = jax_moe.route(inputs.routing_logits, inputs.routing_bias, FACTOR, config=SMALL)
    ids = np.array(routing.topk_ids)
    ids[4, 1], ids[5] = -1, NUM_EXPERTS + 3
    layer = jax_moe.expert_parallel(mesh(), "expert", num_experts=NUM_EXPERTS, with_load=True)
    routed = inputs.routed(routing._replace(topk_ids=ids))
    *arrays, weights, offset = routed.arguments
    out, load = layer(*arrays, weights)
    wanted = jax_moe.reference_routed(*arrays, weights, offset, num_experts=NUM_EXPERTS)
    assert relative_error(out, wanted) < 0.04
    assert not bits(out)[5].any()
    assert load.sum() == 12 * 4 - 5
    with refused(ValueError, r"topk_weights: expected", r"got float32 \[3, 4\]"):
        layer(*arrays, weights[:3])


def test_rows_that_are_not_quantized_yet():
    inputs = inputs_of(CASE)
    x = np.random.default_rng(0).standard_normal((12, 256), np.float32)
    values, scales = jax_moe.quantize(x)
    layer = LITTLE(mesh(), "expert")
    np.testing.assert_array_equal(
        *(
            bits(layer(*sharded_arguments(inputs._replace(hidden_states=a, hidden_states_scale=b))))
            for a, b in ((x, None), (values, scales))
        )
    )


def test_beside_a_data_axis_and_under_transformations():
    """Two groups of four ranks, each with tokens of its own and the same experts."""
    both = jax.make_mesh(
        (2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()
    )
    tokens, split = P(("data", "expert")), P("expert")
    layer = jax.shard_map(
        functools.partial(jax_moe.apply_expert_parallel, axis_name="expert", config=SMALL),
        mesh=both,
        in_specs=(tokens, P(), tokens, P(None, ("data", "expert")), *(split,) * 4, P()),
        out_specs=tokens,
    )
    inputs = inputs_of(CASE)
    twice = inputs._replace(
        routing_logits=np.concatenate([inputs.routing_logits] * 2),
        hidden_states=np.concatenate([inputs.hidden_states] * 2),
        hidden_states_scale=np.concatenate([inputs.hidden_states_scale] * 2, axis=1),
    )
    logits, *others = sharded_arguments(twice)
    out = jax.jit(layer)(logits, *others)
    np.testing.assert_array_equal(bits(out), np.concatenate([bits(expected(CASE))] * 2))
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(lambda logits: layer(logits, *others).astype(float).sum())(logits)


def test_a_batch_of_calls():
    logits, *others = arguments(CASE)
    layer = LITTLE(mesh(), "expert")
    batch = np.stack([logits, logits[::-1]])
    outs = jax.vmap(lambda logits: layer(logits, *others))(batch)
    np.testing.assert_array_equal(bits(outs[0]), bits(layer(logits, *others)))
    np.testing.assert_array_equal(bits(outs[1]), bits(layer(logits[::-1], *others)))


@pytest.fixture
def compilations():
    """Names of what JAX has compiled since."""
    seen = []

    def listen(event, *_, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(about)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_new_values_do_not_recompile_and_equal_calls_give_equal_bits(compilations):
    rng = np.random.default_rng(0)
    inputs = inputs_of(CASE)
    outs = []
    for i in range(3):
        placement = rng.permutation(NUM_EXPERTS).astype(np.int32)
        weights = ExpertWeights(*(array[placement] for array in inputs.weights))
        changed = inputs._replace(weights=weights, routed_scaling_factor=FACTOR + i)
        layer = LITTLE(mesh(), "expert", with_load=True)  # made anew, as some would
        call = functools.partial(layer, *sharded_arguments(changed), placement=placement)
        if i == 1:
            assert compilations
            del compilations[:]
        outs.append([call(num_tokens=3 - i) for _ in range(2)])
    assert not compilations
    for (out, load), (again, load_again) in outs:
        np.testing.assert_array_equal(bits(out), bits(again))
        np.testing.assert_array_equal(load, load_again)
    assert [int(load.sum()) for (_, load), _ in outs] == [48, 32, 16]


def test_arguments_that_already_lie_as_the_specs_say_are_not_copied():
    for kind in (AxisType.Auto, AxisType.Explicit):
        over = mesh(kind=kind)
        in_specs, out_specs = jax_moe.partition_specs("expert")
        placed = [
            jax.device_put(array, NamedSharding(over, spec))
            for array, spec in zip(arguments(CASE), in_specs, strict=True)
        ]
        layer = jax.jit(LITTLE(over, "expert"))
        out = layer(*placed)
        assert out.sharding.is_equivalent_to(NamedSharding(over, out_specs), out.ndim)
        text = layer.lower(*placed).compile().as_text()
        assert text.count("all-gather-start(") + text.count("all-gather(") == 4
        assert text.count(" all-to-all(") == 1


def test_arguments_on_other_devices_are_moved(monkeypatch):
    elsewhere = jax.device_put([*changed()], jax.devices()[5])
    two = jax.make_mesh((2,), ("x",), devices=jax.devices()[6:8])
    elsewhere[4] = jax.device_put(elsewhere[4], NamedSharding(two, P()))
    monkeypatch.setattr(sharded, "_program", lambda *_: lambda arguments, *_: arguments)
    moved = LITTLE(mesh(), "expert")(*elsewhere)
    in_specs, _ = jax_moe.partition_specs("expert")
    for array, given, spec in zip(moved, arguments(CASE), in_specs, strict=True):
        assert array.sharding == NamedSharding(mesh(), spec)
        np.testing.assert_array_equal(*np.asarray([array, given], np.float32))
    assert all(map(operator.is_, LITTLE(mesh(), "expert")(*moved), moved))


def test_what_a_mesh_can_do_is_said():
    lines = jax_moe.describe_exchange(mesh(), "expert").splitlines()
    assert lines[0] == "ranks: 4 (expert=4), backend xla"
    assert "4 x cpu, 1 process" in lines[1]
    states = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[2:]}
    assert states["collectives"] == "chosen by auto"
    assert states["two_level"].startswith("needs axis_name=(host axis, device axis)")
    assert states["nvlink"] == "needs backend 'mosaic', got 'xla'"
    hosts = mesh_of(Case(8, 1, exchange="two_level"))
    assert "two_level    chosen by auto" in jax_moe.describe_exchange(hosts, ("host", "device"))


def test_more_pieces_take_less_memory():
    sizes = {"num_local_experts": 4, "hidden_size": 256, "intermediate_size": 128}
    found = []
    inputs = make_inputs(8 * 512, num_experts=32, num_local_experts=32, offset=0)
    for rows in (4096, 1024):
        layer = LITTLE(mesh(8), "expert", max_rows_at_once=rows)
        specs = [
            jax.ShapeDtypeStruct(np.shape(array), jnp.result_type(array))
            for array in sharded_arguments(inputs)
        ]
        memory = jax.jit(layer).lower(*specs).compile().memory_analysis()
        bound = jax_moe.workspace_bytes(
            512, config=SMALL, num_ranks=8, max_rows_at_once=rows, **sizes
        )
        found.append(memory.temp_size_in_bytes / 8)
        assert found[-1] <= bound
    assert sorted(found, reverse=True) == found
