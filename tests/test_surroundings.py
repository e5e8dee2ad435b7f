"""The layer in other surroundings: meshes, several devices, 64-bit mode; other versions of torch.

What surrounds a call in one process is a table in `test_ambient_state.py`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import tomllib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import interop
import jax_moe
from interop.solutions import SOLUTIONS
from jax_moe import ExpertWeights, LayerInputs, LayerWeights, nn
from tests.moe_inputs import (
    SMALL,
    array_arguments,
    make_inputs,
    named_arrays,
    on_device,
    replaced,
)

SHARD_MAP = """
    import functools, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import jax_moe
    from tests.moe_inputs import (
        SMALL, array_arguments, bits, make_inputs, on_device, relative_error)

    assert jax.device_count() == 4
    inputs = on_device(make_inputs(33, num_local_experts=32, offset=0))
    whole = jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla")

    def rank(*arrays):
        offset = jax.lax.axis_index("expert") * arrays[4].shape[0]
        part = jax_moe.apply(*arrays, offset, 2.5, config=SMALL, backend="xla")
        return jax.lax.psum(part.astype(jnp.float32), "expert")

    def placed(mesh, specs):
        pairs = zip(array_arguments(inputs), specs, strict=True)
        return [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in pairs]

    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
    specs = (P(), P(), P(), P(), *[P("expert")] * 4)
    for check_vma in (True, False):
        layer = jax.shard_map(
            rank, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma
        )
        assert relative_error(jax.jit(layer)(*array_arguments(inputs)), whole) < 5e-3

    # The axes of `jax.make_mesh` are Explicit unless it is told otherwise.
    explicit = jax.make_mesh((4,), ("expert",))
    assert explicit.axis_types == (AxisType.Explicit,)
    layer = jax.shard_map(rank, mesh=explicit, in_specs=specs, out_specs=P())
    assert relative_error(jax.jit(layer)(*placed(explicit, specs)), whole) < 5e-3
    everywhere = placed(explicit, [P()] * 8)
    out = jax_moe.apply(*everywhere, 0, 2.5, config=SMALL, backend="xla")
    assert out.sharding.is_fully_replicated and len(out.devices()) == 4
    np.testing.assert_array_equal(bits(out), bits(whole))
    for mesh_of_split, bad in ((explicit, True), (mesh, False)):
        split = [*everywhere[:4], *placed(mesh_of_split, specs)[4:]]
        if not bad:
            split[:4] = placed(mesh, specs)[:4]
        try:
            out = jax_moe.apply(*split, 0, 2.5, config=SMALL, backend="xla")
        except ValueError as error:
            assert bad and "gemm1_weights: expected" in str(error), error
            assert "jax.shard_map" in str(error), error
        else:
            assert not bad
            np.testing.assert_array_equal(bits(out), bits(whole))

    # Tokens split over the devices instead: no communication, the same bits.
    inputs = on_device(make_inputs(64))
    tokens = jax.shard_map(
        lambda *arrays: jax_moe.apply(*arrays, 8, 2.5, config=SMALL, backend="xla"),
        mesh=mesh,
        in_specs=(P("expert"), P(), P("expert"), P(None, "expert"), P(), P(), P(), P()),
        out_specs=P("expert"),
    )
    whole = jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla")
    assert relative_error(jax.jit(tokens)(*array_arguments(inputs)), whole) < 1e-3
    oracle = jax.shard_map(
        lambda *arrays: jax_moe.reference(*arrays, 8, 2.5, config=SMALL),
        mesh=mesh,
        in_specs=(P("expert"), P(), P("expert"), P(None, "expert"), P(), P(), P(), P()),
        out_specs=P("expert"),
    )
    assert relative_error(jax.jit(oracle)(*array_arguments(inputs)), whole) < 0.03
