"""What `make sanitize` runs and how it reads compute-sanitizer, without a GPU."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import signal
import subprocess
import sys

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import jax_moe
from interop import folder_lock
from jax_moe.backends import triton as triton_backend
from pallas_kernels import interruption
from tests import sanitize, sanitizer_control, sanitizer_target
from tests.h100_target import compile_for_h100
from tests.moe_inputs import SMALL
from tests.sanitizer_control import READERS, kernels
from tests.test_tools import executable

ROOT = pathlib.Path(__file__).parent.parent
CONTROL_RAN = '{"backend": "control", "relative_errors": {"tma_tiles": 0.0}}\n'
RAN = '{"backend": "mosaic", "relative_errors": {"T=7": 0.02}}\n'
CLEAN = f"========= COMPUTE-SANITIZER\n{RAN}========= ERROR SUMMARY: 0 errors\n"
INVALID = f"""========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at moe_unpermute_mosaic_gpu_kernel+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x87654320 is out of bounds
=========
========= Invalid __global__ read of size 16 bytes
=========     at plan_kernel+0x1b0
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: main [0xae66] in python3
=========
{RAN}========= ERROR SUMMARY: 2 errors
"""
RACE = f"""========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at moe_up_projection_mosaic_gpu_kernel+0x90
=========     and Read access at moe_up_projection_mosaic_gpu_kernel+0x100 [508 hazards]
=========
{RAN}========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
UNINITIALIZED = f"""========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at KERNEL+0x70
=========     by thread (31,0,0) in block (1,0,0)
=========
{RAN}========= ERROR SUMMARY: 1 error
"""
DIED = """========= COMPUTE-SANITIZER
Traceback (most recent call last):
AssertionError: T=7: 0.5
========= Target application returned an error
========= ERROR SUMMARY: 0 errors
"""


@pytest.mark.parametrize(
    ("tool", "log", "code", "state", "reports"),
    [
        ("memcheck", CLEAN, 0, "clean", {}),
        ("memcheck", CLEAN, 1, "failed", {}),
        ("memcheck", INVALID, 0, "errors", {"moe_unpermute": 1, "plan_kernel": 1}),
        ("racecheck", RACE, 0, "errors", {"moe_up_projection": 1}),
        ("memcheck", DIED, 1, "failed", {"": 1}),
        ("memcheck", "========= COMPUTE-SANITIZER\n", 0, "failed", {}),
        ("synccheck", "cannot attach", 255, "failed", {}),
        ("synccheck", "", None, "timeout", {}),
    ],
)
def test_logs_are_read(tool, log, code, state, reports):
    found = sanitize.verdict(tool, log, code)
    assert (found["state"], found["reports"]) == (state, reports)


def test_an_explanation_is_for_one_tool_and_kernel():
    name = "control_reads_tma_tiles_mosaic_gpu_kernel"
    log = UNINITIALIZED.replace("KERNEL", name)
    assert sanitize.verdict("initcheck", log, 0)["state"] == "explained"
    assert sanitize.verdict("memcheck", log, 0)["state"] == "errors"
    other = UNINITIALIZED.replace("KERNEL", "moe_unpermute_mosaic_gpu_kernel")
    assert sanitize.verdict("initcheck", other, 0)["state"] == "errors"


def test_only_the_control_may_copy_to_the_host_what_was_not_seen_written():
    copied = (
        "========= COMPUTE-SANITIZER\n"
        "========= Host API memory access error at host access to 0x7f00 of size 16,384 bytes\n"
        "=========     Uninitialized access to 0x7f20 on access by cudaMemcpy source\n"
        "========= ERROR SUMMARY: 1 error\n"
    )
    of_control = sanitize.verdict("initcheck", copied + CONTROL_RAN, 0)
    assert (of_control["state"], of_control["reports"]) == ("explained", {sanitize.COPIED: 1})
    other = copied + CONTROL_RAN.replace("control", "mosaic")
    assert sanitize.verdict("initcheck", other, 0)["state"] == "errors"


# They read and write other GPUs' memory: one GPU alone cannot run them.
NEED_PEERS = {"moe_dispatch", "moe_combine"}


def kernels_of_the_tree():
    """Names of all GPU kernels in the source that one GPU can run, by backend."""
    found = {"mosaic": set(), "triton": set()}
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        found["mosaic"] |= set(re.findall(r'name="(moe_\w+)"', path.read_text()))
        found["triton"] |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert found["mosaic"] > NEED_PEERS  # an exception for a kernel that is no more goes too
    return found | {"mosaic": found["mosaic"] - NEED_PEERS}


