"""A benchmark that is interrupted, or killed, at any moment leaves whole files behind."""

from __future__ import annotations

import errno
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jax_moe
from bench import comparison, documents, environment, session, solutions
from bench.results import PASS
from bench.settings import Settings
from interop import checkout
from interop.solutions.base import Solution
from jax_moe import LayerInputs
from jax_moe.io.files import write_atomically
from pallas_kernels import interruption
from tests.bench_rows import cheap_layer

ROOT = pathlib.Path(__file__).parent.parent
POINTS = 20  # at which a run is interrupted, evenly spread over its calls

MEASURING = tuple(
    f"bench/{name}.py"
    for name in ("correctness", "execution", "inputs", "results", "run_folder", "runner", "session")
)

on_cpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs at reduced size")


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th call or line inside some source files."""

    def __init__(self, n: int | None, folders: tuple[str, ...], lines: bool = False) -> None:
        self.n, self.lines, self.count = n, lines, 0
        self.folders = tuple(str(ROOT / folder) for folder in folders)

    def __enter__(self) -> InterruptAt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(self.folders):
            return None
        if event == ("line" if self.lines else "call"):
            self.count += 1
            if self.count == self.n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace if self.lines else None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an open file
def test_a_write_interrupted_at_any_line_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    old, new = ({"rows": list(range(count))} for count in (3, 4))

    def write(content):
        with write_atomically(path) as file:
            json.dump(content, file)

    files = ("jax_moe/io/files.py", "pallas_kernels/files.py")
    with InterruptAt(None, files, lines=True) as whole:
        write(old)
    assert whole.count >= 7
    for n in range(1, whole.count + 1):  # at the last line the new file is not renamed yet
        with pytest.raises(KeyboardInterrupt), InterruptAt(n, files, lines=True):
            write(new)
        assert json.loads(path.read_text()) == old
    before = os.umask(0o027)
    try:
        write(new)
    finally:
        os.umask(before)
    assert json.loads(path.read_text()) == new
    assert path.stat().st_mode & 0o777 == 0o640
    assert [one.name for one in path.parent.iterdir()] == [path.name]


WRITER = """
import json, sys
from pallas_kernels.files import write_atomically
for count in range(1, 10**6):
    with write_atomically(sys.argv[1]) as file:
        json.dump({"count": count, "rows": list(range(3000))}, file, indent=1)
    if count == 1:
        print("started", flush=True)