"""

TORCH_IN_A_MESH = """
    import jax, torch
    import jax_moe
    from interop import TorchMoE, torch_moe
    from tests.moe_inputs import SMALL, handle_arguments
    from tests.torch_inputs import torch_inputs

    inputs = torch_inputs(4)
    whole = torch_moe(*inputs.arguments, config=SMALL)
    handle = TorchMoE(inputs.weights, config=SMALL)
    mesh = jax.make_mesh((4,), ("expert",))
    with jax.set_mesh(mesh):
        assert torch.equal(torch_moe(*inputs.arguments, config=SMALL), whole)
        assert torch.equal(handle(*handle_arguments(inputs)), whole)
        assert torch.equal(TorchMoE(inputs.weights, config=SMALL)(*handle_arguments(inputs)), whole)
        assert jax.sharding.get_mesh() == mesh
    first, second = jax.devices()[:2]
    seen, apply = [], jax_moe.apply
    jax_moe.apply = lambda *a, **k: seen.append(jax.config.jax_default_device) or apply(*a, **k)
    with jax.default_device(second):  # tensors stay where they are, and a backend is found there
        result = torch_moe(*inputs.arguments, config=SMALL, out=torch.empty_like(whole))
        assert torch.equal(result, whole)
        assert torch.equal(handle(*handle_arguments(inputs)), whole)
    assert seen and set(seen) == {first}
