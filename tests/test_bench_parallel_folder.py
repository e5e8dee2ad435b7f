"""`python -m bench.parallel_gpus`: a folder holds one run, to which calls may add steps."""

from __future__ import annotations

import json

import pytest

from bench import environment, parallel_documents, parallel_gpus, parallel_rows
from bench.parallel_rows import Row
from bench.workloads import REDUCED


def test_documents_of_a_folder_without_a_run_are_refused(tmp_path, capsys):
    new = tmp_path / "new"
    for folder in (new, tmp_path):
        assert parallel_gpus.main([f"--output={folder}", "--documents"]) == 2
        said = f"python -m bench.parallel_gpus: --documents: {folder}: there is no run\n"
        assert capsys.readouterr().err == said
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(tmp_path, capsys):
    (tmp_path / "check_nvlink.json").write_text("{")
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 2
    assert f": {tmp_path / 'check_nvlink.json'}: cannot be used: " in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch, capsys):
    """Calls the command with steps that write a row each; returns its code and its error."""
    monkeypatch.setattr(environment, "has_gpu_driver", lambda: False)
    now = {"git_commit": "aaaaaaa", "gpu_state": None}
    for name in now:
        monkeypatch.setattr(environment, name, lambda name=name: now[name])

    def run_all(steps, folder, minutes, jobs):
        for step in steps:
            ranks = now["ranks"]
            about = {
                "started": f"2026-01-01T00:00:{len(list(folder.iterdir())):02}",
                "command": " ".join(["python", *step.arguments]),
                "sizes": REDUCED.over(ranks)._asdict(),
                "reduced": True,
                "note": "n",
                "versions": environment.versions(),
                "gpu_state": now["gpu_state"],
                "git_commit": now["git_commit"],
            }
            if step.name.startswith("layer"):
                rows = [Row(ranks, 1, "collectives", layer_us=2.0, local_us=1.0)]
                parallel_rows.write(rows, about, folder / step.name / "parallel.json")
            else:
                content = {"about": about, "rows": []}
                parallel_documents.write_json(content, folder / f"{step.name}.json")
            (folder / f"{step.name}.log").touch()
            with (folder / "steps.jsonl").open("a") as record:
                line = {"step": step.name, "state": "ok", "seconds": 1.0}
                record.write(json.dumps(line) + "\n")
        return 0

    monkeypatch.setattr(parallel_gpus, "run_all", run_all)

    def call(folder, *arguments, ranks=2, **changed):
        now.update(changed, ranks=ranks)
        code = parallel_gpus.main([f"--output={folder}", f"--ranks={ranks}", *arguments])
        return code, capsys.readouterr().err.removeprefix("python -m bench.parallel_gpus: ")

    return call


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_steps_of_one_run_are_added_and_those_of_another_are_refused(tmp_path, measured):
    assert measured(tmp_path, "--only=primitives", "--minutes=1") == (0, "")
    assert measured(tmp_path, "--only=check,layer") == (0, "")
    text = " ".join((tmp_path / "parallel_gpus.md").read_text().split())
    command = f"python -m bench.parallel_gpus --output {tmp_path} --ranks 2"
    assert (
        f"`{command} --minutes 1 --only primitives && {command} --minutes 9 --only check,layer`"
    ) in text
    before = contents(tmp_path)
    held, over = f"--output: {tmp_path} holds", "--overwrite replaces it\n"
    of = "of an earlier run"
    for arguments, changed, said in (
        (["--only=check"], {}, f"check_collectives {of}; "),
        ([], {}, f"check_collectives, layer_1024, primitives_collectives {of}; "),
        (["--only=check"], {"ranks": 4}, f"check_collectives {of}; "),
        (["--only=trace"], {"ranks": 4}, f"check_collectives {of}, with ranks 2, got 4; "),
        (
            ["--only=trace"],
            {"git_commit": "bbbbbbb"},
            f"check_collectives {of}, with commit aaaaaaa, got bbbbbbb; ",
        ),
        (
            ["--only=trace"],
            {"git_commit": "aaaaaaa", "gpu_state": {"name": "NVIDIA H200"}},
            f"check_collectives {of}, with GPU none, got NVIDIA H200; ",
        ),
    ):
        assert measured(tmp_path, *arguments, **changed) == (2, f"{held} {said}{over}")
    assert contents(tmp_path) == before


def test_overwrite_begins_anew_and_leaves_what_is_not_of_the_run(tmp_path, measured):
    assert measured(tmp_path, "--only=check,layer,primitives") == (0, "")
    (tmp_path / "layer_1024" / "mine").touch()
    assert measured(tmp_path, "--only=check", "--overwrite", ranks=4) == (0, "")
    assert {str(path.relative_to(tmp_path)) for path in contents(tmp_path)} == {
        *("layer_1024/mine", "steps.jsonl", "check_collectives.json", "check_collectives.log"),
        *("parallel_gpus.json", "parallel_gpus.md"),
    }
    content = json.loads((tmp_path / "parallel_gpus.json").read_text())
    assert [step["step"] for step in content["steps"]] == ["check_collectives"]
    assert content["about"]["sizes"] == REDUCED.over(4)._asdict()


def test_a_document_that_was_kept_alone_is_not_replaced(tmp_path, measured):
    (tmp_path / "parallel_gpus.json").write_text("{}")
    said = f"--output: {tmp_path} holds parallel_gpus.json of an earlier run; --overwrite "
    assert measured(tmp_path) == (2, f"{said}replaces it\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "check_collectives.json: expected a JSON object, got list"),
        ("{}", "with ranks 0, got 2"),
    ],
)
def test_no_step_is_added_to_a_damaged_one(tmp_path, measured, content, message):
    path = tmp_path / "check_collectives.json"
    path.write_text(content)
    code, said = measured(tmp_path, "--only=primitives")
    assert (code, message in said) == (2, True), said
    assert list(contents(tmp_path)) == [path]
