"""JAX's settings around the layer over several ranks; needs eight CPU devices.

`tests/test_parallel.py` runs this file in a process of its own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe
from tests.backend_cases import slow
from tests.moe_inputs import SMALL, bits
from tests.parallel_cases import (
    FACTOR,
    Case,
    arguments,
    expected,
    live_tokens,
    mesh_of,
    placement_of,
    run,
)

CASE = Case(ranks=4, tokens=3, placement="copies", live="some")


def layer_and_arrays(case):
    """The layer, and its arguments but the factor where `partition_specs` says."""
    over = mesh_of(case)
    layer = jax_moe.expert_parallel(over, "expert", config=SMALL, with_load=True)
    in_specs, _ = jax_moe.partition_specs("expert")
    pairs = zip(arguments(case)[:8], in_specs[:8], strict=True)
    return layer, [jax.device_put(array, NamedSharding(over, spec)) for array, spec in pairs]


def test_ranks_and_dtypes_that_are_not_promoted():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        out, load = run(CASE)
    np.testing.assert_array_equal(bits(out), bits(expected(CASE)))
    assert load.sum() == live_tokens(CASE).sum() * SMALL.top_k


@pytest.mark.parametrize(
    ("first", "ranks"),
    [
        (AxisType.Auto, "data"),
        (AxisType.Auto, "expert"),
        (AxisType.Explicit, ("data", "expert")),
        slow(AxisType.Auto, ("data", "expert")),
        slow(AxisType.Explicit, "data"),
        slow(AxisType.Explicit, "expert"),
    ],
)
def test_a_mesh_of_auto_and_explicit_axes(first, ranks):
    second = AxisType.Auto if first is AxisType.Explicit else AxisType.Explicit
    mesh = jax.make_mesh(
        (2, 2), ("data", "expert"), axis_types=(first, second), devices=jax.devices()[:4]
    )
    case = Case(ranks=4 if len(ranks) == 2 else 2, tokens=3)
    exchange = "collectives"
    layer = jax_moe.expert_parallel(mesh, ranks, config=SMALL, exchange=exchange, with_load=True)
    in_specs, _ = jax_moe.partition_specs(ranks)
    put = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(arguments(case)[:8], in_specs[:8], strict=True)
    ]
    for arrays in (arguments(case)[:8], put):
        out, _ = jax.jit(layer)(*arrays, FACTOR)
        np.testing.assert_array_equal(bits(out), bits(expected(case)))


def test_a_transfer_guard():
    """Numbers are ours to upload, and arrays of JAX ours to move; a NumPy array is the caller's."""
    case = CASE._replace(mesh="explicit")
    layer, arrays = layer_and_arrays(case)
    *_, factor = arguments(case)
    elsewhere = [jnp.asarray(array) for array in arguments(case)[:8]]
    live, placement = jnp.asarray(live_tokens(case)), jnp.asarray(placement_of(case))
    with jax.transfer_guard("disallow"):
        out, _ = layer(*arrays, float(factor), num_tokens=live, placement=placement)
        moved, _ = layer(*elsewhere, np.float32(factor), num_tokens=live, placement=placement)
        counts = [
            layer(*arrays, factor, num_tokens=number, placement=placement)[1].sum()
            for number in (2, np.int64(2))
        ]
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
            layer(*arrays, factor, num_tokens=live, placement=placement_of(case))
    for found in (out, moved):
        np.testing.assert_array_equal(bits(found), bits(expected(case)))
    assert [int(count) for count in counts] == [4 * 2 * SMALL.top_k] * 2


def test_another_mesh_that_is_set():
    """Eager calls leave it, whatever it is made of; where JAX traces, both are named."""
    layer, arrays = layer_and_arrays(CASE)
    call = functools.partial(layer, num_tokens=live_tokens(CASE), placement=placement_of(CASE))
    devices = np.array(jax.devices())
    others = [
        Mesh(devices.reshape(2, 4), ("data", "expert"), axis_types=(AxisType.Explicit,) * 2),
        Mesh(devices[3::-1], ("expert",), axis_types=(AxisType.Auto,)),
    ]
    for other, given in zip(others, (list(arguments(CASE)[:8]), arrays), strict=True):
        with jax.set_mesh(other):
            given[2] = jnp.asarray(np.asarray(given[2]))  # made on that mesh
            out, _ = call(*given, FACTOR)
        np.testing.assert_array_equal(bits(out), bits(expected(CASE)))
        assert out.sharding.mesh == mesh_of(CASE)
    said = r"mesh: expected the one that jax\.set_mesh .*'data': 2.*, got Mesh\('expert': 4"
    with jax.set_mesh(others[0]), pytest.raises(ValueError, match=said):
        jax.jit(call)(*arguments(CASE))
    inside = jax.shard_map(
        lambda *given: call(*given)[0], mesh=mesh_of(CASE), in_specs=P(), out_specs=P()
    )
    with pytest.raises(ValueError, match=r"mesh: expected a call outside of jax\.shard_map, got"):
        inside(*arguments(CASE))
