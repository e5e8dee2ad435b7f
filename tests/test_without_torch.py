"""What the documents offer without PyTorch, or Triton, works where it cannot be imported."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
# One process for all commands: importing JAX is most of what each would take.
COMMANDS = """
import sys
from types import SimpleNamespace
from unittest import mock
sys.modules["torch"] = sys.modules["triton"] = None  # any import of them fails
import bench_main
from bench import compile_times
from interop import host_time
from interop.flashinfer_bench import __main__ as flashinfer_bench
from pallas_kernels.triton import tune
from pallas_kernels.tuning import command

def helped(main, *argv):
    try:
        main(*argv)
    except SystemExit as ended:
        assert ended.code in (None, 0), ended.code

print("== list")
assert bench_main.main(bench_main._parse(["bench_main.py", "--list"])) == 0
print("== helps")
for main in (host_time.main, compile_times.main, flashinfer_bench.main):
    helped(main, ["--help"])
helped(command.main, ["--help"], "pallas_kernels.triton.tune", tune.tuner)
with mock.patch.object(command.device, "local_gpu", lambda: SimpleNamespace()):
    assert command.main([], "pallas_kernels.triton.tune", tune.tuner) == 1
print("== host_time")
host_time.REPEATS = 2
layer = host_time.jax_moe.apply
host_time.jax_moe.apply = lambda *ten, backend: ten[2] * 2  # eight layers take long to compile
host_time.main([])
host_time.jax_moe.apply = layer
print("== export")
assert flashinfer_bench.main(["export", sys.argv[1] + "/set"]) == 0
print("== bench")
flags = ["--nolist", "--report", "--workloads=1", f"--output={sys.argv[1]}/run"]
flags = ["bench_main.py", *flags, "--solutions=torch_reference,jax_moe_xla"]
assert bench_main.main(bench_main._parse(flags)) == 0
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_commands_that_need_no_torch(tmp_path):
    done = python("-c", COMMANDS, str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    listed, helps, times, exported, run = done.stdout.split("== ")[1:]
    assert re.search("torch_reference +not available: package torch is not installed", listed)
    assert re.search("jax_v1 +available", listed)
    for flag in ("--full_size", "--tokens", "workspace", "--hidden-size"):
        assert flag in helps
    missing = "pallas_kernels.triton.tune: needs the package triton: install the extra triton"
    assert missing in done.stderr.splitlines()
    assert "calls of JAX only: package torch is not installed" in times
    assert "apply, eager" in times
    assert "TorchMoE" not in times
    assert exported.strip() == f"export\n{tmp_path}/set"
    assert len(list((tmp_path / "set").rglob("*.safetensors"))) == 19
    assert "skipped: torch_reference: package torch is not installed" in run
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {row["solution"]: row for row in content["rows"]}
    assert set(rows) == {"jax_moe_xla"}
    assert rows["jax_moe_xla"]["status"] == "PASS"
    assert rows["jax_moe_xla"]["figures"]["speedup"] is None


def test_help_needs_no_torch():
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['bench_main', '--help']; "
    done = python("-c", code + "runpy.run_module('bench_main', run_name='__main__')")
    assert "--solutions" in done.stdout
    assert "Traceback" not in done.stderr