"""

DEFAULT_DEVICE = """
    import jax, numpy as np, pytest
    import jax_moe
    from jax_moe import nn
    from jax_moe.device import jax_device_of
    from tests.moe_inputs import SMALL, bits, make_inputs, on_device

    first, second = jax.devices()[:2]
    inputs = make_inputs(5)  # NumPy arrays
    expected = bits(jax_moe.apply(*inputs.arguments, config=SMALL))
    here = jax.tree.map(lambda x: jax.numpy.asarray(x), inputs.arguments)  # nobody chose a device
    there = jax.device_put(inputs.arguments, first)
    layer = lambda *given: jax_moe.apply(*given, config=SMALL)
    for call in (layer, jax.jit(layer)):
        with jax.default_device(second):
            assert jax_device_of(here) == second
            assert jax_device_of(there) == first
            for given, device in ((here, second), (there, first), (inputs.arguments, second)):
                out = call(*given)
                assert out.devices() == {device}, (out.devices(), device)
                assert (bits(out) == expected).all()
    mixed = there[:4] + jax.device_put(there[4:8], second) + there[8:]
    said = "gemm1_weights: expected an array on .*:0, as routing_logits is, got one on .*:1"
    with pytest.raises(ValueError, match=said):
        layer(*mixed)
    both = [*here[:2], *there[2:]]  # JAX moves the first two
    assert (bits(layer(*both)) == expected).all()
    said = "got: cpu.; that is where hidden_states was put, and JAX runs the call there"
    with jax.default_device(second), pytest.raises(NotImplementedError, match=said):
        jax_moe.apply(*both, config=SMALL, backend="mosaic")
    said = "that is where one of its arrays was put"
    with jax.default_device(second), pytest.raises(NotImplementedError, match=said):
        jax_moe.quantize(jax.device_put(np.zeros((5, 128), np.float32), first), backend="mosaic")

    x, one, zeros = there[2], there[4:8], jax.numpy.zeros
    config = nn.LayerConfig(SMALL, 32, x.shape[1], one[3].shape[2] * 128,
                            shared_intermediate_size=one[3].shape[2] * 128)
    whole = [jax.numpy.tile(leaf, (32 // len(leaf), 1, 1)) for leaf in one]
    params = jax_moe.LayerWeights(
        jax_moe.ExpertWeights(*whole), zeros((32, x.shape[1])), zeros(32),
        jax_moe.ExpertWeights(*(leaf[:1] for leaf in one)))
    plan = jax_moe.plan_groups(
        np.zeros((5, 4), np.int32), 0, num_local_experts=len(one[0]), num_experts=32)
    rows = jax_moe.quantize(jax.device_put(zeros((5, x.shape[1])), first))
    mesh = jax.make_mesh((2,), ("x",))
    both = jax.NamedSharding(mesh, jax.P())
    for other, name in ((second, ".*:1"), (both, r"2 devices \\(.*:0,")):
        moved = jax.device_put(one, other)
        on = f"expected an array on .*:0, as {{}} is, got one on {name}"
        with pytest.raises(ValueError, match="gemm1_weights: " + on.format("routing_logits")):
            layer(*there[:4], *moved, *there[8:])
        with pytest.raises(ValueError, match="gemm1_weights: " + on.format("routing_logits")):
            jax_moe.reference(*there[:4], *moved, *there[8:], config=SMALL)
        traced = jax.jit(lambda x, moved=moved: jax_moe.reference(
            *there[:2], x, there[3], *moved, *there[8:], config=SMALL))
        if other is second:  # constants of a program may be anywhere
            assert traced(np.asarray(there[2])).shape == there[2].shape
        with pytest.raises(ValueError, match="routing_bias: " + on.format("routing_logits")):
            jax_moe.route(there[0], jax.device_put(there[1], other), 2.5, config=SMALL)
        with pytest.raises(ValueError, match="gemm1_weights: " + on.format("hidden_states")):
            jax_moe.up_project(*rows, *moved[:2], plan)
        with pytest.raises(ValueError, match="params.gate_weight: " + on.format("hidden_states")):
            weights = params._replace(gate_weight=jax.device_put(params.gate_weight, other))
            nn.moe_layer(weights, jax.device_put(zeros((5, x.shape[1])), first), config=config)
        shared = jax_moe.ExpertWeights(*(leaf[:1] for leaf in moved))
        with pytest.raises(ValueError, match="params.shared_experts.gemm1_weights: expected"):
            nn.fuse_shared(params._replace(shared_experts=shared), config)
"""

X64 = """
    import jax, jax.numpy as jnp, numpy as np
    import jax_moe
    from tests.moe_inputs import (
        SMALL, array_arguments, bits, make_inputs, on_device, relative_error)

    assert jnp.arange(3).dtype == jnp.int64
    inputs = make_inputs(64)
    out = jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla")
    assert out.dtype == jnp.bfloat16
    jitted = jax.jit(lambda offset, factor: jax_moe.apply(
        *array_arguments(inputs), offset, factor, config=SMALL, backend="xla"))
    assert (bits(jitted(8, 2.5)) == bits(out)).all()
    assert not bits(jitted(2**32 + 8, 2.5)).any(), "a 64-bit offset must not wrap"
    assert not bits(jitted(-(2**32) + 8, 2.5)).any()
    assert relative_error(jax_moe.reference(*inputs.arguments, config=SMALL), out) < 0.03
    plan = jax_moe.plan_groups(
        np.zeros((3, 4), np.int32), 8, num_local_experts=8, num_experts=32, backend="xla")
    assert {leaf.dtype.name for leaf in plan} == {"int32"}
"""


def run(script: str, **environment: str) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_shard_map_on_four_devices():
    devices = "--xla_force_host_platform_device_count=4"
    run(SHARD_MAP, XLA_FLAGS=f"{devices} --xla_backend_optimization_level=0")


def test_tensors_of_torch_know_of_no_mesh():
    """JAX refuses arrays of one device where `jax.set_mesh` has set a mesh of several."""
    pytest.importorskip("torch")
    devices = "--xla_force_host_platform_device_count=4"
    run(TORCH_IN_A_MESH, XLA_FLAGS=f"{devices} --xla_backend_optimization_level=0")


def test_where_the_default_device_is_another():
    devices = "--xla_force_host_platform_device_count=2"
    run(DEFAULT_DEVICE, XLA_FLAGS=f"{devices} --xla_backend_optimization_level=0")


def test_64_bit_mode():
    run(X64, JAX_ENABLE_X64="1")


def test_another_torch_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.4.1+cu121")
    with pytest.raises(ImportError, match=r"interop\.to_jax: needs torch .*2\.14, got 2\.4\.1"):
        interop.to_jax  # noqa: B018
    for name in ("torch_reference", "sglang_v2", "deepgemm128"):
        reason = SOLUTIONS[name].unavailable_reason()
        assert reason is None or "torch 2.11 to 2.14, got 2.4.1" in reason or "package" in reason
    assert "got 2.4.1" in SOLUTIONS["torch_reference"].unavailable_reason()
    assert SOLUTIONS["torch_reference"].framework == "torch"


def test_no_torch_is_named(monkeypatch):
    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ImportError, match=r"interop\.TorchMoE: package torch is not installed"):
        interop.TorchMoE  # noqa: B018


def test_the_torch_that_is_needed_is_the_one_that_is_pinned():
    project = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())
    low, high = re.findall(r"\d+\.\d+", str(project["project"]["optional-dependencies"]["torch"]))
    oldest, newest = interop.TORCH
    assert low == oldest
    assert float(high.split(".")[1]) == float(newest.split(".")[1]) + 1


@pytest.mark.parametrize(
    ("version", "is_fit"),
    [("2.10.0", False), ("2.11.0+cu130", True), ("2.14.1", True), ("2.15.0", False)],
)
def test_a_torch_of_the_window_is_taken(monkeypatch, version, is_fit):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    assert (interop.torch_problem() is None) == is_fit


def test_importing_compiles_and_loads_nothing():
    run("""
        import sys, jax_moe
        assert not {"torch", "triton", "jax_triton"} & set(sys.modules)
        import jax
        assert not jax._src.xla_bridge.backends_are_initialized()
    """)


ROUTER = jax_moe.MoEConfig(2)
LITTLE = make_inputs(
    4, num_experts=8, num_local_experts=8, hidden_size=128, intermediate_size=128, offset=0
)


def calls_of(inputs):
    """One call of each entry point, by the argument with an axis of T that it checks first."""
    logits, bias, x, x_scale, *weights = array_arguments(inputs)
    ids = jnp.zeros((x.shape[0], 2), jnp.int32)
    experts = {"num_local_experts": 8, "num_experts": 8}
    config = nn.LayerConfig(ROUTER, 8, 128, 128, has_routing_bias=False)
    layer = LayerWeights(ExpertWeights(*weights), np.zeros((8, 128), np.float32), None, None, None)
    mesh = jax.make_mesh((1,), ("expert",))
    ranks = functools.partial(jax_moe.expert_parallel, mesh, "expert", config=ROUTER)
    routed = (x, x_scale, *weights, ids, jnp.ones(ids.shape), 0)
    return [
        ("routing_logits", lambda: jax_moe.apply(*inputs.arguments, config=ROUTER)),
        ("routing_logits", lambda: ranks()(logits, bias, x, x_scale, *weights, 2.5)),
        ("routing_logits", lambda: jax_moe.route(logits, bias, 2.5, config=ROUTER)),
        ("hidden_states", lambda: jax_moe.apply_routed(*routed, num_experts=8)),
        ("hidden_states", lambda: nn.moe_layer(layer, x.astype(jnp.bfloat16), config=config)),
        ("x", lambda: jax_moe.quantize(x.astype(jnp.bfloat16))),
        ("topk_ids", lambda: jax_moe.plan_groups(ids, 0, **experts)),
    ]


@pytest.mark.parametrize("which", range(7))
def test_symbolic_sizes_are_refused_by_name(which):
    (t,) = jax.export.symbolic_shape("t")
    shapes = {"routing_logits": (t, 8), "hidden_states": (t, 128), "hidden_states_scale": (1, t)}
    specs = [
        jax.ShapeDtypeStruct(shapes.get(name, array.shape), array.dtype)
        for name, array in named_arrays(LITTLE).items()
    ]

    def call(*arrays):
        name, function = calls_of(LayerInputs.of(*arrays, 0, 2.5))[which]
        names.append(name)
        return function()

    names: list[str] = []
    with pytest.raises(ValueError, match=r": expected static sizes, got .* \[t, ") as refused:
        jax.export.export(jax.jit(call))(*specs)
    assert str(refused.value).startswith(f"{names[0]}: ")


@pytest.mark.parametrize("which", range(7))
def test_an_assumed_device_runs_nothing(which):
    """It is for tracing, which goes on working."""
    _, call = calls_of(LITTLE)[which]
    said = r"backend='mosaic': needs an NVIDIA GPU .*\(got: cpu; under jax_moe\.assume_device"
    with jax_moe.assume_device("sm_90"):
        with pytest.raises(NotImplementedError, match=said):
            call()
        jax.eval_shape(call)


@pytest.mark.parametrize("how", ["eager", "jit"])
def test_arrays_in_the_memory_of_the_host_are_refused_by_name(how):
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    inputs = on_device(make_inputs(4))
    offloaded = jax.device_put(inputs.weights.gemm2_weights, there)

    def call(weights):
        return jax_moe.apply(*replaced(inputs, gemm2_weights=weights).arguments, config=SMALL)

    call = jax.jit(call) if how == "jit" else call
    message = r"gemm2_weights: expected an array in the device's memory, got float8_e4m3fn \[.*host"
    with pytest.raises(ValueError, match=message):
        call(offloaded)
    moved = jax.device_put(offloaded, jax.memory.Space.Device)
    np.testing.assert_array_equal(call(moved), call(inputs.weights.gemm2_weights))