"""


def test_a_full_disk_names_the_file(tmp_path):
    """The system's error of a write names none."""

    def write():
        with write_atomically(tmp_path / "document.md") as file:
            file.write("text")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*/document\.md"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "results.json"
    counts = []
    for wait in np.linspace(0.001, 0.06, 12):
        command = [sys.executable, "-c", WRITER, str(path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        content = json.loads(path.read_text())
        assert content["rows"] == list(range(3000))
        counts.append(content["count"])
    assert len(set(counts)) > 1


def small_benchmark(monkeypatch, tmp_path, layer, *workloads):
    """Settings of a run of a cheap oracle and `layer`, which writes no documents."""
    monkeypatch.setattr(jax_moe, "reference", cheap_layer)
    found = {
        name: Solution(name=name, framework="jax", description=name, run=function)
        for name, function in (("torch_reference", cheap_layer), ("ours", layer))
    }
    for module in (solutions, comparison):
        monkeypatch.setattr(module, "known_to", lambda *_: found)
    monkeypatch.setattr(documents, "write_all", lambda *_: [])  # matplotlib takes a second
    monkeypatch.setattr(checkout, "output_of", lambda *_, **__: None)  # so does git
    few = {"warmup": 1, "iterations": 1, "num_trials": 1, "timer": "wall", "on_gpu": False}
    return Settings(solutions=("ours",), output=tmp_path / "out", workloads=workloads, **few)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a small benchmark; returns the exit code, None where the interrupt got through."""
    chosen = small_benchmark(monkeypatch, tmp_path, cheap_layer, "1", "7")

    def execute(n=None, *, resume=False):
        with InterruptAt(n, MEASURING) as tracer:
            try:
                code = session.execute(chosen, documents.Options(), resume=resume)
            except KeyboardInterrupt:
                code = None
        return code, tracer.count

    execute.path = chosen.output / "results.json"
    return execute


@on_cpu
def test_a_run_interrupted_anywhere_leaves_valid_json_of_what_was_finished(run, capsys):
    run()
    run.path.unlink()
    code, calls = run()  # the first run imports, which is calls too
    assert code == session.OK
    every = [(row["solution"], row["num_tokens"]) for row in rows_in(run.path)]
    assert len(every) == 4
    codes, counts = set(), set()
    for n in np.linspace(1, calls, POINTS).astype(int):
        run.path.unlink(missing_ok=True)
        code, _ = run(int(n))
        codes.add(code)
        if not run.path.exists():
            continue
        rows = rows_in(run.path)
        assert [(row["solution"], row["num_tokens"]) for row in rows] == every[: len(rows)]
        assert all(row["status"] == PASS and row["wall"]["n"] > 0 for row in rows)
        complete = json.loads(run.path.read_text())["complete"]
        assert not complete or len(rows) == len(every)
        counts.add(len(rows))
    assert 130 in codes
    assert counts >= {1, 2, 3, 4}
    capsys.readouterr()


@on_cpu
def test_an_interrupted_run_goes_on_where_it_was(run, capsys):
    run()
    run.path.unlink()
    _, calls = run()  # the first run imports, which is calls too
    for n in np.linspace(calls / 8, calls, 8).astype(int):
        run.path.unlink(missing_ok=True)
        code, _ = run(int(n))
        kept = rows_in(run.path) if run.path.exists() else []
        if code == 130 and 0 < len(kept) < 4:
            break
    else:
        pytest.fail("no interrupt between the rows")
    assert run(resume=True)[0] == session.OK
    assert rows_in(run.path)[: len(kept)] == kept
    assert len(rows_in(run.path)) == 4
    capsys.readouterr()


@on_cpu
def test_output_that_cannot_be_written_leaves_the_results_whole(run, monkeypatch, capsys):
    def full(*_):
        raise interruption.OutputError("standard output: cannot be written: No space left")

    monkeypatch.setattr(documents, "conclusion", full)
    with pytest.raises(interruption.OutputError):
        run()
    assert json.loads(run.path.read_text())["complete"] is True
    assert len(rows_in(run.path)) == 4
    said = f"{run.path} is whole, its documents are not; python bench_main.py --documents="
    assert said in capsys.readouterr().err


def rows_in(path: pathlib.Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


@pytest.fixture
def signalled(monkeypatch, tmp_path):
    """Runs a benchmark of one solution that calls `interrupt` once, where it has seven tokens."""
    # A shell starts what it runs in the background with SIGINT ignored, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def execute(interrupt):
        pending = [interrupt]

        def layer(*arguments):
            if LayerInputs.of(*arguments).tokens == 7 and pending:
                pending.pop()()
            return cheap_layer(*arguments)

        chosen = small_benchmark(monkeypatch, tmp_path, layer, "1", "7", "14")
        handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
        with interruption.remembered():
            code = session.execute(chosen, documents.Options())
        assert handlers == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
        interruption.check()  # forgotten with the block
        rows = rows_in(chosen.output / "results.json")
        return code, [(row["solution"], row["num_tokens"]) for row in rows]

    yield execute
    signal.signal(signal.SIGINT, before)


@on_cpu
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_callback_swallows_ends_the_run(signalled, number, capsys):
    """Without a word of Python's about the callback: pytest makes a warning of that, an error."""

    def collect():
        gc.callbacks.append(in_callback)
        gc.collect()

    def in_callback(*_):
        gc.callbacks.remove(in_callback)
        signal.raise_signal(number)

    code, rows = signalled(collect)
    assert code == 128 + number
    assert rows == [(n, t) for t in (1, 7) for n in ("torch_reference", "ours")]
    assert "--resume goes on from there" in capsys.readouterr().out


@on_cpu
def test_an_interrupt_that_became_an_error_is_no_row(signalled, capsys):
    def translated():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("INTERNAL: the callback failed") from error

    code, rows = signalled(translated)
    assert code == 130
    assert rows[-1] == ("torch_reference", 7)
    capsys.readouterr()


@on_cpu
def test_an_interrupt_that_became_an_error_of_the_oracle_ends_the_run(
    signalled, monkeypatch, capsys
):
    def reference(*_, **config):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("INTERNAL: the callback failed") from error

    def break_the_oracle():
        monkeypatch.setattr(jax_moe, "reference", reference)

    code, rows = signalled(break_the_oracle)
    assert code == 143
    assert rows[-1] == ("ours", 7)
    assert "--resume goes on from there" in capsys.readouterr().out


@on_cpu
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_while_jax_starts(monkeypatch, number):
    """JAX's plugins catch all that is raised while they start, log it, and go on."""
    started = []

    def start():
        try:
            signal.raise_signal(number)
        except BaseException:
            pytest.fail("raised where JAX would swallow it")
        started.append(number)
        return "cpu"

    monkeypatch.setattr(jax, "default_backend", start)
    with interruption.remembered():
        with pytest.raises(KeyboardInterrupt):
            environment.default_backend()
        with interruption.deferred():  # what an interrupt ends may start JAX, too
            pass
        assert interruption.acknowledge() == 128 + number
        with interruption.deferred():
            pass
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert started == [number]


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.remembered():
            signal.raise_signal(signal.SIGINT)
            interruption.check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@on_cpu
def test_a_terminated_benchmark_ends_with_143_and_whole_files(tmp_path):
    """SIGTERM, as a scheduler sends it, to the real command line."""
    flags = ["--solutions=jax_moe_xla", f"--output={tmp_path}", "--num_trials=1"]
    process = subprocess.Popen(
        [sys.executable, "bench_main.py", *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    path = tmp_path / "results.json"
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert content["rows"]
    assert "--resume goes on from there" in output


def test_what_the_output_s_encoding_lacks_is_escaped():
    program = "from pallas_kernels import interruption as i; i.exit_with(lambda: print('\\u00fc'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xfc\n", "")
