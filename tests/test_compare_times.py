"""The tool that times two checkouts in one process."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import export

from tools import compare_times

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments):
    """The tool, on the CPU devices of a machine that it has to find out about by itself."""
    of_tests = ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    variables = {name: value for name, value in os.environ.items() if name not in of_tests}
    command = [sys.executable, "tools/compare_times.py", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False
    )


def test_two_checkouts_take_turns(tmp_path):
    few = ["--workloads=1", "--rounds=2", "--iterations=1", "--jobs=2", f"--output={tmp_path}"]
    done = run(ROOT, ROOT, *few)
    assert done.returncode == 0, done.stderr
    assert "times mean nothing" in done.stdout
    assert "cuInit" not in done.stderr  # JAX's CUDA plugin was left alone where there is no GPU
    written = json.loads((tmp_path / "times.json").read_text())
    assert [one["folder"] for one in written["about"]["checkouts"]] == [str(ROOT)] * 2
    assert written["about"]["complete"] is True
    [row] = written["rows"]
    assert row["tokens"] == 1
    for of_checkout in row["of_checkout"]:
        assert of_checkout["same_bits"] is True
        assert len(of_checkout["us"]) == 2
        assert all(us > 0 for us in of_checkout["us"])


def test_other_bits_are_seen(tmp_path):
    for name, factor in (("first", 2), ("same", 2), ("other", 3)):
        program = export.export(jax.jit(lambda x, factor=factor: factor * x))(jnp.ones(3))
        (tmp_path / name).write_bytes(program.serialize())
    places, arguments = [[tmp_path / name] for name in ("first", "same", "other")], (jnp.ones(3),)
    programs = [one for [one] in compare_times.compile_all(places, [arguments], jobs=2)]
    found = compare_times.measure(programs, arguments, rounds=3, iterations=1, clock=None)
    assert [one["same_bits"] for one in found] == [True, True, False]
    assert [len(one["us"]) for one in found] == [3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "expected the folder of a checkout, got '/nowhere'"),
        ([ROOT, ROOT, "--workloads=3"], "unknown workload '3'"),
        ([ROOT], f"checkouts: expected two folders or more, got {ROOT} alone"),
        ([ROOT, "--rounds=0"], "--rounds"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_times_of_an_earlier_run_are_replaced_only_when_asked(tmp_path):
    (tmp_path / "times.json").write_text("kept")
    done = run(ROOT, ROOT, "--workloads=1", f"--output={tmp_path}")
    assert done.returncode == 2
    assert "times.json of an earlier run; --overwrite replaces it" in done.stderr
    assert (tmp_path / "times.json").read_text() == "kept"


def test_a_signal_leaves_no_process_that_lowers(tmp_path, monkeypatch):
    started = []

    class Process:
        def __init__(self, *_, **__):
            started.append(self)
            self.ended = False

        def wait(self):
            if not self.ended:
                raise KeyboardInterrupt

        def kill(self):
            self.ended = True

    monkeypatch.setattr(compare_times.subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        compare_times.lower_all([tmp_path, tmp_path], [()], tmp_path, jobs=2)
    assert [process.ended for process in started] == [True, True]
