"""`bench_main.py --layers`: a layer in a scan is the layer call by call; no weights are copied."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from bench import gpu_clock, layers
from bench.workloads import FULL, REDUCED, Sizes
from jax_moe import ExpertWeights
from tests import h100_target

TINY = Sizes(num_experts=64, num_local_experts=8, hidden_size=256, intermediate_size=128)


def test_layers_are_checked_and_said_not_to_be_timed(tmp_path, capsys):
    assert layers.main(["--layers=2", "--tokens=3", f"--output={tmp_path}"]) == 0
    assert "times mean nothing" in capsys.readouterr().out
    one, own = json.loads((tmp_path / "layers.json").read_text())["rows"]
    assert (one["weights"], own["weights"]) == ("one", "own")
    for row in (one, own):
        assert (row["layers"], row["tokens"], row["problem"]) == (2, 3, "")
        assert row["error"] < 0.01
        assert row["wall_us"] > 0
        assert row["kernels_us"] is None


def test_own_weights_differ_from_layer_to_layer():
    shared = layers.make_model(7, 3, REDUCED, own=False)
    own = layers.make_model(7, 3, REDUCED, own=True)
    for first, stacked in zip(shared.weights, own.weights, strict=True):
        assert stacked.shape == (3, *first.shape)
        np.testing.assert_array_equal(np.asarray(stacked[0]), np.asarray(first))
    a, b = (np.asarray(own.weights.gemm1_weights[i].astype(jnp.float32)) for i in (0, 2))
    assert (a != b).mean() > 0.9
    found, of_one = (np.asarray(layers.one_by_one(m), np.float32) for m in (own, shared))
    assert np.linalg.norm(found - of_one) > 0.1 * np.linalg.norm(of_one)


def test_a_wrong_scan_has_no_time(monkeypatch):
    monkeypatch.setattr(layers, "scanned", lambda model: model.hidden_states)
    row = layers.measure(3, 2, REDUCED, own=False, clock=None, iterations=1)
    assert (row.problem, row.wall_us) == ("wrong", None)
    assert layers.table([row])[-1] == "one T=3: wrong"


@pytest.mark.parametrize(
    ("memory", "expected"), [(None, 61), (80 * 2**30, 55), (140 * 2**30, 61), (2**30, 1)]
)
def test_as_many_layers_as_the_memory_holds(memory, expected):
    assert layers.layers_that_fit(61, FULL, memory) == expected


def test_kernels_are_split_by_whose_they_are():
    def kernel(name, start, us):
        return gpu_clock.Kernel(name, start, us)

    kernels = (
        kernel("moe_up_projection_kernel", 0.0, 6.0),
        kernel("add_fusion", 5.0, 3.0),
        kernel("moe_unpermute_kernel", 10.0, 2.0),
    )

    class Clock:
        def time(self, execution, iterations, cold):
            assert not cold
            return [gpu_clock.Sample(12.0, 1, kernels)] * iterations

    row = layers._with_kernels(layers.Row("one", 2, 1), Clock(), lambda: None)
    assert (row.kernels_us, row.others_us, row.idle_us, row.launches) == (4.0, 1.0, 1.0, 1)


@pytest.mark.parametrize("flag", ["--layers=0", "--layers=x", "--tokens=1,0"])
def test_bad_numbers_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        layers.main([flag])
    assert ended.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="compiles for an absent H100")
def test_the_weights_of_a_layer_are_not_copied():
    sharding = h100_target.h100_sharding()

    def specs(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    layer = jax.tree.map(
        lambda one: specs((4, *one.shape), one.dtype),
        jax.eval_shape(lambda: layers.inputs.draw_weights("realistic", TINY, 0)),
    )
    assert isinstance(layer, ExpertWeights)
    model = layers.Model(
        specs((16, 256), jnp.bfloat16),
        specs((4, 16, 64), jnp.float32),
        specs((64,), jnp.float32),
        layer,
    )
    with jax_moe.assume_device("sm_90"):
        compiled = jax.jit(layers.scanned).lower(model).compile()
    smaller = layer.gemm2_weights.size // 4
    assert compiled.memory_analysis().temp_size_in_bytes < smaller == 8 * 256 * 128
