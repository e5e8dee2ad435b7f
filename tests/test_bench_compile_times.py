"""The measurement of first calls: two processes per shape, the second from the persistent cache."""

from __future__ import annotations

import errno
import json
import os
import subprocess

import pytest

from bench import compile_times


def test_the_second_process_reads_what_the_first_compiled(tmp_path, capsys):
    path = tmp_path / "times.json"
    assert compile_times.main(["--tokens=3", "--backend=xla", f"--output={path}"]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["num_tokens"] == 3
    assert 0 < row["second_process"] < row["first"]
    assert capsys.readouterr().out.splitlines()[0].split() == (
        ["T", "first", "call", "s", "second", "process", "s"]
    )


def test_a_failed_process_is_one_line(monkeypatch, capsys):
    errors = (
        "Traceback (most recent call last):\n  File x\nNotImplementedError: needs Hopper\n  note"
    )
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=errors)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert compile_times.main(["--tokens=3", "--backend=mosaic"]) == 1
    expected = "compile_times: T=3: NotImplementedError: needs Hopper\n"
    assert capsys.readouterr().err == expected
    failed.stderr = ""
    with pytest.raises(RuntimeError, match="T=3: no output"):
        compile_times.measure([3], "xla")


@pytest.mark.parametrize("what", ["full", "interrupted"])
def test_the_table_is_shown_before_a_file_is_written(monkeypatch, capsys, tmp_path, what):
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
    assert shown.out.splitlines()[1].split() == ["3", "2.0", "1.0"]
    expected = {
        "full": (1, f"compile_times: {path}: cannot be written: No space left on device\n"),
        "interrupted": (130, "compile_times: interrupted\n"),
    }
    assert (code, shown.err) == expected[what]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokens", ["", "0", "1,x", "-3"])
def test_what_is_no_token_count_is_refused(tokens, capsys):
    with pytest.raises(SystemExit, match="2"):
        compile_times.main([f"--tokens={tokens}"])
    assert "--tokens: expected positive numbers" in capsys.readouterr().err


def test_a_missing_folder_is_named_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        compile_times.main([f"--output={tmp_path}/missing/times.json"])
    assert "--output: expected a path in a folder that exists" in capsys.readouterr().err
