"""What a run leaves in its folder: the files of one run, whole, and nothing of another one lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from absl.testing import flagsaver

import bench_main
import jax_moe
from bench import comparison, documents, plots, run_folder, runner, session, solutions
from bench.results import Results
from bench.settings import Settings
from interop import comparison_report, folder_lock
from interop.solutions.base import Solution
from pallas_kernels import interruption
from tests.bench_rows import measure_nothing, row

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = {"results.md", "results.png", "comparison_report.md", "comparison_report.png"}


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty working folder, and a benchmark that measures nothing and draws nothing."""
    monkeypatch.chdir(tmp_path)
    found = {
        name: Solution(name=name, framework="jax", description=name, run=jax_moe.apply)
        for name in ("torch_reference", "ours")
    }
    for module in (solutions, comparison):
        monkeypatch.setattr(module, "known_to", lambda *_: found)
    monkeypatch.setattr(runner, "run", measure_nothing)
    monkeypatch.setattr(plots, "write", lambda results, path: path.write_text("a plot"))
    monkeypatch.setattr(comparison_report, "plot_speedups", lambda *_: bool(_[2].write_text("x")))
    return tmp_path


def settings(**fields):
    few = {"timer": "wall", "on_gpu": False, "workloads": ("1", "7")}
    return Settings(solutions=("ours",), **few | fields)


def execute(chosen, *, report=True, **options):
    with interruption.remembered():
        return session.execute(chosen, documents.Options(report=report), **options)


