"""`DeepSeekMoE`, the Flax NNX module."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jax_moe import nn
from tests.hf_checkpoint import make_checkpoint
from tests.moe_inputs import bits
from tests.test_nn import CONFIG, hidden, jitted, make

nnx = pytest.importorskip("flax.nnx")


def test_it_is_the_pure_function_of_its_variables():
    params, x = jax.tree.map(jnp.asarray, make()), hidden(6)
    layer = nn.DeepSeekMoE.from_weights(CONFIG, params, backend="xla")
    out, load = nnx.jit(lambda layer, x: layer(x, with_load=True))(layer, x)
    expected, expected_load = jitted(with_load=True)(params, x)
    np.testing.assert_array_equal(bits(out), bits(expected))
    np.testing.assert_array_equal(load, expected_load)


def test_its_precision_is_that_of_the_function():
    params, x = jax.tree.map(jnp.asarray, make()), hidden(3, 5)
    layer = nn.DeepSeekMoE.from_weights(CONFIG, params, backend="xla", precision="high")
    expected = jitted(precision="high")(params, x)
    np.testing.assert_array_equal(
        bits(nnx.jit(lambda layer, x: layer(x))(layer, x)), bits(expected)
    )


def test_random_weights_kinds_of_variables_and_sharding():
    layer = nn.DeepSeekMoE(CONFIG, rngs=nnx.Rngs(0), backend="xla")
    trained = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    assert {path[0] for path, _ in trained} == {"gate_weight", "shared_gate"}
    frozen = nnx.to_flat_state(nnx.state(layer, nn.FrozenWeight))
    assert len(list(frozen)) == 4 + 4 + 1
    specs = nnx.get_partition_spec(nnx.state(layer))
    spec = jax.sharding.PartitionSpec
    assert specs["experts"]["gemm1_weights"].get_value() == spec("expert", None, None)
    assert specs["shared_experts"]["gemm1_weights"].get_value() == spec(None, None, None)
    layer.weights.experts.check()
    again = nn.DeepSeekMoE(CONFIG, rngs=nnx.Rngs(0), backend="xla")
    np.testing.assert_array_equal(bits(again.gate_weight[...]), bits(layer.gate_weight[...]))


def test_random_weights_are_of_32_bits():
    with jax.enable_x64(True):
        layer = nn.DeepSeekMoE(CONFIG, rngs=nnx.Rngs(0), backend="xla")
        assert layer.gate_weight[...].dtype == layer.shared_gate[...].dtype == jnp.float32
        assert layer(jnp.ones((2, CONFIG.hidden_size), jnp.bfloat16)).dtype == jnp.bfloat16


def test_flax_is_imported_only_when_asked_for():
    code = "import sys, jax_moe.nn; assert 'flax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        nn.Nothing  # noqa: B018


@pytest.mark.parametrize("fused", [False, True])
def test_from_a_checkpoint(tmp_path, fused):
    made = make_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "deepseek_v3",
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
    }
    path.write_text(json.dumps(config))
    load = functools.partial(
        nn.DeepSeekMoE.from_checkpoint, tmp_path, made.layer, fused=fused, backend="xla"
    )
    with jax.transfer_guard("disallow"):
        layer = load(sharding=SingleDeviceSharding(jax.devices()[0]))
        if not fused:
            load(sharding=jax.make_mesh((1,), ("expert",)))
    assert layer.config == nn.LayerConfig.from_hf(config)
    assert (layer.shared_experts is None) == fused
    held = layer.weights.experts
    assert held.num_local_experts == 8 + fused
    gate, up, down = made.expert(5)[:3]
    np.testing.assert_array_equal(bits(held.gemm1_weights[5]), bits(np.concatenate([up, gate])))
    np.testing.assert_array_equal(bits(held.gemm2_weights[5]), bits(down))
    if fused:
        _, up, _ = made.expert("shared_experts.")[:3]
        np.testing.assert_array_equal(bits(held.gemm1_weights[8, :128]), bits(up))
        with pytest.raises(ValueError, match=r"params\.experts\.gemm1_weights: .* whole on every"):
            load(sharding=jax.make_mesh((1,), ("expert",)))
    shape = jax.eval_shape(layer, jnp.zeros((3, 256), jnp.bfloat16)).shape
    assert shape == (3, 256)
    config = json.loads(path.read_text()) | {"moe_intermediate_size": 256}
    (tmp_path / "wide").mkdir()
    make_checkpoint(tmp_path / "wide", intermediate=256)
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config))
    half = nn.DeepSeekMoE.from_checkpoint(
        tmp_path / "wide", made.layer, fused=fused, backend="xla", tensor_parallel=(1, 2)
    )
    assert half.config.intermediate_size == 128
    assert jax.eval_shape(half, jnp.zeros((3, 256), jnp.bfloat16)).shape == (3, 256)


def test_bad_arguments_are_refused_when_it_is_made(tmp_path):
    rngs = nnx.Rngs(0)
    with pytest.raises(TypeError, match=r"config: expected a jax_moe\.nn\.LayerConfig, got None"):
        nn.DeepSeekMoE(None, rngs=rngs)
    with pytest.raises(TypeError, match=r"rngs: expected flax\.nnx\.Rngs, got int"):
        nn.DeepSeekMoE(CONFIG, rngs=0)
    for streams, found in ((nnx.Rngs(dropout=0, noise=1), "dropout, noise"), (nnx.Rngs(), "none")):
        with pytest.raises(
            ValueError, match=rf"rngs: expected a stream 'params' or .*got {found}$"
        ):
            nn.DeepSeekMoE(CONFIG, rngs=streams)
    with pytest.raises(ValueError, match=r"backend: expected one of .*got 'none'"):
        nn.DeepSeekMoE(CONFIG, rngs=rngs, backend="none")
    with pytest.raises(
        TypeError, match=r"weights: expected jax_moe\.LayerWeights, got .*LayerConfig"
    ):
        nn.DeepSeekMoE.from_weights(make(), CONFIG)
    with pytest.raises(TypeError, match="folder: expected a path, got NoneType"):
        nn.DeepSeekMoE.from_checkpoint(None, 3)
    with pytest.raises(TypeError, match=r"from_checkpoint\(\) got an unexpected .* 'num_rank'"):
        nn.DeepSeekMoE.from_checkpoint(tmp_path / "nowhere", 3, num_rank=2)
    with pytest.raises(ValueError, match=r"backend: expected one of .*got 'none'"):
        nn.DeepSeekMoE.from_checkpoint(tmp_path / "nowhere", 3, backend="none")
    with pytest.raises(TypeError, match="fused: expected a bool, got 'no'"):
        nn.DeepSeekMoE.from_checkpoint(tmp_path / "nowhere", 3, fused="no")
    made = make_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: expected what the layer is"):
        nn.DeepSeekMoE.from_checkpoint(tmp_path, made.layer)


def test_weights_of_another_layer_are_refused_when_it_is_made():
    def cut(weights, count):
        return weights._replace(experts=weights.experts._replace(
            **{name: value[:count] for name, value in weights.experts._asdict().items()}
        ))  # fmt: skip

    whole = make()
    bias, shared = whole.e_score_correction_bias, whole.shared_experts
    for weights, message in (
        (
            cut(whole, 5),
            r"weights\.experts: expected all 8 experts, or an equal part of them, got 5",
        ),
        (make(dataclasses.replace(CONFIG, num_experts=16)), r"gate_weight: .*E = 8 from config"),
        (
            whole._replace(e_score_correction_bias=bias[:4]),
            "e_score_correction_bias: .*float32 .4.",
        ),
        (whole._replace(shared_gate=None), "shared_gate: expected a JAX or NumPy array"),
        (
            whole._replace(shared_experts=None),
            r"weights\.experts: expected all 8 experts and, without shared_experts, 2 fused ones",
        ),
        (
            whole._replace(experts=shared),
            r"weights\.experts\.gemm1_weights: .*I = 128 from config",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            nn.DeepSeekMoE.from_weights(CONFIG, weights, backend="xla")
    part = nn.DeepSeekMoE.from_weights(CONFIG, cut(whole, 4), backend="xla")  # of one rank of two
    assert part.weights.experts.num_local_experts == 4


def test_an_intermediate_size_of_no_whole_blocks(tmp_path):
    made = make_checkpoint(tmp_path, intermediate=192)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "deepseek_v3",
        "hidden_size": 256,
        "moe_intermediate_size": 192,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
    }
    path.write_text(json.dumps(config))
    assert nn.LayerConfig.from_hf(config).intermediate_size == 256
    layer = nn.DeepSeekMoE.from_checkpoint(tmp_path, made.layer, backend="xla")
    assert layer.config == nn.LayerConfig.from_hf(config)
    assert layer.weights.experts.intermediate_size == 256
    assert jax.eval_shape(layer, jnp.zeros((3, 256), jnp.bfloat16)).shape == (3, 256)
    with pytest.raises(ValueError, match=r"^intermediate_size: expected 128 or more"):
        dataclasses.replace(layer.config, intermediate_size=192)


@pytest.mark.parametrize("x64", [False, True])
def test_the_linen_example_runs(x64):
    from examples import linen_layer

    with jax.enable_x64(x64):
        assert np.isfinite(np.asarray(linen_layer.main(), np.float32)).all()


@pytest.mark.parametrize("x64", [False, True])
def test_the_equinox_example_runs(x64):
    pytest.importorskip("equinox")
    from examples import equinox_layer

    with jax.enable_x64(x64):
        assert np.isfinite(np.asarray(equinox_layer.main(), np.float32)).all()