@pytest.mark.parametrize("backend", sanitize.BACKENDS)
def test_every_kernel_of_a_backend_runs_under_the_tools(backend, monkeypatch):
    traced = set()
    kernel, run = plgpu.kernel, triton_backend._run

    def noting_mosaic(body, **options):
        traced.add(options["kernel_name"])
        return kernel(body, **options)

    def noting_triton(launch):
        traced.add(launch.kernel.__name__)
        return run(launch)

    monkeypatch.setattr(plgpu, "kernel", noting_mosaic)
    monkeypatch.setattr(triton_backend, "_run", noting_triton)
    with jax_moe.assume_device("sm_90"):
        for inputs, precision in sanitizer_target.layers():
            options = {"config": SMALL, "backend": backend, "precision": precision}
            layer = functools.partial(jax_moe.apply, **options)
            jax.eval_shape(layer, *inputs.arguments)
    names = kernels_of_the_tree()[backend]
    assert len(names) >= 7
    assert names <= traced


@pytest.mark.slow
def test_the_target_checks_its_results(monkeypatch):
    monkeypatch.setattr(sanitizer_target, "TOKENS", (7,))  # tile heights do not matter here
    assert set(sanitizer_target.run("xla")["relative_errors"]) >= {
        "fast T=7 float8_e4m3fn",
        "high T=5 float8_e4m3fn",
    }
    apply = jax_moe.apply
    monkeypatch.setattr(jax_moe, "apply", lambda *a, **k: apply(*a, **k) * 2)
    with pytest.raises(AssertionError, match="T=7: "):
        sanitizer_target.run("xla")


@pytest.fixture
def on_a_gpu(monkeypatch):
    about = {
        "device": {"platform": "gpu", "kind": "NVIDIA H100"},
        "versions": {},
        "commit": "abc",
        "sanitizer": "compute-sanitizer 1",
    }
    monkeypatch.setattr(sanitize, "_about", lambda sanitizer: dict(about))


@pytest.mark.usefixtures("on_a_gpu")
def test_a_run_of_all_tools_is_summarized(tmp_path, capsys):
    """With a stand-in for the tool that finds a race, and hangs under synccheck on triton."""
    script = f"""
case "$*" in
  *synccheck*triton) sleep 60;;
  *racecheck*mosaic) cat <<'END'
{RACE}END
  ;;
  *) cat <<'END'
{CLEAN}END
  ;;
esac
test "$XLA_PYTHON_CLIENT_PREALLOCATE" = false || exit 3
"""
    tool = executable(tmp_path / "compute-sanitizer", script)
    results = tmp_path / "results"
    options = [str(results), "--sanitizer", str(tool), "--timeout", "2"]
    assert sanitize.main(options) == 1
    content = json.loads((results / "sanitize.json").read_text())
    states = {(one["tool"], one["backend"]): one["state"] for one in content["runs"]}
    assert len(states) == 9
    assert states.pop(("racecheck", "mosaic")) == "errors"
    assert states.pop(("synccheck", "triton")) == "timeout"
    assert set(states.values()) == {"clean"}
    shown = (results / "sanitize.md").read_text()
    assert "| racecheck | mosaic | errors | moe_up_projection: 1 |" in shown
    assert "Race reported" in (results / "racecheck_mosaic.log").read_text()

    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{CLEAN}END\n")
    assert sanitize.main([*options, "--tools", "racecheck", "--backends", "mosaic"]) == 1
    assert sanitize.main([*options, "--tools", "synccheck", "--backends", "triton"]) == 0
    again = json.loads((results / "sanitize.json").read_text())["runs"]
    assert {one["state"] for one in again} == {"clean"}

    with folder_lock.held(results), pytest.raises(SystemExit, match="2"):
        sanitize.main([*options, "--overwrite"])
    assert f"{results}: another run is writing here" in capsys.readouterr().err

    (results / "sanitize.json").write_text(json.dumps(content | {"commit": "older"}))
    with pytest.raises(SystemExit, match="2"):
        sanitize.main([*options, "--tools", "racecheck"])
    assert "is of another commit; --overwrite replaces it" in capsys.readouterr().err
    assert len(json.loads((results / "sanitize.json").read_text())["runs"]) == 9
    assert sanitize.main([*options, "--tools", "racecheck", "--overwrite"]) == 0
    assert len(json.loads((results / "sanitize.json").read_text())["runs"]) == 2
    assert len(again) == 9
    for damaged in (1, [1], [{}], [content["runs"][0] | {"reports": []}]):
        (results / "sanitize.json").write_text(json.dumps(content | {"runs": damaged}))
        with pytest.raises(SystemExit, match="2"):
            sanitize.main([*options, "--tools", "racecheck"])
        assert "is of another file; --overwrite replaces it" in capsys.readouterr().err


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("seen", [True, False])
def test_the_control_decides_whether_initcheck_can_judge_unpermute(tmp_path, seen):
    """With a stand-in that reports that kernel, and the control's reader if it is blind."""
    report = UNINITIALIZED.replace(RAN, "%s").replace("KERNEL", "%s_mosaic_gpu_kernel")
    blind = report % ("control_reads_tma_tiles", CONTROL_RAN)
    script = f"""
case "$*" in
  *--help*) echo ' --check-tensor-ops arg (=no)';;
  *sanitizer_control*) cat <<'END'
{CLEAN.replace(RAN, CONTROL_RAN) if seen else blind}END
  ;;
  *--kernel-name-exclude*moe_unpermute*) cat <<'END'
{CLEAN}END
  ;;
  *--check-tensor-ops*) cat <<'END'
{report % ("moe_unpermute", RAN)}END
  ;;
esac
"""
    tool = executable(tmp_path / "compute-sanitizer", script)
    options = [str(tmp_path), "--sanitizer", str(tool), "--tools", "initcheck"]
    assert sanitize.main([*options, "--backends", "mosaic"]) == (1 if seen else 0)
    content = json.loads((tmp_path / "sanitize.json").read_text())
    runs = {one["backend"]: one for one in content["runs"]}
    assert runs["control"]["state"] == ("clean" if seen else "explained")
    assert runs["mosaic"]["state"] == ("errors" if seen else "clean")
    shown = (tmp_path / "sanitize.md").read_text()
    assert ("`moe_unpermute` was left out" in shown) is not seen