def content(folder):
    return json.loads((folder / "results.json").read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupted(after, number=signal.SIGINT):
    """A `runner.run` that a signal ends when so many rows are there."""

    def run(settings, solutions, workloads, results, progress, *others):
        def done(one):
            progress.done(one)
            if len(results.rows) == after:
                signal.raise_signal(number)

        if after == 0:
            signal.raise_signal(number)
        measure_nothing(
            settings, solutions, workloads, results, progress._replace(done=done), *others
        )

    return run


def test_each_run_gets_a_folder_of_its_own_and_the_latest_is_linked(here):
    root = here / "out" / "bench"
    assert execute(settings()) == session.OK
    (first,) = [path for path in root.iterdir() if not path.is_symlink()]
    assert (root / "latest").resolve() == first
    assert set(contents(first)) == {"results.json", *DOCUMENTS}
    kept = contents(first)
    assert execute(settings(seed=5)) == session.OK
    second = (root / "latest").resolve()
    assert second != first
    assert contents(first) == kept
    assert content(second)["settings"]["seed"] == 5
    assert len(list(root.iterdir())) == 3


def test_a_run_without_a_row_leaves_nothing_and_moves_no_link(here, monkeypatch, capsys):
    assert execute(settings()) == session.OK
    root = here / "out" / "bench"
    before = (root / "latest").resolve(), len(list(root.iterdir()))
    monkeypatch.setattr(runner, "run", interrupted(after=0))
    assert execute(settings()) == 130
    assert ((root / "latest").resolve(), len(list(root.iterdir()))) == before
    assert execute(settings(output=here / "mine")) == 130
    assert not (here / "mine").exists()
    shown = capsys.readouterr().out
    assert "no rows were finished: nothing was written" in shown
    assert "finished is kept" not in shown


def test_what_is_no_link_is_not_replaced(here):
    (here / "out" / "bench" / "latest").mkdir(parents=True)
    assert execute(settings()) == session.OK
    assert (here / "out" / "bench" / "latest").is_dir()
    assert not (here / "out" / "bench" / "latest").is_symlink()


@pytest.mark.parametrize("name", ["results.json", "results.md", "scaling.json", "scaling.png"])
def test_a_folder_that_holds_a_run_is_refused(here, name):
    folder = here / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("not ours")
    assert execute(settings(output=folder)) == session.OK  # other people's files are no run
    for path in folder.iterdir():
        path.unlink()
    (folder / name).write_text("x")
    advice = "--resume goes on with it, " if name == "results.json" else ""  # else it cannot
    with pytest.raises(ValueError, match=rf"mine holds {name} of an earlier run; {advice}--over"):
        execute(settings(output=folder))
    assert contents(folder) == {name: b"x"}


def test_overwriting_loses_nothing_before_a_row_is_there(here, monkeypatch):
    chosen = settings(output=here / "mine")
    assert execute(chosen) == session.OK
    before = contents(chosen.output)
    other = dataclasses.replace(chosen, seed=5)
    monkeypatch.setattr(runner, "run", interrupted(after=0))
    assert execute(other, overwrite=True) == 130
    assert contents(chosen.output) == before
    monkeypatch.setattr(runner, "run", interrupted(after=1))
    assert execute(other, overwrite=True, report=False) == 130
    assert set(contents(chosen.output)) == {"results.json", "results.md"}
    found = content(chosen.output)
    assert (found["settings"]["seed"], len(found["rows"]), found["complete"]) == (5, 1, False)
    assert "seed 5" in (chosen.output / "results.md").read_text()


def test_documents_of_an_earlier_run_go_with_the_first_row(here, monkeypatch):
    chosen = settings(output=here / "mine")
    assert execute(chosen) == session.OK
    seen = []

    def run(settings, solutions, workloads, results, progress, *others):
        results.put(row("ours", 1, 5.0))
        seen.append(set(contents(chosen.output)) - {".lock"})

    monkeypatch.setattr(runner, "run", run)
    scaling = dataclasses.replace(chosen, scaling=True, workloads=("1",))
    assert execute(scaling, overwrite=True) == session.OK
    assert seen == [{"scaling.json"}]


def test_resuming_goes_on_with_the_latest_run_or_starts_one(here, monkeypatch, capsys):
    root = here / "out" / "bench"
    monkeypatch.setattr(runner, "run", interrupted(after=3))
    assert execute(settings(), resume=True) == 130
    note = "--resume: no earlier run in out/bench; this one starts from the first row"
    assert note in capsys.readouterr().out
    monkeypatch.setattr(runner, "run", measure_nothing)
    assert execute(settings(), resume=True) == session.OK
    assert (
        f"going on with {(root / 'latest').resolve() / 'results.json'}" in capsys.readouterr().out
    )
    found = content(root / "latest")
    assert (found["complete"], found["resumed_rows"], len(found["rows"])) == (True, 3, 4)
    assert len(list(root.iterdir())) == 2
    assert execute(settings(output=here / "mine"), resume=True) == session.OK
    assert "no earlier run in" in capsys.readouterr().out
    assert len(content(here / "mine")["rows"]) == 4


def test_a_resumed_run_that_adds_nothing_changes_nothing(here, monkeypatch, capsys):
    chosen = settings(output=here / "mine")
    assert execute(chosen) == session.OK
    before = contents(chosen.output)
    monkeypatch.setattr(runner, "run", interrupted(after=0))
    assert execute(dataclasses.replace(chosen, workloads=("all",)), resume=True) == 130
    assert contents(chosen.output) == before
    assert "nothing new was written" in capsys.readouterr().out


def test_flags_of_the_folder_that_contradict(here):
    with pytest.raises(ValueError, match="--resume and --overwrite contradict each other"):
        execute(settings(output=here / "mine"), resume=True, overwrite=True)
    with pytest.raises(ValueError, match="--overwrite: goes with --output=FOLDER"):
        execute(settings(), overwrite=True)
    assert execute(settings(output=here / "mine")) == session.OK
    with pytest.raises(ValueError, match=r"holds results.json, .*, but no scaling.json to go on"):
        execute(settings(output=here / "mine", scaling=True, workloads=("1",)), resume=True)
    assert list(here.iterdir()) == [here / "mine"]


def test_a_second_run_into_the_folder_is_refused(here):
    chosen = settings(output=here / "mine")
    chosen.output.mkdir()
    refusal = rf"^--output: {chosen.output}: another run is writing here; use another folder$"
    with folder_lock.held(chosen.output):
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=refusal):
                execute(chosen, **how)
    assert execute(chosen) == session.OK
    assert not (chosen.output / ".lock").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_written_and_says_so_everywhere(here, monkeypatch, number, code):
    monkeypatch.setattr(runner, "run", interrupted(3, number))
    chosen = settings(output=here / "mine")
    assert execute(chosen) == code
    assert set(contents(chosen.output)) == {"results.json", *DOCUMENTS}
    for name in ("results.md", "comparison_report.md"):
        text = (chosen.output / name).read_text()
        assert "**Incomplete**" in text, name
        assert "REDUCED" in text, name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_documents_that_were_interrupted_can_be_written_later(
    here, monkeypatch, capsys, number, code
):
    chosen = settings(output=here / "mine")
    monkeypatch.setattr(plots, "write", lambda *_: signal.raise_signal(number))
    assert execute(chosen) == code
    assert set(contents(chosen.output)) == {"results.json"}
    assert content(chosen.output)["complete"] is True
    shown = capsys.readouterr()
    assert "4 of 4 rows PASS" in shown.out
    assert f"bench_main.py --documents={chosen.output} writes them" in shown.err
    monkeypatch.setattr(plots, "write", lambda results, path: path.write_text("a plot"))
    before = (chosen.output / "results.json").read_bytes()
    assert session.write_documents(chosen.output, documents.Options()) == session.OK
    assert set(contents(chosen.output)) == {"results.json", *DOCUMENTS}
    assert (chosen.output / "results.json").read_bytes() == before
    assert execute(dataclasses.replace(chosen, output=here / "whole")) == session.OK
    for name in ("results.md", "comparison_report.md"):  # as if nothing had happened
        texts = [(here / folder / name).read_text() for folder in ("mine", "whole")]
        assert texts[0].replace("mine", "whole") == texts[1]


