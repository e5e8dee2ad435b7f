"""The measurement of first calls: two processes per shape, the second from the persistent cache."""

from __future__ import annotations

import json

import jax
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


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the backend works there")
def test_a_failed_process_is_one_line():
    with pytest.raises(RuntimeError, match=r"^T=3: NotImplementedError: .*Hopper"):
        compile_times.measure([3], "mosaic")


@pytest.mark.parametrize("tokens", ["", "0", "1,x", "-3"])
def test_what_is_no_token_count_is_refused(tokens, capsys):
    with pytest.raises(SystemExit, match="2"):
        compile_times.main([f"--tokens={tokens}"])
    assert "--tokens: expected positive numbers" in capsys.readouterr().err


def test_a_missing_folder_is_named_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        compile_times.main([f"--output={tmp_path}/missing/times.json"])
    assert "--output: expected a path in a folder that exists" in capsys.readouterr().err
