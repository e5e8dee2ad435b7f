"""The levels of examples/ladder: right in the interpreter, compiled for an H100 without spills."""

from __future__ import annotations

import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from examples.ladder import __main__ as ladder
from examples.ladder import harness, problem
from jax_moe.types import Quantized
from tests import h100_target
from tests.test_kernels_interpreted import exact_product, grouped_rows, run, weights

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "examples/ladder").glob("level_*.py"))
NAMES = [path.stem for path in FILES]
# The detector wants a proxy fence between plain reads of shared memory and the TMA copy that
# reuses it. On the GPU the mbarrier hand-off of the stage orders the two.
SCALES_OF_A_REUSED_STAGE = {
    "_multiply.<locals>.step",
    "_fill.<locals>._step",
    "accumulate.<locals>.step",
    "_copy_step",
}


def level(name: str) -> problem.Level:
    return importlib.import_module(f"examples.ladder.{name}").LEVEL


def check_is_exact(name, sizes, num_steps, expected_rows, races=SCALES_OF_A_REUSED_STAGE):
    """Values that bf16 holds and scales that are powers of two: right to the bit."""
    one = level(name)
    block_m = one.block_m(expected_rows)
    rows, plan, live = grouped_rows(sizes, block_m, columns=128 * num_steps)
    empty = [expert for expert, size in enumerate(sizes) if size == 0]
    values, scales = weights(len(sizes), 256, 128 * num_steps, empty)
    if not one.block_scales:
        rows = Quantized(rows.values, np.broadcast_to(rows.scales[:1], rows.scales.shape).copy())
        scales = np.broadcast_to(scales[..., :1], scales.shape).copy()
    expected = exact_product(rows, plan, values, scales)[live]
    found = run(one.run, rows, plan, values, scales, known_races=races)
    if not one.is_fused:
        np.testing.assert_array_equal(found[live], expected.astype(ml_dtypes.bfloat16))
        return
    up, gate = np.split(expected, 2, axis=1)
    activated = gate / (1 + np.exp(-np.clip(gate, -700, 700))) * up
    found = found.values[live].astype(np.float64) * found.scales.T[live]
    # Half an ulp of e4m3 at the top of its range is 16 of 448; bf16 adds 1 / 256.
    amax = np.abs(activated).max(axis=1, keepdims=True)
    assert (np.abs(found - activated) <= amax * (16 / 448 + 1 / 256)).all()


def test_there_are_eight_levels_in_order():
    assert [level(name).number for name in NAMES] == list(range(1, 9))


@pytest.mark.parametrize("name", ["level_1_plain", "level_3_promotion"])
def test_tiles_of_128_are_exact(name):
    """Six steps of K: the four stages are used again."""
    check_is_exact(name, [5], num_steps=6, expected_rows=100)


def test_tiles_of_16_are_exact():
    """Weights as the wide operand; an expert of no tokens, and one of two tiles."""
    check_is_exact("level_4_swap_ab", [5, 0, 17], num_steps=2, expected_rows=1)


@pytest.mark.parametrize("num_tokens", [harness.FEW_TOKENS, harness.MANY_TOKENS])
@pytest.mark.parametrize("name", NAMES)
def test_every_level_can_be_traced_at_full_size(name, num_tokens):
    one = level(name)
    specs = problem.specs(one, problem.DEEPSEEK_V3, num_tokens)
    with jax_moe.assume_device("sm_90"):
        result = jax.eval_shape(one.run, *specs)
    num_rows = specs[0].values.shape[0]
    expected = (num_rows, 2048) if one.is_fused else (num_rows, 4096)
    assert jax.tree.leaves(result)[0].shape == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("sizes", "expected_rows"),
    [([5, 0, 17], 1), ([0, 0], 1), ([130, 0, 33], 100)],
    ids=["few", "none", "many"],
)
def test_every_level_is_exact(name, sizes, expected_rows):
    check_is_exact(name, sizes, num_steps=12, expected_rows=expected_rows)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [harness.TINY_FEW_TOKENS, harness.TINY_MANY_TOKENS])
