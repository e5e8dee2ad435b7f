"""The whole layer: `moe_layer` against NumPy, fused and not, gated and not, transformed."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export
from scipy import special

import jax_moe
from jax_moe import MoEConfig, nn
from jax_moe.types import ExpertWeights, LayerWeights
from tests import numpy_oracle
from tests.moe_inputs import bits, make_inputs, relative_error

CONFIG = nn.LayerConfig(
    MoEConfig(2, 2, 1, swiglu_limit=1.5),
    num_experts=8,
    hidden_size=256,
    intermediate_size=128,
    routed_scaling_factor=2.5,
    shared_intermediate_size=256,
    shared_swiglu_limit=1.5,
    has_shared_gate=True,
)
ONE = MoEConfig(1, scoring="softmax", swiglu_limit=1.5)  # one expert, of weight 1


def make(config=CONFIG, seed=0):
    """Weights of a layer, NumPy arrays."""
    rng = np.random.default_rng(seed)
    sizes = {"hidden_size": config.hidden_size, "offset": 0, "seed": seed}
    routed = make_inputs(
        1,
        num_experts=config.num_experts,
        num_local_experts=config.num_experts,
        intermediate_size=config.intermediate_size,
        **sizes,
    )
    shared = None
    if config.shared_intermediate_size:
        width = config.shared_intermediate_size
        one = make_inputs(1, num_experts=2, num_local_experts=1, intermediate_size=width, **sizes)
        shared = one.weights
    gate = rng.standard_normal((config.num_experts, config.hidden_size)) / 16
    return LayerWeights(
        routed.weights,
        gate.astype(ml_dtypes.bfloat16),
        routed.routing_bias.astype(np.float32) if config.has_routing_bias else None,
        shared,
        rng.standard_normal((1, config.hidden_size), np.float32) / 16
        if config.has_shared_gate
        else None,
    )


def hidden(*shape, seed=1):
    x = np.random.default_rng(seed).standard_normal((*shape, 256), np.float32)
    return x.astype(ml_dtypes.bfloat16)


def numpy_layer(params, x, config=CONFIG, requantize=True):
    rows = np.asarray(x, np.float64).reshape(-1, config.hidden_size)
    x32 = rows.astype(np.float32)
    logits = (rows @ np.asarray(params.gate_weight, np.float64).T).astype(np.float32)
    out = numpy_oracle.layer(
        logits, params.e_score_correction_bias, x32, None, *params.experts, 0,
        config.routed_scaling_factor, config=config.router, requantize=requantize,
    )  # fmt: skip
    if params.shared_experts is not None:
        nothing = np.zeros((len(rows), 1), np.float32)
        shared = numpy_oracle.layer(
            nothing, None, x32, None, *params.shared_experts, 0, 1.0,
            config=ONE, requantize=requantize,
        )  # fmt: skip
        if config.has_shared_gate:
            shared *= special.expit(rows @ np.asarray(params.shared_gate, np.float64).T)
        out = out + shared
    return out.reshape(x.shape)


@functools.cache
def jitted(config=CONFIG, **options):
    return jax.jit(functools.partial(nn.moe_layer, config=config, backend="xla", **options))


def test_against_numpy_with_and_without_fusion():
    params, x = make(), hidden(3, 5)
    expected = numpy_layer(params, x)
    out, load = jitted(with_load=True)(params, x, num_tokens=np.int32(15))
    assert (out.shape, out.dtype) == (x.shape, jnp.bfloat16)
    assert relative_error(out, expected) < 0.006
    assert load.shape == (8,)
    assert load.sum() == 15 * 2
    fused = nn.fuse_shared(params, CONFIG)
    assert fused.experts.num_local_experts == 10
    assert relative_error(jitted()(fused, x), expected) < 0.006


def test_ranks_that_are_not_promoted():
    params, x = make(), hidden(3, 5)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for weights in (params, nn.fuse_shared(params, CONFIG)):
            for options in ({}, {"precision": "high", "batch_invariant": True}):
                layer = functools.partial(
                    nn.moe_layer, config=CONFIG, backend="xla", with_load=True, **options
                )
                out, load = jax.eval_shape(layer, weights, x, num_tokens=np.int32(15))
                assert (out.shape, load.shape) == (x.shape, (8,))


def test_numbers_cross_a_transfer_guard():
    """Ours to upload; a NumPy array is the caller's, and the guard stops it."""
    config = dataclasses.replace(CONFIG, has_shared_gate=False)
    params, x = jax.tree.map(jnp.asarray, (make(config), hidden(4)))
    layer = functools.partial(nn.moe_layer, config=config, backend="xla")
    wanted = layer(params, x)
    with jax.transfer_guard("disallow"):
        out, load = layer(params, x, with_load=True, num_tokens=4)
        fused = layer(nn.fuse_shared(params, config), x, batch_invariant=True)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
            layer(params, hidden(4))
    np.testing.assert_array_equal(bits(out), bits(wanted))
    assert relative_error(fused, wanted) < 0.006
    assert load.sum() == 4 * 2


