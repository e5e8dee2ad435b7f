"""An export that fails leaves the earlier one as it was."""

from __future__ import annotations

import errno
import os
import pathlib

import pytest

pytest.importorskip("torch")

from interop import definitions
from interop.dataset import read_workloads, stand_ins
from interop.flashinfer_bench import __main__
from interop.flashinfer_bench.export import export, export_each


def test_a_link_that_loops_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"loop: .*: expected a folder, got a link that loops$"):
        export(tmp_path / "loop")
    with pytest.raises(ValueError, match="below: cannot be used: Too many levels of symbolic"):
        export(tmp_path / "loop/below")


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
    assert __main__.main(["export", str(folder), "--seed=1", "--overwrite"]) == 1
    monkeypatch.undo()
    assert contents() == before
    assert capsys.readouterr().err.endswith(".safetensors: No space left on device\n")


@pytest.mark.parametrize("text", ["foo", "", "all,"])
def test_an_unknown_definition_is_named_with_its_flag(tmp_path, capsys, text):
    assert __main__.main(["export", str(tmp_path / "new"), f"--definitions={text}"]) == 2
    assert capsys.readouterr().err.startswith("--definitions: unknown definition ")
    assert not (tmp_path / "new").exists()


def test_an_export_with_other_blobs_is_replaced_only_if_asked(tmp_path, capsys):
    folder = str(export(tmp_path))
    readme = tmp_path / "README.md"
    before = readme.read_bytes()
    assert __main__.main(["export", folder]) == 0  # the same again
    assert __main__.main(["export", folder, "--seed=1"]) == 2
    said = ": is of an export with another --seed or --dataset; --overwrite replaces it\n"
    assert capsys.readouterr().err.endswith(said)
    assert readme.read_bytes() == before
    assert __main__.main(["export", folder, "--seed=1", "--overwrite"]) == 0
    assert "seed 1" in readme.read_text()


def test_copied_stand_ins_stay_stand_ins(tmp_path, capsys):
    drawn = export(tmp_path / "drawn")
    copied = export(tmp_path / "copied", dataset=drawn)
    blobs = sorted(copied.glob("blob/**/*.safetensors"))
    assert len(blobs) == 19
    assert all(blob.name.startswith("stand_in_") for blob in blobs)
    assert "Routing blobs: stand-ins, not the published blobs" in (copied / "README.md").read_text()
    rows = [row.workload for row in read_workloads(copied)]
    assert stand_ins(rows) == "stand-ins, not the published blobs"
    rows[0] = rows[0]._replace(blob="abc.safetensors")
    assert stand_ins(rows).endswith(" for 18 of the 19 workloads")
    assert stand_ins(rows[:1]) == ""


def test_a_data_set_is_not_exported_into_itself(tmp_path, capsys):
    export(tmp_path)
    assert __main__.main(["export", str(tmp_path), "--dataset", f"{tmp_path}/."]) == 2
    said = f"--dataset: expected another folder than the export's, got {tmp_path}\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("part", ["workloads", "solutions/mine"])
def test_an_export_within_a_data_set_is_refused(tmp_path, capsys, part):
    """Its workloads would be read as those of the data set around it."""
    root = export(tmp_path / "outer")
    assert __main__.main(["export", str(root / part / "inner")]) == 2
    inner = root / part / "inner"
    assert capsys.readouterr().err == f"{inner}: lies in the data set {root}; use another folder\n"
    assert not inner.exists()
    assert __main__.main(["export", str(root)]) == 0


def test_what_an_export_would_pass_over_is_refused(tmp_path, capsys):
    other = definitions.ALL[-1].name
    assert other != definitions.DEFAULT.name
    for flags, said in (
        (["--seed=1", f"--dataset={tmp_path}"], "--seed: is of stand-ins, got --dataset too"),
        (["--seed=1", f"--definitions={other}"], f"--seed: draws nothing of --definitions={other}"),
    ):
        assert __main__.main(["export", str(tmp_path / "new"), *flags]) == 2
        assert capsys.readouterr().err == f"{said}\n"
    one, several = tmp_path / "one", tmp_path / "several"
    (one / "workloads").mkdir(parents=True)
    assert __main__.main(["export", str(one), "--definitions=all"]) == 2
    assert "holds a data set; --definitions needs another folder" in capsys.readouterr().err
    (several / other / "workloads").mkdir(parents=True)
    assert __main__.main(["export", str(several)]) == 2
    assert "holds data sets of --definitions; use another folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_export_that_is_refused_leaves_no_folder(tmp_path):
    folder = tmp_path / "new" / "export"
    with pytest.raises(ValueError, match="--dataset"):
        export(folder, dataset=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
    earlier = export(tmp_path / "earlier")
    with pytest.raises(ValueError, match=r"--dataset: .* got --definitions of moe_"):
        export_each(folder, ["all"], dataset=earlier)
    assert not folder.exists()
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="--dataset"):
        export(folder, dataset=tmp_path / "nowhere")
    assert folder.is_dir()  # the caller's own stays


def test_a_readme_of_somebody_else_is_kept(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("my notes\n")
    assert __main__.main(["export", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"{readme}: was not written by an export; ")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert readme.read_text() == "my notes\n"
    assert __main__.main(["export", str(tmp_path), "--overwrite"]) == 0
    assert __main__.main(["export", str(tmp_path)]) == 0  # now it is an export's
