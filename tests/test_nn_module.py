"""`DeepSeekMoE`, the Flax NNX module."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import nn
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


def test_flax_is_imported_only_when_asked_for():
    code = "import sys, jax_moe.nn; assert 'flax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        nn.Nothing  # noqa: B018