def test_tiles_are_as_tall_as_a_fused_shared_expert_needs(monkeypatch):
    rows = []

    def recorded(inputs, *, num_experts, expected_rows=None, **options):
        rows.append((num_experts, expected_rows))
        return jnp.zeros(inputs.hidden_states.shape, jnp.bfloat16)

    monkeypatch.setattr("jax_moe.entry.run_routed", recorded)
    router = dataclasses.replace(CONFIG.router, top_k=1)  # T/8 rows per routed expert
    config, params = dataclasses.replace(CONFIG, router=router), make()
    fused = nn.fuse_shared(params, config)
    for num_tokens in (8, 64, 200):
        for weights in (params, fused):
            nn.moe_layer(weights, hidden(num_tokens), config=config, backend="xla")
    routed, of_fused = CONFIG.num_experts, CONFIG.num_experts + 2
    assert rows == [
        *((routed, 1.0), (1, None), (of_fused, 2.0)),
        *((routed, 8.0), (1, None), (of_fused, 16)),
        *((routed, 25.0), (1, None), (of_fused, 25.0)),
    ]


def test_precision_is_that_of_routed_and_shared_experts():
    params, x = make(), hidden(3, 5)
    exact = numpy_layer(params, x, requantize=False)
    fast, _ = jitted(with_load=True)(params, x, num_tokens=np.int32(15))
    assert relative_error(fast, exact) > 0.02
    rounded = exact.astype(jnp.bfloat16)  # once, after the shared experts
    assert relative_error(jitted(precision="high")(params, x), rounded) < 0.0012
    with pytest.raises(ValueError, match=r"precision: expected one of .*got 'best'"):
        nn.moe_layer(params, x, config=CONFIG, precision="best")


def test_plain_layers_without_bias_or_shared_experts():
    config = dataclasses.replace(
        CONFIG,
        router=MoEConfig(2, scoring="softmax", swiglu_limit=1.5),
        has_routing_bias=False,
        shared_intermediate_size=0,
        shared_swiglu_limit=None,
        has_shared_gate=False,
    )
    params, x = make(config), hidden(7)
    out = jitted(config)(params, x)
    assert relative_error(out, numpy_layer(params, x, config)) < 0.006


def test_scan_over_layers_vmap_and_export():
    """All three in one program, against one layer and one batch after the other."""
    layers = [make(seed=seed) for seed in (0, 1)]
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda *leaves: np.stack(leaves), *layers))
    batch = np.stack([hidden(6), hidden(6, seed=2)])

    def body(x, params):
        return nn.moe_layer(params, x, config=CONFIG, backend="xla"), None

    @jax.jit
    def both_layers(leaves, batch):
        return jax.vmap(lambda x: jax.lax.scan(body, x, tree.unflatten(leaves))[0])(batch)

    exported = export.export(both_layers)(leaves, batch)
    outs = exported.call(leaves, batch)
    for x, out in zip(batch, outs, strict=True):
        for layer in layers:
            x = jitted()(layer, x)
        np.testing.assert_array_equal(bits(out), bits(x))


def test_dead_tokens_come_out_as_zeros_and_are_not_counted():
    params, x = make(), hidden(3, 5)
    out, load = jitted(with_load=True)(params, x, num_tokens=np.int32(4))
    rows = bits(out).reshape(15, 256)
    assert not rows[4:].any()
    assert rows[:4].any()
    assert load.sum() == 4 * 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate_weight": np.zeros((9, 256), np.float32)}, ValueError, "gate_weight: .*E = 8 from"),
        ({"e_score_correction_bias": None}, ValueError, "e_score_correction_bias: expected an arr"),
        ({"shared_gate": None}, TypeError, "shared_gate: .*got None"),
        ({"shared_experts": None}, ValueError, "8 experts and, without shared_experts, 2 fused"),
        (
            {"experts": (1, 2)},
            TypeError,
            r"params\.experts: expected a jax_moe\.ExpertWeights, .*tup",
        ),
    ],
)
def test_bad_weights_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        nn.moe_layer(make()._replace(**change), hidden(2), config=CONFIG, backend="xla")


