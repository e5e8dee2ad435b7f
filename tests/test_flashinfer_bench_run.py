"""What `run` refuses before it starts the benchmark, what it records, and what the report says."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import signal

import pytest

torch = pytest.importorskip("torch")

from interop import folder_lock, workloads  # noqa: E402
from interop.flashinfer_bench import __main__, run, traces, workspace  # noqa: E402
from interop.flashinfer_bench.export import export  # noqa: E402
from interop.flashinfer_bench.record import RECORD, Settings  # noqa: E402
from interop.flashinfer_bench.report import report  # noqa: E402
from interop.solutions import packages  # noqa: E402
from tests.flashinfer_folders import NAME, TRACES, failed, trace, write_traces  # noqa: E402

MEASURED = pathlib.Path(__file__).parent.parent / "results" / "h100" / "flashinfer_bench"
ROWS = workloads.workloads()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> pathlib.Path:
    return export(tmp_path_factory.mktemp("export"))


@pytest.fixture
def folder(exported, tmp_path) -> pathlib.Path:
    """A copy to spoil, without the blobs."""
    root = tmp_path / "folder"
    shutil.copytree(exported, root, ignore=shutil.ignore_patterns("blob"))
    return root


@pytest.fixture(autouse=True)
def installed(monkeypatch) -> None:
    monkeypatch.setattr(run, "_is_installed", lambda: True)
    monkeypatch.setattr(packages, "hopper_unavailable", lambda: None)
    monkeypatch.setattr(run, "git_commit", lambda: "abc")


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The commands that would have run."""
    commands: list[list[str]] = []

    def start(command, env, check):
        commands.append(command)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(run.subprocess, "run", start)
    return commands


def test_a_run_can_be_cut_into_pieces(folder, monkeypatch):
    seen = {}
    (folder / "workloads").rename(folder / "elsewhere")  # a link within the folder is followed
    (folder / "workloads").symlink_to("elsewhere")

    def record(command, env, check):
        root = pathlib.Path(command[command.index("--local") + 1])
        lines = (root / f"workloads/moe/{NAME}.jsonl").read_text().splitlines()
        seen["tokens"] = [json.loads(line)["workload"]["axes"]["seq_len"] for line in lines]
        seen["solutions"] = len(list((root / "solutions").rglob("*.json")))
        (root / "traces" / "x").write_text("kept")
        seen["command"], seen["env"] = command, env
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(run.subprocess, "run", record)
    assert run.run(folder, tokens=[1, 80], extra=["--use-isolated-runner"]) == 0
    assert sorted(seen["tokens"]) == [1, 80]
    assert seen["solutions"] == 4
    assert (folder / "traces" / "x").read_text() == "kept"
    assert seen["command"][-1] == "--use-isolated-runner"
    assert seen["env"]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    with pytest.raises(ValueError, match="no workload"):
        run.run(folder, tokens=[2])


def test_tolerances_that_are_not_loosened_are_for_16_bit_activations(folder, started, capsys):
    """flashinfer-bench's own defaults, which no FP8 activation meets."""
    strict = ["--rtol=0.01", "--atol=0.01", "--required-matched-ratio=0.95"]
    assert __main__.main(["run", str(folder), "--solutions=jax_moe_mosaic_high", *strict]) == 0
    ((*_, command),) = [started]
    chosen = command[command.index("--solutions") + 1 : command.index("--warmup-runs")]
    assert chosen == ["jax_moe_mosaic_high"]
    for flag, value in (("rtol", "0.01"), ("atol", "0.01"), ("required-matched-ratio", "0.95")):
        assert command[command.index(f"--{flag}") + 1] == value
    recorded = json.loads((folder / RECORD).read_text())
    assert recorded["settings"]["required_matched_ratio"] == 0.95
    assert "--solutions jax_moe_mosaic_high --warmup-runs" in recorded["command"]
    assert __main__.main(["run", str(folder)]) == 0
    command = started[-1]
    chosen = command[command.index("--solutions") + 1 : command.index("--warmup-runs")]
    assert chosen == ["sglang_v1", "sglang_v2", "jax_moe_mosaic"]
    assert __main__.main(["run", str(folder), "--solutions=jax_moe_mosaic,jax_moe"]) == 2
    assert capsys.readouterr().err.startswith("--solutions: expected some of sglang_v1, sglang_v2")


