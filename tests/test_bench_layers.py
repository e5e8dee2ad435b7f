"""`bench_main.py --layers`: a layer in a scan is the layer call by call; no weights are copied."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from bench import gpu_clock, layers, scan_parts, sm_clock
from bench.sm_clock import Reading
from bench.workloads import FULL, REDUCED, Sizes
from jax_moe import ExpertWeights
from tests import h100_target

TINY = Sizes(num_experts=64, num_local_experts=8, hidden_size=256, intermediate_size=128)


def test_layers_are_checked_and_said_not_to_be_timed(tmp_path, capsys):
    assert layers.main(["--layers=2", "--tokens=3", f"--output={tmp_path}"]) == 0
    assert "times mean nothing" in capsys.readouterr().out
    written = json.loads((tmp_path / "layers.json").read_text())
    one, own = written["rows"]
    assert written["about"]["sizes"] == REDUCED._asdict()
    assert written["about"]["reduced"] is True
    assert "REDUCED to H=256" in written["about"]["note"]
    assert {"started", "command"} <= set(written["about"])
    assert written["about"]["complete"] is True
    assert (one["weights"], own["weights"]) == ("one", "own")
    for row in (one, own):
        assert (row["layers"], row["tokens"], row["problem"]) == (2, 3, "")
        assert row["error"] < 0.01
        assert row["wall_us"] > 0
        assert row["parts"] is None


def test_own_weights_differ_from_layer_to_layer():
    shared = layers.make_model(7, 3, REDUCED, own=False)
    own = layers.make_model(7, 3, REDUCED, own=True)
    for first, stacked in zip(shared.weights, own.weights, strict=True):
        assert stacked.shape == (3, *first.shape)
        np.testing.assert_array_equal(np.asarray(stacked[0]), np.asarray(first))
    a, b = (np.asarray(own.weights.gemm1_weights[i].astype(jnp.float32)) for i in (0, 2))
    assert (a != b).mean() > 0.9
    found, of_one = (np.asarray(layers.one_by_one(m), np.float32) for m in (own, shared))
    assert np.linalg.norm(found - of_one) > 0.01 * np.linalg.norm(of_one)


def test_nothing_overflows_in_all_layers():
    model = layers.make_model(2, layers.LAYERS, TINY, own=False)
    out, begin = (np.asarray(h, np.float32) for h in (layers.scanned(model), model.hidden_states))
    assert 0.1 < np.linalg.norm(out - begin) / np.linalg.norm(begin) < 2


def test_a_wrong_scan_has_no_time(monkeypatch):
    monkeypatch.setattr(layers, "scanned", lambda model: model.hidden_states)
    measured = layers.measure(3, 2, REDUCED, own=False, iterations=1)
    assert (measured.row.problem, measured.row.wall_us) == ("wrong", None)
    assert scan_parts.table([measured.row])[-1] == "one T=3: wrong"
    assert layers.with_kernels(measured, REDUCED, clock=None) == measured.row


@pytest.mark.parametrize(
    ("memory", "expected"), [(None, 61), (80 * 2**30, 55), (140 * 2**30, 61), (2**30, 1)]
)
def test_as_many_layers_as_the_memory_holds(memory, expected):
    assert layers.layers_that_fit(61, FULL, memory) == expected


def kernel(name, start, us):
    return gpu_clock.Kernel(name, start, us)


KERNELS = (
    kernel("loop_broadcast_fusion", 0.0, 1.0),
    kernel("moe_group_quant_mosaic_gpu_kernel", 1.0, 3.0),
    kernel("moe_routing_mosaic_gpu_kernel", 3.0, 2.0),  # the quantization alone: 2 us
    kernel("moe_up_projection_mosaic_gpu_kernel", 6.0, 8.0),
    kernel("loop_add_fusion", 7.0, 1.0),  # hidden
    kernel("moe_unpermute_mosaic_gpu_kernel", 15.0, 2.0),
    kernel("wrapped_add", 16.0, 3.0),
    kernel("loop_compare_fusion", 22.0, 2.0),
)


def test_the_parts_of_a_layer_add_up_to_its_time():
    parts = scan_parts.parts_of(gpu_clock.Sample(24.0, 6, KERNELS), layers=2, wall_us=14.0)
    assert parts == scan_parts.Parts(
        layer=6.0, quantize=1.0, adds=1.0, other=1.5, idle=2.5, outside=2.0, kernels=4.0
    )
    assert sum(parts[:-1]) == pytest.approx(14.0)


def test_a_profiled_row_says_what_its_time_is_made_of(monkeypatch):
    """The second pass, with a made-up profiler, on a program that is loaded again."""
    sample = gpu_clock.Sample(24.0, 6, KERNELS)

    class Clock:
        def time(self, execution, iterations, *, cold):
            assert not cold
            execution.block(execution.call())
            return [sample._replace(span_us=24.0 + i) for i in (0, -1, 9, -2, 8)][:iterations]

    reading = Reading(13.0, 1700.0, True, 100)
    monkeypatch.setattr(sm_clock, "sustained", lambda *_: reading)
    measured = layers.measure(3, 2, REDUCED, own=True, iterations=1)
    assert measured.row.wall_us > 0
    measured = measured._replace(row=measured.row._replace(wall_us=14.0))
    row = layers.with_kernels(measured, REDUCED, Clock())
    assert row.parts == scan_parts.parts_of(sample, 2, 14.0)
    assert (row.launches, row.clock, row.problem) == (6, reading, "")
    title, line, *explained = scan_parts.table([row])
    cells = dict(zip(re.split(r"\s{2,}", title), re.split(r"\s{2,}", line), strict=True))
    assert (cells["us per layer"], cells["layer"], cells["outside"]) == ("14.0", "6.0", "2.0")
    assert (cells["launches"], cells["SM MHz"]) == ("3.0", "1700 cap")
    assert explained[-1].startswith("own T=3, per layer: moe_group_quant_mosaic_gpu_kernel 1.50 us")
    assert "moe_up" not in explained[-1]


def test_fewer_layers_are_tried_where_the_memory_is_taken(monkeypatch, tmp_path):
    tried = []

    def measure(tokens, steps, sizes, *, own, iterations):
        tried.append((own, tokens, steps))
        full = own and steps > 25
        problem = "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory" if full else ""
        row = layers.Row("own" if own else "one", steps, tokens, problem=problem)
        return layers.Measured(row, None)

    monkeypatch.setattr(layers, "measure", measure)
    assert layers.run(30, (1, 16), tmp_path) == 0
    assert tried == [
        *((False, tokens, 30) for tokens in (1, 16)),
        *((True, 1, steps) for steps in (30, 27, 25)),
        (True, 16, 25),
    ]


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
