"""Signals that something swallowed, and surroundings that no command can run in."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys

import jax
import jax.experimental
import numpy as np
import pytest

from bench import environment, layers, option_rows, options, parallel, parallel_rows, shared_expert
from interop import host_time
from pallas_kernels import interruption
from pallas_kernels.tuning import search
from tests.test_bench_commands import ROOT, TIMED
from tools import compare_times

pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs at reduced size")


@pytest.mark.parametrize(
    ("module", "arguments", "found"),
    [
        (
            options,
            ["--workloads=1,7", "--variants=softmax"],
            option_rows.Row("route", "softmax", 7, us=12.5),
        ),
        (layers, ["--tokens=7,8"], layers.Measured(TIMED, None)),
        (shared_expert, ["--tokens=7,8"], shared_expert.Row(7, without_us=12.5)),
        (parallel, ["--tokens=7,8"], [parallel_rows.Row(1, 7, "collectives", layer_us=12.5)]),
    ],
)
def test_a_swallowed_signal_ends_a_command_after_its_row(
    tmp_path, monkeypatch, capsys, module, arguments, found
):
    calls = []

    def measure(*_, **__):
        calls.append(1)
        with contextlib.suppress(KeyboardInterrupt):  # as JAX's callback of the collector does
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(module, "measure", measure)
    for made in ("answer", "make_layer", "devices_for"):  # not needed
        monkeypatch.setattr(module, made, lambda *_: None, raising=False)
    command = [*arguments, f"--output={tmp_path}"]
    assert interruption.ended(lambda: module.main(command)) == 143
    assert len(calls) == 1
    shown = capsys.readouterr()
    assert shown.err.endswith("interrupted\n")
    path = tmp_path / module.FILES[0]
    *_, row, said = shown.out.splitlines()
    assert said == f"what was finished is in {path}"
    assert "12.5" in row or module is layers
    assert shown.out.count(row) == 1
    assert len(json.loads(path.read_text())["rows"]) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_without_a_row_an_interrupted_command_says_of_none(
    tmp_path, monkeypatch, capsys, overwrite
):
    """The file of the earlier run, which `--overwrite` would have replaced, is none of it."""
    monkeypatch.setattr(shared_expert, "make_layer", lambda *_: signal.raise_signal(signal.SIGINT))
    command = ["--tokens=7", f"--output={tmp_path}"]
    if overwrite:
        (tmp_path / shared_expert.FILES[0]).write_text("{}")
        command.append("--overwrite")
    assert interruption.ended(lambda: shared_expert.main(command)) == 130
    shown = capsys.readouterr()
    assert shown.err.endswith("interrupted\n")
    assert "what was finished" not in shown.out
    assert "T" not in {line[:1] for line in shown.out.splitlines()}
    assert [path.name for path in tmp_path.iterdir()] == [shared_expert.FILES[0]][:overwrite]


def test_a_signal_swallowed_at_the_very_end_is_its_exit_code(capsys):
    def main():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    assert interruption.ended(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "command",
    [
        ["bench_main.py", "--list"],
        ["-m", "bench.layers"],
        ["-m", "interop.host_time"],
        ["-m", "jax_moe.tune"],
        ["-c", "import jax_moe; jax_moe.describe()"],
        ["-c", "import jax_moe, numpy as np; jax_moe.quantize(np.ones((1, 128), np.float32))"],
    ],
)
def test_no_device_is_one_line(command):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "tpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "JAX_PLATFORMS=tpu: JAX finds no such device" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["my\u00a0run", "tab\tend", "caf\udce9", "it's", "a b\\n\n"])
def test_a_command_is_printable_and_read_back_by_a_shell(name):
    word = environment.shell_word(name)
    assert word.isprintable()
    said = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert said.stdout == os.fsencode(name)


def test_loops_that_time_ask_for_a_swallowed_signal(monkeypatch):
    monkeypatch.setattr(interruption, "_asked", signal.SIGTERM)
    nothing = lambda *_: None  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        host_time._median(nothing, nothing, nothing)
    with pytest.raises(KeyboardInterrupt):
        search._Attempts(None, None, nothing, None)(None, {})
    with pytest.raises(KeyboardInterrupt):
        compare_times.measure([lambda: np.zeros(1)], (), rounds=1, iterations=1, clock=None)


def test_a_slow_call_is_timed_four_times_only(monkeypatch):
    monkeypatch.setattr(host_time, "MOST_SECONDS", 0.0)
    called = []
    cost = host_time._median(lambda: called.append(0), lambda: None, lambda _: None)
    assert len(called) == 4
    assert 0 < cost.host <= cost.complete


def test_an_interrupted_callback_is_not_logged(caplog, capsys):
    def main():
        jax.jit(lambda: jax.experimental.io_callback(signal.raise_signal, None, signal.SIGINT))()
        jax.effects_barrier()

    assert interruption.ended(main) == 130
    assert not caplog.records
    assert capsys.readouterr().err == "interrupted\n"


def test_an_error_that_a_signal_was_turned_into_ends_as_the_signal(capsys):
    """As XLA does where a host callback is interrupted, and so the interpreter of kernels."""

    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("INTERNAL: CpuCallback error") from None

    assert interruption.ended(main) == 143
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            "temp",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/full/x"),
            "/full/x: cannot be written: No",
        ),
    ],
)
def test_a_disk_that_is_full_everywhere_is_one_line(capsys, error, said):
    def main():
        raise error

    assert interruption.ended(main) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(said)
    assert shown.count("\n") == 1