@pytest.mark.parametrize("name", NAMES)
def test_every_level_is_right_on_a_gpu(name, num_tokens):
    harness.run(level(name), problem.TINY, num_tokens, gpu=None)  # which checks the error


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [harness.FEW_TOKENS, harness.MANY_TOKENS])
@pytest.mark.parametrize("name", NAMES)
def test_no_level_spills(name, num_tokens):
    one = level(name)

    def call(*arrays):
        with jax_moe.assume_device("sm_90"):
            return one.run(*arrays)

    report = h100_target.compile_for_h100(
        call, *problem.specs(one, problem.DEEPSEEK_V3, num_tokens)
    )
    (kernel,) = report.kernels
    print(f"{name} T={num_tokens}\n{report}")
    assert kernel.spill_bytes == 0
    assert "QGMMA" in kernel.instructions


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_level_checks_itself_from_the_command_line(path, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    few, many = done.stdout.splitlines()
    assert f"T={harness.TINY_FEW_TOKENS}, relative error" in few
    assert f"T={harness.TINY_MANY_TOKENS}, relative error" in many


def test_the_table_has_a_row_per_level_and_the_files_are_whole(tmp_path):
    measured = [
        harness.Measured(1, "plain", 16, 2.5e-3, 200.0, 100.0),
        harness.Measured(1, "plain", 8192, 2.5e-3, None, None),
        harness.Measured(2, "pipeline", 16, 2.5e-3, 125.0, 100.0),
    ]
    (tmp_path / "new").mkdir()
    ladder.write(tmp_path / "new", measured, {"device": "none"})
    document = (tmp_path / "new/ladder.md").read_text()
    assert "| 1 plain | 200.0 | 50.0% | 2.5e-03 |  |  | 2.5e-03 |" in document
    assert "| 2 pipeline | 125.0 | 80.0% | 2.5e-03 |  |  |  |" in document
    saved = json.loads((tmp_path / "new/ladder.json").read_text())
    assert [row["fraction"] for row in saved["levels"]] == [0.5, None, 0.8]
    assert [one.number for one in ladder.levels()] == list(range(1, 9))


@pytest.mark.parametrize("error", [6e-3, float("nan")])
def test_a_wrong_result_has_no_time(error, monkeypatch):
    one = level("level_1_plain")._replace(run=lambda x, interpret: x)
    monkeypatch.setattr(harness, "make_problem", lambda *_: (np.zeros(1),))
    monkeypatch.setattr(harness, "relative_error", lambda *_: error)
    with pytest.raises(RuntimeError, match=r"level 1: expected a relative error up to 0\.005"):
        harness.run(one, problem.TINY, 8, None)


def test_a_level_is_traced_in_32_bits(monkeypatch):
    """Loop counters of 64 bits would not go with the 32-bit integers beside them."""

    def traced(x, interpret):
        assert not jax.config.jax_enable_x64
        return x

    monkeypatch.setattr(harness, "make_problem", lambda *_: (jnp.zeros(1, jnp.float32),))
    monkeypatch.setattr(harness, "relative_error", lambda *_: 0.0)
    one = level("level_1_plain")._replace(run=traced)
    with jax.enable_x64(True):
        harness.run(one, problem.TINY, 4, None)


@pytest.mark.parametrize(("num_tokens", "microseconds"), [(16, 114), (8192, 319)])
def test_the_floor_is_what_the_document_says(num_tokens, microseconds):
    one = level("level_1_plain")
    plan = problem.make_plan(problem.DEEPSEEK_V3, num_tokens, 128)
    inputs = problem.Problem(None, plan, None, None)
    rates = harness.Rates(3.35e12, 1.979e15, "data sheet")
    floor = harness.floor_us(one, problem.DEEPSEEK_V3, inputs, rates)
    assert round(floor) == microseconds
    assert f"{microseconds} us" in (ROOT / "docs/kernels/index.md").read_text()
    slow = rates._replace(flops_per_s=1e12)
    flops = 2 * plan.group_sizes.sum() * 4096 * 7168
    assert harness.floor_us(one, problem.DEEPSEEK_V3, inputs, slow) == pytest.approx(flops / 1e6)


def in_jax_numpy(rows, plan, values, scales, interpret):
    """What levels 1 to 7 compute, in float32."""
    x = rows.values.astype(jnp.float32) * jnp.repeat(rows.scales.T, 128, axis=1)
    w = values.astype(jnp.float32) * jnp.repeat(jnp.repeat(scales, 128, 1), 128, 2)
    experts = jnp.repeat(plan.tile_expert, plan.block_m)
    return jnp.einsum("mk,mnk->mn", x, w[experts]).astype(jnp.bfloat16)


def test_without_a_gpu_no_folder_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "find_gpu", lambda: None)
    assert ladder.main(["--output", str(tmp_path / "new/one")]) == 2
    assert capsys.readouterr().err.startswith("needs a Hopper GPU")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_run_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    """Without a GPU: its clock is the host's, the levels are jax.numpy, one of them is wrong."""
    right = level("level_3_promotion")._replace(run=in_jax_numpy, block_m=lambda expected: 16)
    wrong = right._replace(number=4, run=lambda *arrays, interpret: 2 * in_jax_numpy(*arrays, None))
    gpu = object.__new__(harness.Gpu)
    gpu._clock, gpu.timer = None, "host time"
    gpu.rates = harness.Rates(1e12, 1e15, "made up")
    monkeypatch.setattr(harness, "DEEPSEEK_V3", problem.TINY._replace(hidden_size=256))
    monkeypatch.setattr(harness, "MANY_TOKENS", 40)
    monkeypatch.setattr(harness, "find_gpu", lambda: gpu)
    monkeypatch.setattr(ladder, "levels", lambda: [right, wrong])
    assert ladder.main(["--output", str(tmp_path)]) == 1
    saved = json.loads((tmp_path / "ladder.json").read_text())
    assert [(row["number"], row["num_tokens"]) for row in saved["levels"]] == [(3, 16), (3, 40)]
    assert all(0 < row["fraction"] < 1 for row in saved["levels"])
    assert (
        "level 4: RuntimeError: level 4: expected a relative error" in saved["about"]["failed"][0]
    )
    assert "of the roofline" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [harness.FEW_TOKENS, harness.MANY_TOKENS])
def test_level_6_is_the_kernel_of_the_library(num_tokens):
    """Written out and called: the same instructions."""
    persistent = importlib.import_module("examples.ladder.level_6_persistent")
    called = importlib.import_module("examples.ladder.level_7_stream_k")

    def instructions(matmul):
        def call(*arrays):
            with jax_moe.assume_device("sm_90"):
                return matmul(*arrays)

        specs = problem.specs(persistent.LEVEL, problem.DEEPSEEK_V3, num_tokens)
        (ptx,) = h100_target.ptx_for_h100(call, *specs).values()
        # The names of parameters end in their place, which may differ.
        lines = re.sub(r"ladder_[a-z_]+\d*", "kernel", ptx).splitlines()
        return [line for line in lines if not re.match(r"\s*\.(loc|file)\b", line)]

    whole = functools.partial(called.grouped_matmul, num_segments=1)
    assert instructions(persistent.grouped_matmul) == instructions(whole)