def test_the_control_compiles_for_an_h100():
    spec = jax.ShapeDtypeStruct((64, 128), "bfloat16")
    for kind, reader in READERS.items():
        names = [compile_for_h100(fn, spec).kernels[0].name for fn in kernels(kind)]
        assert names == [f"control_writes_{kind}", reader]


def test_what_can_be_executed_and_is_no_program_is_named(tmp_path, capsys):
    empty = executable(tmp_path / "empty", "")
    empty.write_bytes(b"\x7fELF")
    with pytest.raises(SystemExit, match="2"):
        sanitize.main([str(tmp_path / "new"), "--sanitizer", str(empty)])
    assert "error: --sanitizer: [Errno 8] Exec format error" in capsys.readouterr().err


@pytest.mark.usefixtures("on_a_gpu")
def test_a_signal_ends_the_tool_too(tmp_path, monkeypatch, capsys):
    """It has a session of its own, so that it would hear of nothing."""
    started = []

    def communicate(process, **_):
        started.append(process)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    tool = executable(tmp_path / "tool", "sleep 60")
    options = [str(tmp_path), "--sanitizer", str(tool), "--tools", "racecheck"]
    assert interruption.ended(lambda: sanitize.main(options)) == 143
    (process,) = started
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    capsys.readouterr()


@pytest.mark.parametrize("program", [sanitizer_control, sanitizer_target])
def test_a_program_of_the_tools_names_what_it_lacks(program, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main([])
    assert "error: the following arguments are required: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        program.main(["mosaic"])
    assert "needs an NVIDIA GPU" in capsys.readouterr().err.splitlines()[-1]


def test_what_is_missing_is_one_clear_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main([str(tmp_path / "new")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("compute-sanitizer not found")
    assert shown.count("\n") == 1
    about = {"device": {"platform": "cpu", "kind": "cpu"}}
    monkeypatch.setattr(sanitize, "_about", lambda sanitizer: about)
    assert sanitize.main([str(tmp_path / "new"), "--sanitizer", sys.executable]) == 2
    assert capsys.readouterr().err == "no GPU; JAX's device here is 'cpu'\n"
    for arguments, said in (
        (["--tools", "valgrind"], "--tools: expected some of"),
        (["--sanitizer", "/nope"], "--sanitizer: expected a program, got '/nope'"),
        (["--sanitizer", str(ROOT)], "--sanitizer: expected a program, got '/"),
        (["--timeout", "nan"], "argument --timeout: expected a finite number"),
    ):
        with pytest.raises(SystemExit, match="2"):
            sanitize.main([str(tmp_path / "new"), *arguments])
        assert f"error: {said}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