def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk_is_one_line_and_the_tables_are_shown(here, monkeypatch, capsys, after):
    chosen = settings(output=here / "mine")
    assert execute(chosen) == session.OK
    before = contents(chosen.output)
    dump = json.dump

    def limited(value, file, **options):
        if len(value["rows"]) > after:
            full(file)
        dump(value, file, **options)

    monkeypatch.setattr(json, "dump", limited)
    capsys.readouterr()
    assert execute(dataclasses.replace(chosen, seed=5), overwrite=True) == session.FAILED
    shown = capsys.readouterr()
    written = chosen.output / "results.json"
    message = f"{written}: cannot be written: No space left on device"
    assert shown.err.count(message) == 1
    assert "Traceback" not in shown.err + shown.out
    passed = f"\n{after + 1} of 4 rows PASS\n"
    assert passed in shown.out
    last = shown.out.partition(passed)[2].splitlines()
    held = f"{after + 1} of 4 rows were measured, results.json holds {after}"
    assert last[0] == f"Incomplete: {held}: {message}"
    assert last[1:] == ([] if after else [f"nothing new was written: {written} is as it was"])
    if after:
        assert len(content(chosen.output)["rows"]) == after
        assert set(contents(chosen.output)) == {"results.json"}
    else:
        assert contents(chosen.output) == before


def test_a_full_disk_in_a_new_folder(here, monkeypatch, capsys):
    monkeypatch.setattr(json, "dump", lambda *_, **__: full(None))
    assert execute(settings(output=here / "mine")) == session.FAILED
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"nothing new was written: {here}/mine/results.json is not there"


def test_a_document_that_cannot_be_written_is_named(here, monkeypatch, capsys):
    monkeypatch.setattr(plots, "write", lambda results, path: full(path))
    chosen = settings(output=here / "mine")
    assert execute(chosen) == session.FAILED
    shown = capsys.readouterr()
    message = f"{chosen.output / 'results.png'}: cannot be written: No space left on device; "
    assert message + f"once it can: python bench_main.py --documents={chosen.output}" in shown.err
    assert "4 of 4 rows PASS" in shown.out
    assert content(chosen.output)["complete"] is True
    assert set(contents(chosen.output)) == {"results.json", *DOCUMENTS} - {"results.png"}
    assert "results.png" not in (chosen.output / "results.md").read_text()


