"""`python -m bench.parallel_gpus`: a folder holds one run, to which calls may add steps."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib

import pytest

from bench import (
    environment,
    parallel_documents,
    parallel_folder,
    parallel_gpus,
    parallel_rows,
    step_record,
)
from bench.parallel_rows import Row
from bench.steps import Step
from bench.workloads import REDUCED
from tests import bench_rows


def test_documents_of_a_folder_without_a_run_are_refused(tmp_path, capsys):
    new = tmp_path / "new"
    for folder in (new, tmp_path):
        assert parallel_gpus.main([f"--output={folder}", "--documents"]) == 2
        said = f"python -m bench.parallel_gpus: --documents: {folder}: there is no run\n"
        assert capsys.readouterr().err == said
    assert list(tmp_path.iterdir()) == []
    assert parallel_gpus.main([f"--output={'a' * 300}", "--documents"]) == 2
    said = f"python -m bench.parallel_gpus: --documents: {'a' * 300}: cannot be used: File name too"
    assert capsys.readouterr().err.startswith(said)


SIZES = REDUCED._asdict() | {"num_local_experts": 0}
WRONG = {"exchange": "nvlink", "tokens": 8, "runs": 2, "same_bits": True, "right": True}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("check_nvlink.json", "{", "not valid JSON: "),
        ("check_nvlink.json", "\0" * 9, "not valid JSON: its bytes are no text"),
        ("primitives_nvlink.json", "[]", "expected a JSON object, got list"),
        ("primitives_nvlink.json", '{"about": {}, "rows": {}}', "damaged: rows: expected a list"),
        ("check_nvlink.json", '{"about": [], "rows": []}', "damaged: about: expected an object"),
        (
            "check_nvlink.json",
            json.dumps({"about": {}, "rows": [WRONG | {"error": math.nan}]}),
            "not valid JSON: NaN is not a number",
        ),
        ("check_nvlink.json", json.dumps({"about": {}, "rows": [WRONG]}), "damaged: Check: no 'er"),
        ("layer_8/parallel.json", '{"about": {}, "rows": [{}]}', "damaged: Row: no 'ranks'"),
        (
            "layer_8/parallel.json",
            json.dumps({"about": {}, "rows": [Row(2, 8, "nvlink", local_us=0.0)._asdict()]}),
            "damaged: Row.local_us: expected more than 0, got 0",
        ),
        (
            "check_nvlink.json",
            json.dumps({"about": {"sizes": SIZES, "reduced": False}, "rows": []}),
            "damaged: about.sizes.num_local_experts: expected a number in 1..",
        ),
        ("parallel_gpus.json", '{"about": {}}', "damaged: no 'steps'"),
        ("steps.jsonl", '{"step": "a", "state": "ok", "seconds": 1}\n{"step', ":2: not valid JSON"),
        (
            "steps.jsonl",
            '{"step": "a", "state": "ok", "seconds": "1"}',
            ":1: seconds: expected a n",
        ),
        ("steps.jsonl", '{"step": "a", "state": "ok"}', ":1: missing 'seconds'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, capsys, measured, name, content, said):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 2
    shown = capsys.readouterr().err
    where = f"python -m bench.parallel_gpus: --documents: {tmp_path / name}"
    assert shown.startswith(where)
    assert said in shown
    assert shown.count("\n") == 1
    if name == "steps.jsonl":  # nothing is measured that could not be recorded
        assert said in measured(tmp_path, "--only=trace")[1]
        assert (tmp_path / name).read_text() == content


def test_values_without_meaning_end_before_a_step_begins(tmp_path, measured):
    there = "check_collectives, layer_1024, primitives_collectives, trace_collectives_128"
    for flags, said in (
        (["--only=primitives,chek"], f"--only: expected parts of {there}, got 'chek'\n"),
        (["--only="], "--only: expected names of steps, or parts of them, got nothing\n"),
        (["--ranks=3"], "--ranks: expected a divisor of 64 experts, got 3\n"),
        (["--resume", "--overwrite"], "--resume and --overwrite contradict each other\n"),
    ):
        assert measured(tmp_path / "new", *flags) == (2, said)
    assert not (tmp_path / "new").exists()


def test_what_an_interruption_left_says_so_and_is_gone_on_with(tmp_path, measured):
    code, said = measured(tmp_path, stops_at="layer_1024")
    assert (code, said) == (
        130,
        "interrupted: --resume goes on, --documents writes what there is\n",
    )
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 0
    text = " ".join((tmp_path / "parallel_gpus.md").read_text().split())
    left = "layer_1024, primitives_collectives, trace_collectives_128"
    assert f"**Incomplete**: 3 of 4 steps have not ended well: {left}." in text
    assert "| layer_1024 | not ended |" in text
    content = json.loads((tmp_path / "parallel_gpus.json").read_text())
    assert content["about"]["complete"] is False
    partial = {"about": {"complete": True}, "rows": []}  # of a step that was cut off in its middle
    (tmp_path / "layer_1024").mkdir()
    kept = (tmp_path / "check_collectives.json").read_bytes()
    about = json.loads(kept)["about"] | {"complete": True}
    content = json.dumps(partial | {"about": about})
    (tmp_path / "layer_1024" / "parallel.json").write_text(content)
    assert "holds check_collectives, layer_1024 of" in measured(tmp_path, stops_at=None)[1]
    assert measured(tmp_path, "--resume") == (0, "")
    assert (tmp_path / "check_collectives.json").read_bytes() == kept
    assert "Incomplete" not in (tmp_path / "parallel_gpus.md").read_text()
    assert json.loads((tmp_path / "parallel_gpus.json").read_text())["about"]["complete"] is True
    before = contents(tmp_path)
    assert measured(tmp_path, "--resume") == (0, "")
    assert contents(tmp_path) == before


def test_results_that_are_gone_or_cut_short_are_missed(tmp_path, measured):
    assert measured(tmp_path, "--only=check,layer,primitives") == (0, "")
    layer = tmp_path / "layer_1024" / "parallel.json"
    content = json.loads(layer.read_text())
    content["about"]["complete"] = False
    layer.write_text(json.dumps(content))
    (tmp_path / "check_collectives.json").unlink()
    lines = step_record.read(tmp_path)
    del lines["primitives_collectives"]
    step_record.write(tmp_path, lines)
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 0
    text = (tmp_path / "parallel_gpus.md").read_text()
    assert text.startswith("# Expert parallelism over 2 x ")
    assert "**Incomplete**: 3 of 3 steps have not ended well" in text
    assert "| check_collectives | results are gone |" in text
    assert "| layer_1024 | results are gone |" in text
    assert "| primitives_collectives | not recorded |" in text
    assert json.loads((tmp_path / "parallel_gpus.json").read_text())["about"]["complete"] is False


def test_steps_without_results_are_measured_when_asked_for_again(tmp_path, measured):
    assert measured(tmp_path, "--only=check", stops_at="check_collectives")[0] == 130
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 0
    assert measured(tmp_path, "--only=check", stops_at=None) == (0, "")


@pytest.mark.parametrize("restoring", [False, True])
def test_a_move_that_is_cut_off_loses_nothing(tmp_path, measured, monkeypatch, restoring):
    assert measured(tmp_path, "--only=check,layer,primitives") == (0, "")
    before = contents(tmp_path)
    replace, moved = pathlib.Path.replace, []

    def cut_off(source, target):
        moved.append(source)
        if len(moved) == (len(before) if restoring else 0) + 3:
            raise KeyboardInterrupt
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", cut_off)
        with contextlib.suppress(KeyboardInterrupt):
            measured(tmp_path, "--overwrite", stops_at="check_collectives")
    assert contents(tmp_path) != before
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 0
    assert contents(tmp_path) == before


@pytest.mark.parametrize("killed", [False, True])
def test_overwrite_loses_nothing_before_there_is_a_result(tmp_path, measured, monkeypatch, killed):
    assert measured(tmp_path, "--only=check,layer") == (0, "")
    before = contents(tmp_path)
    if killed:  # so that nothing is put back by the process itself
        monkeypatch.setattr(parallel_folder, "_settle", lambda *_: None)
    code, _ = measured(tmp_path, "--overwrite", stops_at="check_collectives")
    assert code == 130
    if killed:
        assert contents(tmp_path) != before
        monkeypatch.undo()
        assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 0
    assert contents(tmp_path) == before


def line(step, state):
    return {"step": step.name, "state": state, "seconds": 1.0, "arguments": step.arguments}


@pytest.fixture
def measured(monkeypatch, capsys):
    """Calls the command with steps that write a row each; returns its code and its error."""
    monkeypatch.setattr(environment, "has_gpu_driver", lambda: False)
    now = {"git_commit": "aaaaaaa", "gpu_state": None}
    for name in now:
        monkeypatch.setattr(environment, name, lambda name=name: now[name])

    def run_all(steps, folder, minutes, jobs):
        lines = step_record.read(folder)
        lines |= {step.name: line(step, step_record.NOT_ENDED) for step in steps}
        for step in steps:
            step_record.write(folder, lines)
            if step.name == now.get("stops_at"):
                raise KeyboardInterrupt
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
            lines[step.name] = line(step, step_record.OK)
        step_record.write(folder, lines)
        return 0

    monkeypatch.setattr(parallel_gpus, "run_all", run_all)

    def call(folder, *arguments, ranks=2, **changed):
        now.update(changed, ranks=ranks)
        code = parallel_gpus.main([f"--output={folder}", f"--ranks={ranks}", *arguments])
        return code, capsys.readouterr().err.removeprefix("python -m bench.parallel_gpus: ")

    return call


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_document_names_the_commands_as_they_were_given(tmp_path, measured):
    assert measured(tmp_path, "--only=check")[0] == 0
    assert measured(tmp_path, "--resume")[0] == 0
    text = " ".join((tmp_path / "parallel_gpus.md").read_text().split())
    command = f"python -m bench.parallel_gpus --output {tmp_path} --ranks 2 --minutes 9"
    assert f"`{command} --only check && {command} --resume`" in text
    assert measured(tmp_path, "--only=check", "--overwrite")[0] == 0
    text = " ".join((tmp_path / "parallel_gpus.md").read_text().split())
    assert f"`{command} --only check --overwrite`" in text


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
    on = "--resume measures what has not ended well, "
    for arguments, changed, said in (
        (["--only=check"], {}, f"check_collectives {of}; {on}"),
        ([], {}, f"check_collectives, layer_1024, primitives_collectives {of}; {on}"),
        (["--only=check"], {"ranks": 4}, f"check_collectives {of}; {on}"),
        (["--resume"], {"ranks": 4}, f"check_collectives {of}, with ranks 2, got 4; "),
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


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",)])
def test_another_command_keeps_its_folder(tmp_path, measured, flags):
    (tmp_path / "results.json").write_text("{}")
    said = f"--output: {tmp_path} holds results.json of another command; expected a folder of its"
    assert measured(tmp_path, *flags) == (2, f"{said} own\n")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    (tmp_path / "results.json").unlink()
    step_record.write(tmp_path, {"loading": line(Step("loading", [], 1.0), step_record.OK)})
    said = f"--output: {tmp_path}: holds steps of another command (loading); expected a folder of"
    assert measured(tmp_path, *flags) == (2, f"{said} its own\n")
    assert [path.name for path in tmp_path.iterdir()] == ["steps.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "check_collectives.json: expected a JSON object, got list"),
        ("{}", "check_collectives.json: damaged: no 'rows'"),
        ('{"about": {}, "rows": []}', "with ranks 0, got 2"),
    ],
)
def test_no_step_is_added_to_a_damaged_one(tmp_path, measured, content, message):
    path = tmp_path / "check_collectives.json"
    path.write_text(content)
    code, said = measured(tmp_path, "--only=primitives")
    assert (code, message in said) == (2, True), said
    assert list(contents(tmp_path)) == [path]


def test_no_damage_is_a_traceback_or_replaces_a_document_by_half_of_one(
    tmp_path, measured, monkeypatch, capsys
):
    """Of any file of the run, any value that is another or is not there."""
    assert measured(tmp_path) == (0, "")
    trace = {"exchange": "nvlink", "tokens": 8, "trace": "", "step": "trace_nvlink_8"}
    kernel = {"rank": 0, "name": "a_kernel", "us": 2.0, "launches": 1.0}
    alone = json.loads((tmp_path / "parallel_gpus.json").read_text())
    alone["checks"] = [WRONG | {"error": 0.1, "step": "check_nvlink"}]
    alone["primitives"] = [{"name": "a", "bytes": 8, "us": 1.0, "gb_s": 2.0, "step": "a"}]
    alone["traces"] = [trace | {"kernels": [kernel]}]
    kept_alone = tmp_path / "alone"
    kept_alone.mkdir()
    (kept_alone / "parallel_gpus.json").write_text(json.dumps(alone))
    monkeypatch.setattr(parallel_rows, "plot", lambda *_: False)
    refused = 0
    damaged = ("alone/parallel_gpus.json", "check_collectives.json", "layer_1024/parallel.json")
    for path in map(tmp_path.joinpath, damaged):
        folder = kept_alone if path.parent == kept_alone else tmp_path
        text = path.read_text()
        for place in bench_rows.places(json.loads(text)):
            for odd in bench_rows.ODD:
                content = json.loads(text)
                bench_rows.changed(place, odd)(content)
                path.write_text(json.dumps(content))
                (folder / "parallel_gpus.md").write_text("as it was")
                code = parallel_gpus.main([f"--output={folder}", "--documents"])
                said, document = capsys.readouterr().err, (folder / "parallel_gpus.md").read_text()
                expected = "as it was" if code else "# Expert parallelism over "
                assert document.startswith(expected), (place, odd)
                where = f"python -m bench.parallel_gpus: --documents: {path}: "
                assert said.startswith(where if code else ""), (place, odd)
                refused += bool(code)
        path.write_text(text)
    assert refused > 500