def test_bad_arguments_are_refused_by_name():
    params = make()
    unshared = dataclasses.replace(
        CONFIG, shared_intermediate_size=0, shared_swiglu_limit=None, has_shared_gate=False
    )
    with pytest.raises(ValueError, match=r"params\.shared_experts: expected None, as config says"):
        nn.moe_layer(params._replace(shared_gate=None), hidden(2), config=unshared, backend="xla")
    with pytest.raises(ValueError, match=r"hidden_states: .*H = 256 from config"):
        nn.moe_layer(params, hidden(2)[:, :128], config=CONFIG, backend="xla")
    for x in (hidden(3, 2)[..., :0], jnp.zeros(0)):
        shape = ", ".join(map(str, x.shape))
        with pytest.raises(
            ValueError, match=rf"hidden_states: expected \[\.\.\., H\] .* got {x.dtype} \[{shape}\]"
        ):
            nn.moe_layer(params, x, config=CONFIG, backend="xla")
    with pytest.raises(
        TypeError, match=r"config: expected a jax_moe\.nn\.LayerConfig, got .*MoEConfig"
    ):
        nn.moe_layer(params, hidden(2), config=MoEConfig(2), backend="xla")
    with pytest.raises(TypeError, match=r"params: expected jax_moe\.LayerWeights, got tuple"):
        nn.moe_layer((), hidden(2), config=CONFIG, backend="xla")
    with pytest.raises(
        TypeError, match=r"hidden_states: expected an array \[\.\.\., H\], got list$"
    ):
        nn.moe_layer(params, [[1.0] * 256], config=CONFIG, backend="xla")
    with pytest.raises(TypeError, match="with_load: expected a bool, got 'no'"):
        nn.moe_layer(params, hidden(2), config=CONFIG, backend="xla", with_load="no")
    with pytest.raises(ValueError, match=r"num_tokens: expected 0\.\.2, got an integer of"):
        nn.moe_layer(params, hidden(2), config=CONFIG, with_load=True, num_tokens=10**99)
    ungated = dataclasses.replace(CONFIG, has_shared_gate=False)
    with pytest.raises(ValueError, match="shared_gate: expected None, as config says, got"):
        nn.moe_layer(params, hidden(2), config=ungated, backend="xla")
    with pytest.raises(TypeError, match=r"params: expected jax_moe\.LayerWeights, got .*Experts?W"):
        nn.fuse_shared(params.experts, CONFIG)
    with pytest.raises(TypeError, match=r"config: expected a jax_moe\.nn\.LayerConfig"):
        nn.fuse_shared(params, CONFIG.router)
    with pytest.raises(ValueError, match=r"shared_swiglu_limit = 1\.5, .*got None"):
        nn.fuse_shared(params, dataclasses.replace(CONFIG, shared_swiglu_limit=None))
    with pytest.raises(ValueError, match="intermediate_size: expected 128 or more"):
        dataclasses.replace(CONFIG, intermediate_size=100)
    with pytest.raises(TypeError, match="router: expected"):
        dataclasses.replace(CONFIG, router=None)
    with pytest.raises(TypeError, match="routed_scaling_factor: expected a number, got str"):
        dataclasses.replace(CONFIG, routed_scaling_factor="2.5")
    with pytest.raises(TypeError, match="has_routing_bias: expected a bool, got 'no'"):
        dataclasses.replace(CONFIG, has_routing_bias="no")
    with pytest.raises(ValueError, match="num_experts: expected 1 or more, got 0"):
        dataclasses.replace(CONFIG, num_experts=0)
    with pytest.raises(ValueError, match=r"shared_swiglu_limit: expected a positive.*, got"):
        dataclasses.replace(CONFIG, shared_swiglu_limit=10**5000)
    assert dataclasses.replace(CONFIG, num_experts=np.int64(CONFIG.num_experts)) == CONFIG