def test_a_report_whose_plot_cannot_be_written_is_there_without_it(here, monkeypatch, capsys):
    chosen = settings(output=here / "mine")
    assert execute(chosen) == session.OK
    assert "(comparison_report.png)" in (chosen.output / "comparison_report.md").read_text()
    monkeypatch.setattr(comparison_report, "plot_speedups", lambda *_: full(_[2]))
    capsys.readouterr()
    assert documents_of(f"--documents={chosen.output}", "--report") == session.FAILED
    shown = capsys.readouterr()
    picture = chosen.output / "comparison_report.png"
    assert shown.err == f"{picture}: cannot be written: No space left on device\n"
    assert f"wrote {chosen.output}/comparison_report.md\n" in shown.out
    assert set(contents(chosen.output)) == {"results.json", *DOCUMENTS} - {picture.name}
    assert picture.name not in (chosen.output / "comparison_report.md").read_text()


def documents_of(*flags):
    with flagsaver.flagsaver():
        return bench_main.main(bench_main._parse(["bench_main.py", *flags]))


def test_documents_of_a_folder_without_a_run(here, capsys):
    assert documents_of("--documents=~/nowhere/at_all") == bench_main.USAGE_ERROR
    home = pathlib.Path.home()
    expected = f"--documents: {home}/nowhere/at_all: expected a folder with results.json or "
    assert capsys.readouterr().err == f"bench_main.py: {expected}scaling.json, got neither\n"
    (here / "other.json").write_text("{}")
    assert documents_of(f"--documents={here}/other.json") == bench_main.USAGE_ERROR
    expected = "other.json: expected a folder with results.json or scaling.json, got another file"
    assert capsys.readouterr().err.endswith(f"{expected}\n")
    (here / "results.json").write_text('{"schema": 2}')
    assert documents_of(f"--documents={here}") == bench_main.USAGE_ERROR
    expected = f"{here}/results.json: expected results of schema 1, got 2"
    assert capsys.readouterr().err.endswith(f"{expected}\n")
    (here / "results.json").write_text('{"schema": 1, "rows": []}')
    assert documents_of(f"--documents={here}") == bench_main.USAGE_ERROR
    assert f"{here}/results.json: damaged: no 'command'\n" in capsys.readouterr().err
    assert documents_of(f"--documents={here}", "--seed=1") == bench_main.USAGE_ERROR
    assert (
        "--documents: reads --report, --breakdown alone, got --seed too" in capsys.readouterr().err
    )


def test_documents_of_a_run_of_an_earlier_version(here, capsys):
    """Its file names what was asked for in the command line only."""
    chosen = settings(output=here / "mine")
    assert execute(chosen, report=False) == session.OK
    path = chosen.output / "results.json"
    old = content(chosen.output)
    del old["asked"]
    old["command"] = "bench_main.py --report --output='/tmp/a b'"
    path.write_text(json.dumps(old))
    (chosen.output / "scaling.png").write_text("of an earlier version")
    assert documents_of(f"--documents={path}") == session.OK  # as good as its folder
    assert set(contents(chosen.output)) == {"results.json", *DOCUMENTS}
    assert "bench_main.py --report --output=" in (chosen.output / "results.md").read_text()


def test_rows_are_written_before_an_earlier_run_goes(tmp_path):
    order = []
    results = Results(tmp_path / "results.json", {}, "gpu", begin=lambda: order.append("begin"))
    results.put(row("ours", 1, 5.0))
    results.put(row("ours", 7, 5.0))
    assert order == ["begin"]


def test_names_of_the_files_are_those_that_runs_write():
    written = {f"{stem}{ending}" for stem in ("results", "scaling") for ending in (".json", ".md")}
    assert written < set(run_folder._FILES)
    assert documents._breakdown_name(Settings(())) in run_folder._FILES


def test_a_limit_of_the_file_size_on_the_real_command_line(tmp_path):
    """What a full disk looks like to a process: a write fails, in the JSON or in a document."""
    code = (
        "import resource, runpy, sys; from tests import bench_rows; from bench import runner; "
        "runner.run = bench_rows.measure_nothing; sys.argv = ['bench_main.py', *sys.argv[1:]]; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        "runpy.run_path('bench_main.py', run_name='__main__')"
    )
    flags = ["--solutions=jax_moe_xla", f"--output={tmp_path / 'run'}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == session.FAILED, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{tmp_path / 'run'}/results.json: cannot be written: File too large" in done.stderr
    assert "rows PASS" in done.stdout
