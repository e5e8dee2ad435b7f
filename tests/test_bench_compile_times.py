"""The measurement of first calls: two processes per shape, the second from the persistent cache."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess

import jax
import pytest

from bench import compile_times


def test_the_second_process_reads_what_the_first_compiled(tmp_path, capsys):
    path = tmp_path / "times.json"
    assert compile_times.main(["--tokens=3", "--backend=xla", f"--output={path}"]) == 0
    written = json.loads(path.read_text())
    (row,) = written["rows"]
    assert written["complete"] is True
    assert (written["backend"], written["reduced"]) == ("xla", True)
    assert written["note"].endswith("REDUCED to H=256, I=128, E=64; times mean nothing")
    assert row["num_tokens"] == 3
    assert 0 < row["second_process"] < row["first"]
    *_, titles, _, said = capsys.readouterr().out.splitlines()
    assert titles.split() == ["T", "first", "call", "s", "second", "process", "s"]
    assert said == f"wrote {path}"


def test_a_failed_process_is_one_line(monkeypatch, capsys):
    errors = (
        "Traceback (most recent call last):\n  File x\nNotImplementedError: needs Hopper\n  note"
    )
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=errors)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert compile_times.main(["--tokens=3", "--backend=xla"]) == 1
    expected = "compile_times: T=3: NotImplementedError: needs Hopper\n"
    assert capsys.readouterr().err == expected
    failed.stderr = ""
    with pytest.raises(RuntimeError, match="T=3: no output"):
        list(compile_times.measure([3], "xla"))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the backend runs there")
def test_a_backend_that_cannot_run_is_refused_before_any_process(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(SystemExit) as raised:
        compile_times.main(["--tokens=3", "--backend=mosaic"])
    assert raised.value.code == 2
    assert "error: --backend=mosaic: needs an NVIDIA GPU of compute" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["full", "interrupted"])
def test_a_table_is_shown_where_its_file_is_not_written(monkeypatch, capsys, tmp_path, what):
    row = {"num_tokens": 3, "first": 2.0, "second_process": 1.0}
    monkeypatch.setattr(compile_times, "measure", lambda *_: [row])

    def dump(*_, **__):
        raise (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if what == "full"
            else (KeyboardInterrupt)
        )

    monkeypatch.setattr(json, "dump", dump)
    path = tmp_path / "times.json"
    code = compile_times.main(["--tokens=3", f"--output={path}"])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].split() == ["3", "2.0", "1.0"]
    expected = {
        "full": (1, f"compile_times: {path}: cannot be written: No space left on device\n"),
        "interrupted": (130, "compile_times: interrupted\n"),
    }
    assert (code, shown.err) == expected[what]
    assert list(tmp_path.iterdir()) == []


def test_rows_are_kept_as_they_are_finished(monkeypatch, capsys, tmp_path):
    def measure(*_):
        yield {"num_tokens": 3, "first": 2.0, "second_process": 1.0}
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(compile_times, "measure", measure)
    path = tmp_path / "times.json"
    assert compile_times.main(["--tokens=3,5", f"--output={path}"]) == 143
    first, *_, last = capsys.readouterr().out.splitlines()
    assert last.split() == ["3", "2.0", "1.0"]
    assert ("REDUCED" in first) == (jax.default_backend() != "gpu")
    written = json.loads(path.read_text())
    assert (len(written["rows"]), written["complete"]) == (1, False)


def test_two_runs_into_one_file_keep_the_first_ones_rows(monkeypatch, capsys, tmp_path):
    path = tmp_path / "times.json"

    def measure(tokens, _):
        for more in ([], ["--overwrite"]):  # a second run, while the first one measures
            with pytest.raises(SystemExit, match="2"):
                compile_times.main(["--tokens=5", f"--output={path}", *more])
            said = f"error: --output: {path}: another run is writing this file; use another one"
            assert capsys.readouterr().err.splitlines()[-1].endswith(said)
        yield from ({"num_tokens": one, "first": 2.0, "second_process": 1.0} for one in tokens)

    monkeypatch.setattr(compile_times, "measure", measure)
    assert compile_times.main(["--tokens=3", f"--output={path}"]) == 0
    assert [row["num_tokens"] for row in json.loads(path.read_text())["rows"]] == [3]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_results_is_replaced_by_a_row_and_only_if_asked(monkeypatch, capsys, tmp_path):
    left = [{"num_tokens": 3, "first": 2.0, "second_process": 1.0}]

    def measure(*_):
        yield from left
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_times, "measure", measure)
    path = tmp_path / "times.json"
    path.write_text("complete")
    with pytest.raises(SystemExit, match="2"):
        compile_times.main(["--tokens=3,5", f"--output={path}"])
    said = f"error: --output: {path} is there; --overwrite replaces it"
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)
    with pytest.raises(SystemExit, match="2"):
        compile_times.main(["--overwrite"])
    assert "--overwrite: goes with --output=FILE" in capsys.readouterr().err
    row = left.pop()
    assert compile_times.main(["--tokens=3,5", "--overwrite", f"--output={path}"]) == 130
    assert path.read_text() == "complete"
    left.append(row)
    assert compile_times.main(["--tokens=3,5", "--overwrite", f"--output={path}"]) == 130
    assert json.loads(path.read_text())["rows"] == [row]


@pytest.mark.parametrize("tokens", ["", "0", "1,x", "-3", "\u00b2", "9" * 5000, "1048577"])
def test_what_is_no_token_count_is_refused(tokens, capsys):
    with pytest.raises(SystemExit, match="2"):
        compile_times.main([f"--tokens={tokens}"])
    assert "argument --tokens: expected" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path, capsys):
    expected = {
        f"{tmp_path}/missing/times.json": "expected a path in a folder that exists, got ",
        f"{tmp_path}": "expected a file, got the folder ",
        "/dev/null": "expected a file, got the link, socket or device /dev/null",
        "": "expected a file, got an empty name",
        "/proc/times.json": "/proc: cannot be used: No such file or directory",
        "~nobody_here/x": "expected a path, got '~nobody_here/x': that user has no home",
    }
    for path, said in expected.items():
        with pytest.raises(SystemExit, match="2"):
            compile_times.main([f"--output={path}"])
        assert f"argument --output: {said}" in capsys.readouterr().err
