"""`bench_main.py --ranks`: the layer over devices, checked; on CPU devices times mean nothing."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

from bench import parallel

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_ranks_are_checked_and_said_not_to_be_timed(tmp_path):
    command = ("-m", "bench.parallel", "--ranks=2", "--tokens=3", f"--output={tmp_path}")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "times mean nothing" in done.stdout
    (row,) = json.loads((tmp_path / "parallel.json").read_text())["rows"]
    assert (row["ranks"], row["tokens"], row["exchange"]) == (2, 3, "collectives")
    assert 0 < row["error"] < 0.01
    assert row["problem"] == ""
    assert (tmp_path / "parallel.png").stat().st_size > 1000


def test_ranks_that_cannot_share_the_experts_are_one_line(tmp_path):
    done = run("bench_main.py", "--ranks=3", f"--output={tmp_path}")
    assert done.returncode == 2
    assert "--ranks: expected a divisor of 64 experts, got 3" in done.stderr


def test_a_table_has_no_speed_for_a_wrong_result():
    rows = [
        parallel.Row(4, 8, "collectives", layer_us=20.0, local_us=15.0, error=0.001),
        parallel.Row(4, 8, "nvlink", error=0.5, problem="wrong"),
    ]
    _, right, wrong, problem = parallel.table(rows)
    assert right.split() == ["collectives", "4", "8", "20.0", "15.0", "5.0", "0.750", "0.00100"]
    assert wrong.split() == ["nvlink", "4", "8", "-", "-", "-", "-", "0.50000"]
    assert problem == "nvlink T=8: wrong"