def test_without_the_package_nothing_is_written(folder, monkeypatch, capsys):
    monkeypatch.setattr(run, "_is_installed", lambda: False)
    before = sorted(folder.rglob("*"))
    assert __main__.main(["run", str(folder), "--tokens", "1"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("flashinfer-bench is not installed: pip install '.[peers]'")
    assert shown.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_wrong_folder_or_name_is_said_before_a_package_that_is_missing(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run, "_is_installed", lambda: False)
    assert __main__.main(["run", str(folder), "--solutions=jax_moe"]) == 2
    assert capsys.readouterr().err.startswith("--solutions: expected some of sglang_v1")
    assert __main__.main(["run", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "none" in said
    assert "installed" not in said


def test_without_a_gpu_nothing_is_written(folder, started, monkeypatch, capsys):
    monkeypatch.setattr(packages, "hopper_unavailable", lambda: "PyTorch sees no CUDA device")
    before = sorted(folder.rglob("*"))
    assert __main__.main(["run", str(folder)]) == 2
    assert capsys.readouterr().err == "run: PyTorch sees no CUDA device\n"
    assert sorted(folder.rglob("*")) == before
    assert not started


@pytest.mark.parametrize("tokens", ["", "x", "1,,7", "-1", "1.5"])
def test_token_counts_are_checked_under_their_flag(folder, started, capsys, tokens):
    assert __main__.main(["run", str(folder), f"--tokens={tokens}"]) == 2
    expected = f"--tokens: expected token counts such as 1,7,80, got {tokens!r}\n"
    assert capsys.readouterr().err == expected
    assert not started


def test_a_second_run_into_the_folder_is_refused(folder, started, monkeypatch, capsys):
    monkeypatch.setattr(workspace, "_check_machine", lambda _: None)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with folder_lock.held(folder):
        for command in (["run"], ["workspace"], ["export", "--seed=2", "--overwrite"]):
            assert __main__.main([command[0], str(folder), *command[1:]]) == 2
            shown = capsys.readouterr().err
            assert shown == f"{folder}: another run is writing here; use another folder\n"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert not started
    assert __main__.main(["run", str(folder)]) == 0
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_is_one_line(folder, monkeypatch, capsys, number, code):
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: signal.raise_signal(number))
    assert __main__.main(["run", str(folder)]) == code
    assert capsys.readouterr().err == "run: interrupted; files are as they were or whole\n"


def test_a_full_disk_is_one_line_that_names_the_file(folder, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / RECORD))

    monkeypatch.setattr(run.record, "keep", full)
    assert __main__.main(["run", str(folder)]) == 1
    assert capsys.readouterr().err == f"{folder / RECORD}: No space left on device\n"


def spoil_solution(root: pathlib.Path, **changes) -> None:
    path = root / f"solutions/jax-moe/moe/{NAME}/sglang_v1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": [{"path": "../../x.py", "content": ""}]}, "relative path without"),
        ({"shell": "rm"}, "unknown key 'shell'"),
        ({"name": "sglang_v2"}, "'sglang_v2' appears twice"),
    ],
)
def test_solutions_are_checked_before_they_run(folder, started, changes, message, capsys):
    spoil_solution(folder, **changes)
    assert __main__.main(["run", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not started
    assert not (folder / RECORD).exists()


LINKS = [
    *("definitions", "workloads", "solutions", "traces", "blob", ".cache"),
    *("traces/moe", TRACES, "definitions/moe/x.json", "solutions/x.json"),
    *("workloads/x.jsonl", "traces/x.jsonl"),
]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("tokens", [(), (1,)], ids=["all", "a piece"])
def test_nothing_outside_of_the_folder_reaches_the_benchmark(folder, started, name, tokens):
    """Each link leads to what the folder had there, or to an empty folder, but outside."""
    outside = folder.parent / "outside"
    link = folder / name
    if link.exists():
        link.rename(outside)
    elif link.suffix:
        outside.write_text("{}")
    else:
        outside.mkdir()
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of the data set folder"):
        run.run(folder, tokens=tokens)
    assert not started


def test_a_blob_outside_of_the_folder_does_not_reach_the_benchmark(folder, started):
    blob = folder / f"blob/workloads/moe/{NAME}/stand_in_{ROWS[0].uuid}.safetensors"
    blob.parent.mkdir(parents=True)
    blob.symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=f"{ROWS[0].uuid}.safetensors: leads out"):
        run.run(folder)
    assert not started


def test_pieces_must_be_measured_alike(folder, started, monkeypatch):
    few = Settings(iterations=5)
    assert run.run(folder) == 0
    assert run.run(folder, few, tokens=[1]) == 0  # the first left no traces: it speaks for nothing
    write_traces(folder, [trace(ROWS[0], "sglang_v1", 1.0)])
    kept = (folder / RECORD).read_bytes()
    assert run.run(folder, few, tokens=[80]) == 0
    assert len(started) == 3
    with pytest.raises(
        ValueError, match=r"run\.json: settings: iterations: .* have 5, .* has 100;"
    ):
        run.run(folder, tokens=[901])
    with pytest.raises(ValueError, match=r"run\.json: command: .*--use-isolated-runner"):
        run.run(folder, few, extra=["--use-isolated-runner"])
    monkeypatch.setattr(run, "_versions", lambda: {"jax": "0.0"})
    with pytest.raises(ValueError, match=r"run\.json: versions: jax: .* this run has '0\.0'"):
        run.run(folder, few)
    assert len(started) == 3
    assert (folder / RECORD).read_bytes() == kept


def test_traces_of_unknown_settings_are_not_added_to(folder, started):
    write_traces(folder, [trace(ROWS[0], "sglang_v1", 1.0)])
    with pytest.raises(ValueError, match=r"run\.json: missing, but the folder holds traces"):
        run.run(folder)
    assert not started
    assert not (folder / RECORD).exists()


SPOILED_RECORDS = {
    "a list of iterations": (lambda r: r["settings"].update(iterations=[5]), "iterations: exp"),
    "true iterations": (lambda r: r["settings"].update(iterations=True), "got True"),
    "text for a tolerance": (lambda r: r["settings"].update(rtol="0.2\n"), "rtol: expected"),
    "endless timeout": (lambda r: r["settings"].update(timeout=10**400), "timeout: expected"),
    "command of two lines": (lambda r: r.update(command="a\n```"), "command: expected one line"),
    "version of no text": (lambda r: r["versions"].update(jax=1), "versions: jax: expected one"),
    "library of two lines": (lambda r: r["versions"].update({"a\nb": "1"}), "versions: expected"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), SPOILED_RECORDS.values(), ids=SPOILED_RECORDS)
def test_hostile_records_are_refused(folder, started, spoil, message):
    run.run(folder)
    record = json.loads((folder / RECORD).read_text())
    spoil(record)
    (folder / RECORD).write_text(json.dumps(record))
    write_traces(folder, [trace(ROWS[0], "sglang_v1", 1.0)])
    for use in (report, run.run):
        with pytest.raises(ValueError, match=rf"run\.json: .*{message}"):
            use(folder)
    assert len(started) == 1


def test_the_report_from_traces(folder):
    latencies = {"jax_moe_mosaic": 0.5, "sglang_v1": 2.0, "sglang_v2": 1.0}
    rows = [trace(row, name, latency) for row in ROWS for name, latency in latencies.items()]
    rows[1] = trace(ROWS[0], "sglang_v1", 0, status="TIMEOUT")
    write_traces(folder, rows)
    settings = Settings(warmup_runs=2, iterations=5, num_trials=1)
    record = {"command": "flashinfer-bench run", "settings": settings._asdict(), "versions": {}}
    (folder / RECORD).write_text(json.dumps(record))
    sizes = {"sglang_v1": {row.uuid: 1 << 30 for row in ROWS}}
    (folder / "workspace.json").write_text(json.dumps(sizes))
    text = report(folder).read_text()
    assert text.startswith("# sglang_v1 vs sglang_v2 vs jax_moe_mosaic\n")
    assert "- Device: NVIDIA H100 80GB HBM3" in text
    assert "- Routing blobs: stand-ins, not the published blobs" in text
    assert "rtol 0.2, atol 0.1, required_matched_ratio 0.85" in text
    assert "warmup_runs 2, iterations 5, num_trials 1, timeout 600" in text
    assert "sglang_v1 18 of 19" in text
    assert "`jax_moe_mosaic` is 4.00x as fast as `sglang_v1`" in text
    assert "- `sglang_v1`: 1,073,741,824 bytes" in text
    assert "- Date: 2026-01-01\n" in text
    assert "| `b8f4f012` | 7 | 192 | TIMEOUT | 10.00x | 20.00x | - | - | 2.00x |" in text
    assert "| `b8f4f012` | 7 | 192 | TIMEOUT | 1.000 | 0.500 |" in text
    assert "- `sglang_v1`: 18 of 19 workloads PASS" in text
    assert "mean of n = 5 calls (5 iterations x 1 trials)" in text


def test_the_measured_traces_are_of_the_exported_workloads(folder, tmp_path):
    write_traces(folder, [])
    shutil.copy(MEASURED / "traces.jsonl", folder / TRACES)
    shutil.copy(MEASURED / RECORD, folder / RECORD)
    text = report(folder, tmp_path / "out").read_text()
    assert "jax_moe_mosaic 19 of 19, sglang_v1 19 of 19, sglang_v2 19 of 19" in text


@pytest.mark.parametrize(
    ("name", "came"),
    [("file", "got a file"), ("link", "got a link to nothing"), ("file/x", "Not a directory")],
)
def test_a_report_into_what_is_no_folder_names_the_flag(folder, tmp_path, capsys, name, came):
    write_traces(folder, [trace(row, "sglang_v1", 2.0) for row in ROWS])
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    output = tmp_path / name
    assert __main__.main(["report", str(folder), f"--output={output}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"--output: {output}: cannot be used: ")
    assert said.endswith(f"{came}\n")
    write_traces(folder, [])
    assert __main__.main(["report", str(folder), f"--output={tmp_path / 'new/er'}"]) == 2
    assert not (tmp_path / "new").exists()  # nothing is left of a report that is refused


def test_wrong_results_are_reported(folder):
    rows = [trace(row, "sglang_v1", 1.0) for row in ROWS]
    write_traces(folder, rows + [failed(row, "jax_moe_mosaic", 0.0) for row in ROWS])
    text = report(folder).read_text()
    assert "Smallest matched ratio: sglang_v1 0.9300, jax_moe_mosaic 0.0000" in text
    assert "Passed: sglang_v1 19 of 19, jax_moe_mosaic 0 of 19" in text
    assert text.count("| 10.00x | INCORRECT_NUMERICAL | - |") == 19
    assert text.count("| 1.000 | INCORRECT_NUMERICAL |") == 19
    assert "**mean** of 19 |  |  | 10.00x | - | - |" in text
    write_traces(folder, [failed(ROWS[0], "sglang_v1", 0.5)])  # not one has a time
    assert "**mean** of 0" in report(folder).read_text()


def test_versions_that_differ_between_traces_are_all_named(folder, started):
    run.run(folder)
    assert json.loads((folder / RECORD).read_text())["versions"]["jax-moe"] == "abc"
    rows = [trace(row, "sglang_v1", 1.0) for row in ROWS[:2]]
    rows[1]["evaluation"]["environment"]["libs"] = {"torch": "9.9"}
    write_traces(folder, rows)
    assert traces.read_traces(folder).libraries == {"torch": ("2.11.0", "9.9")}
    assert "torch 2.11.0 and 9.9" in report(folder).read_text()
