"""Which exchange `exchange="auto"` takes; needs eight CPU devices.

`tests/test_parallel.py` runs this file in a process of its own.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax.sharding import AxisType

import jax_moe
from jax_moe.parallel import exchange, ranks, sharded
from tests import h100_target, nvlink_model
from tests.moe_inputs import SMALL, bits
from tests.parallel_cases import Case, arguments, expected

CASE = Case(ranks=4, tokens=3)
LITTLE = functools.partial(jax_moe.expert_parallel, config=SMALL)


def mesh(count=4):
    kinds = (AxisType.Auto,)
    return jax.make_mesh((count,), ("expert",), axis_types=kinds, devices=jax.devices()[:count])


def test_auto_takes_nvlink_from_as_many_tokens_as_were_measured(monkeypatch):
    """Table and kernels are replaced: CPU devices are neither in the one nor have the other."""
    nvlink_model.use_poisoned(monkeypatch)
    monkeypatch.setitem(exchange.NVLINK_FROM, ("cpu", 4), 3)
    monkeypatch.setitem(exchange.NVLINK_FROM, ("cpu", 8), 3)
    sharded._program.cache_clear()  # what other tests have traced would make no exchange
    made, make = [], exchange.make
    monkeypatch.setattr(exchange, "make", lambda *a: made.append(a[0]) or make(*a))
    text = jax_moe.describe_exchange(mesh(), "expert")
    assert "collectives  chosen by auto below 3 tokens per rank" in text.splitlines()
    assert "nvlink       chosen by auto from 3 tokens per rank on" in text.splitlines()
    layer = LITTLE(mesh(), "expert")
    for tokens in (2, 3):
        case = Case(ranks=4, tokens=tokens)
        np.testing.assert_array_equal(bits(layer(*arguments(case))), bits(expected(case)))
    assert made == ["collectives", "nvlink"]
    LITTLE(mesh(), "expert", exchange="collectives")(*arguments(CASE))
    LITTLE(mesh(2), "expert")(*arguments(Case(ranks=2, tokens=4)))
    wider = jax.make_mesh((2, 4), ("x", "expert"), axis_types=(AxisType.Auto,) * 2)
    LITTLE(wider, "expert")(*arguments(CASE))
    assert set(made[2:]) == {"collectives"}, "asked for; of 2 ranks; 4 of 8 devices"
    del made[:]
    inside = functools.partial(jax_moe.apply_expert_parallel, axis_name="expert", config=SMALL)
    in_specs, out_specs = jax_moe.partition_specs("expert")
    for count in (4, 8):  # of eight devices: in a `shard_map` of one's own, which four is not known
        own = jax.shard_map(inside, mesh=mesh(count), in_specs=in_specs, out_specs=out_specs)
        case = Case(ranks=count, tokens=3)
        np.testing.assert_array_equal(bits(jax.jit(own)(*arguments(case))), bits(expected(case)))
    assert made == ["collectives", "nvlink"]


def test_auto_on_described_gpus(monkeypatch):
    """H100s stand for what was measured; the mesh's own device is asked, no device is there."""
    two = h100_target.h100_mesh(1, 2, ("expert",))
    monkeypatch.setitem(exchange.NVLINK_FROM, (two.devices[0].device_kind, 2), 128)

    def states(devices):
        on = jax.sharding.Mesh(np.array(devices), ("expert",), axis_types=(AxisType.Auto,))
        with jax_moe.assume_device("sm_90"):
            lines = jax_moe.describe_exchange(on, "expert").splitlines()[2:]
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}

    assert states(two.devices)["nvlink"] == "chosen by auto from 128 tokens per rank on"
    assert states(two.devices)["collectives"] == "chosen by auto below 128 tokens per rank"
    turned = states(two.devices[::-1])
    assert turned["nvlink"] == "needs a mesh of devices 0..1 in this order, got [1, 0]"
    four_devices = h100_target.h100_mesh(1, 4, ("expert",)).devices
    four = states(four_devices)
    assert states(four_devices[2:])["nvlink"] == (
        "needs a mesh of devices 0..1 in this order, got [2, 3]"
    )
    assert four["nvlink"] == "available; not measured to be faster here"
    assert turned["collectives"] == four["collectives"] == "chosen by auto"
    group = ranks.of_mesh(two, "expert")
    with jax_moe.assume_device("sm_90"):
        for precision, tokens, chosen in (
            ("fast", 127, "collectives"),
            ("fast", 128, "nvlink"),
            ("high", 8192, "collectives"),
        ):
            place = exchange.Place(group, "mosaic", precision, two)
            assert exchange.select("auto", place, tokens) == chosen
