"""An export that fails leaves the earlier one as it was."""

from __future__ import annotations

import errno
import os
import pathlib

import pytest

pytest.importorskip("torch")

from interop.flashinfer_bench import __main__
from interop.flashinfer_bench.export import export


def test_an_export_that_the_disk_has_no_room_for_leaves_the_earlier_one(
    tmp_path, monkeypatch, capsys
):
    folder = export(tmp_path)

    def contents():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before, written = contents(), []

    def full(path, content):
        if len(written) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        return len(content)

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    assert __main__.main(["export", str(folder), "--seed=1"]) == 1
    monkeypatch.undo()
    assert contents() == before
    assert capsys.readouterr().err.endswith(".safetensors: No space left on device\n")


@pytest.mark.parametrize("text", ["foo", "", "all,"])
def test_an_unknown_definition_is_named_with_its_flag(tmp_path, capsys, text):
    assert __main__.main(["export", str(tmp_path / "new"), f"--definitions={text}"]) == 2
    assert capsys.readouterr().err.startswith("--definitions: unknown definition ")
    assert not (tmp_path / "new").exists()