@pytest.mark.parametrize("name", ["module", "DeepSeekMoE", "FrozenWeight"])
def test_without_flax_the_module_says_how_to_get_it(monkeypatch, name):
    monkeypatch.delitem(sys.modules, "jax_moe.nn.module", raising=False)
    monkeypatch.delitem(vars(nn), "module", raising=False)
    monkeypatch.setitem(sys.modules, "flax", None)  # its import fails
    said = rf"^jax_moe\.nn\.{name}: expected the package flax \(pip install 'jax-moe\[flax\]'\)"
    with pytest.raises(ModuleNotFoundError, match=said):
        getattr(nn, name)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ((9,), "router: expected top_k of at most 8, .*got 9"),
        ((5, 2, 1), "router: expected top_k of at most 4, .*got 5"),
        ((2, 7), "router: expected n_group to split the 8 experts into .*got 7"),
        ((2, 8, 4), "router: expected n_group to .* of at least 2, or to be 1, got 8"),
    ],
)
def test_a_router_that_does_not_fit_the_experts_is_refused_when_made(router, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, router=MoEConfig(*router))


def test_public_modules_are_there_without_an_import_of_their_own():
    assert jax_moe.__getattr__("nn") is nn  # Python asks it where nothing has imported the module
    assert jax_moe.__getattr__("models").names()
    assert callable(jax_moe.__getattr__("checkpoint").load_layer)


def test_over_ranks():
    """In a process of its own, which has four devices."""
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", "from tests import test_nn; test_nn.compare_over_four_ranks()"],
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def compare_over_four_ranks():
    router = dataclasses.replace(CONFIG.router, scale_format="ue8m0")  # the options travel too
    config = dataclasses.replace(CONFIG, router=router)
    params, x = make(), hidden(8)
    spec = jax.sharding.PartitionSpec
    specs = jax.tree.map(lambda _: spec(), params)
    specs = specs._replace(experts=jax.tree.map(lambda _: spec("expert"), params.experts))
    layer = functools.partial(
        nn.moe_layer, config=config, axis_name="expert", backend="xla", with_load=True
    )
    mesh = jax.make_mesh((4,), ("expert",))
    place = lambda value, spec: jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))  # noqa: E731
    split = place(x, spec("expert"))
    placed = jax.tree.map(place, params, specs)
    sharded = jax.shard_map(
        layer, mesh=mesh, in_specs=(specs, spec("expert")), out_specs=(spec("expert"), spec())
    )
    out, load = jax.jit(sharded)(placed, split)
    expected, expected_load = jitted(config, with_load=True)(params, x)
    assert relative_error(out, expected) < 0.005
    np.testing.assert_array_equal(load, expected_load)
    high = jax.shard_map(
        functools.partial(nn.moe_layer, config=config, axis_name="expert", precision="high"),
        mesh=mesh,
        in_specs=(specs, spec("expert")),
        out_specs=spec("expert"),
    )
    rounded = numpy_layer(params, x, config, requantize=False).astype(jnp.bfloat16)
    assert relative_error(jax.jit(high)(placed, split), rounded) < 0.0012


def test_what_cannot_be_fused_is_named():
    params = make()
    shared = params.shared_experts
    scale = np.swapaxes(shared.gemm1_weights_scale, 1, 2)
    narrow = dataclasses.replace(CONFIG, shared_intermediate_size=128)
    for fields, config, message in (
        ({"gemm1_weights_scale": scale}, CONFIG, "gemm1_weights_scale: expected .*, got float32"),
        ({"gemm2_weights": None}, CONFIG, "gemm2_weights: expected .*, got None"),
        ({}, narrow, r"gemm1_weights: expected .*I = 128 from config"),
    ):
        given = params._replace(shared_experts=shared._replace(**fields))
        for use in (nn.fuse_shared, lambda g, c: nn.moe_layer(g, hidden(), config=c)):
            with pytest.raises(
                (TypeError, ValueError), match=r"params\.shared_experts\." + message
            ):
                use(given, config)
    wide = params._replace(gate_weight=np.zeros((8, 128), np.float32))
    with pytest.raises(ValueError, match=r"gate_weight: expected .*H = 256 from config"):
        nn.fuse_shared(wide, CONFIG)
    half = ExpertWeights(*(array[:4] for array in params.experts))
    with pytest.raises(ValueError, match=r"params\.experts: expected all 8 experts, got 4"):
        nn.fuse_shared(params._replace(experts=half), CONFIG)


def test_an_exported_program_that_takes_weights_is_written_and_read():
    params, x = jax.tree.map(jnp.asarray, (make(), hidden()))
    layer = jax.jit(functools.partial(nn.moe_layer, config=CONFIG, backend="xla"))
    written = export.export(layer)(params, x).serialize()
    found = export.deserialize(written).call(params, x)
    np.testing.assert_array_equal(bits(found), bits(layer(params, x)))
