"""What `--resume` keeps of rows that have not all of their times."""

import dataclasses
import errno
import json

import jax
import pytest

from bench import (
    documents,
    header,
    interpreter,
    plots,
    report,
    results,
    roofline,
    runner,
    saved,
    session,
    solutions,
)
from bench.results import Results, load_rows
from bench.timers import Statistics
from bench.workloads import select
from interop.flashinfer_bench.export import export
from jax_moe import LayerInputs
from tests.test_bench_session import execute, registry, right, rows_of, settings, solution

pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs at reduced size")
__all__ = ["registry"]  # a fixture


def test_a_row_with_one_of_two_times_gets_the_other_when_resumed(tmp_path, registry, monkeypatch):
    """A run on a GPU takes all host times first; here a stand-in gives the GPU's."""
    asked, times = [], Statistics(2.0, 1.0, 3.0, 4)

    def measure(settings, solution, prepared, clock, row, *_):
        asked.append((clock and "gpu", solution.name, prepared.workload.num_tokens))
        if len(asked) in (3, 6):
            raise KeyboardInterrupt
        begun = row or found.rows["ours", one.uuid]
        new = {"gpu": times} if clock else {"wall": times, "gpu": None}
        uuid, num_tokens, *_ = prepared.workload
        return dataclasses.replace(
            begun, solution=solution.name, uuid=uuid, num_tokens=num_tokens, **new
        )

    registry(solution("ours", right))
    chosen = settings(tmp_path, "ours", workloads=("1",), num_trials=1)
    assert execute(chosen) == session.OK
    found = saved.read(tmp_path / "out").results
    one, seven = select(("1", "7"))
    monkeypatch.setattr(runner, "measure", measure)
    monkeypatch.setattr(runner, "GpuClock", lambda flush_by: "clock")
    monkeypatch.setattr(roofline, "measure", lambda *_: None)
    on_gpu = dataclasses.replace(chosen, timer="gpu", wall_time=True)
    solved = {name: solutions.known_to()[name] for name in ("torch_reference", "ours")}
    results = Results(tmp_path / "results.json", found.about | {"complete": False}, "gpu")
    progress = runner.Progress(start=lambda text: None, done=lambda row: None)
    for _ in range(2):  # interrupted in the first pass, then in the second
        with pytest.raises(KeyboardInterrupt):
            runner.run(on_gpu, solved, [one, seven], results, progress)
        kept = load_rows(results.path, found.about["settings"], {}, on_gpu.passes)
        results.rows = {(row.solution, row.uuid): row for row in kept}
    said = documents.conclusion(results, on_gpu, documents.Options(report=False))
    assert "Incomplete: 0 of 4 rows were measured, 4 more by host time alone" in said
    runner.run(on_gpu, solved, [one, seven], results, progress)
    names = ("torch_reference", "ours")
    every = [(name, count) for count in (1, 7) for name in names]
    by_host = [(None, *pair) for pair in every]
    by_gpu = [("gpu", *pair) for pair in every]
    assert asked == [*by_host[:3], *by_host[2:], *by_gpu[:1], *by_gpu]
    assert all(row.wall and row.gpu for row in results.rows.values())


def test_a_row_that_is_checked_only_is_kept(tmp_path, registry, monkeypatch):
    registry(solution("ours", right))
    chosen = settings(tmp_path, "ours", num_trials=1)
    assert execute(chosen) == session.OK
    path = chosen.output / "results.json"
    content = json.loads(path.read_text())
    checked = content["rows"][1] | {"solution": "mosaic_interpreted", "wall": None}
    path.write_text(json.dumps({**content, "rows": [*content["rows"], checked]}))
    assert execute(chosen, resume=True) == session.OK
    assert ("mosaic_interpreted", 1) in rows_of(chosen)[0]
    registry(interpreter.SOLUTION)
    monkeypatch.setattr(interpreter, "check", lambda *_: pytest.fail("it was checked again"))
    both = dataclasses.replace(chosen, solutions=("ours", interpreter.SOLUTION.name))
    assert execute(both, resume=True) == session.OK
    assert rows_of(chosen)[1]["resumed_rows"] == 3


def test_documents_of_either_run_are_written_and_both_commands_shown(tmp_path, registry):
    registry(solution("ours", right), solution("other", right))
    chosen = settings(tmp_path, "ours", "other", workloads=("1", "7"), num_trials=1)
    assert execute(chosen, report=True) == session.OK
    narrow = dataclasses.replace(chosen, workloads=("7",))
    for _ in range(2):
        assert execute(narrow, resume=True) == session.OK
        assert (chosen.output / "comparison_report.md").exists()
        text = (chosen.output / "results.md").read_text()
        first, second = text.split("```bash\n")[1].split("\n```")[0].split("\n# resumed with\n")
        assert first.startswith("python bench_main.py --solutions=ours,other --workloads=1,7")
        assert second.startswith("python bench_main.py --solutions=ours,other --workloads=7")
        assert second.endswith(" --resume")
    path = chosen.output / "results.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"command": ""}))
    with pytest.raises(ValueError, match=r"^--resume: .*: damaged: command: expected one line"):
        execute(narrow, resume=True)


def test_what_is_not_asked_for_again_stays_wrong_or_missing(tmp_path, registry):
    wrong_at_7 = lambda *a: right(*a) * (2 if LayerInputs.of(*a).tokens == 7 else 1)  # noqa: E731
    registry(solution("ours", wrong_at_7))
    chosen = settings(tmp_path, "ours", workloads=("1", "7"), num_trials=1)
    assert execute(chosen) == session.FAILED
    assert execute(dataclasses.replace(chosen, workloads=("1",)), resume=True) == session.FAILED
    assert rows_of(chosen)[0]["ours", 7]["status"] == "WRONG"
    registry(solution("ours", right))
    assert execute(dataclasses.replace(chosen, workloads=("7",)), resume=True) == session.OK

    def interrupted(*arguments):
        if LayerInputs.of(*arguments).tokens == 7:
            raise KeyboardInterrupt
        return right(*arguments)

    registry(solution("ours", interrupted))
    other = dataclasses.replace(chosen, output=tmp_path / "other")
    assert execute(other) == 130
    registry(solution("ours", right))
    for _ in range(2):
        assert execute(dataclasses.replace(other, workloads=("1",)), resume=True) == session.OK
        assert "Incomplete" in (other.output / "results.md").read_text()
    assert execute(other, resume=True) == session.OK
    assert "Incomplete" not in (other.output / "results.md").read_text()


def test_what_any_part_of_a_run_asked_for_is_missing_until_it_is_there(tmp_path, registry):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    registry(solution("ours", interrupted), solution("other", right))
    absent = "not installed"
    registry(dataclasses.replace(solution("absent", right), unavailable_reason=lambda: absent))
    chosen = settings(tmp_path, "ours", "absent", workloads=("1", "7"), num_trials=1)
    assert execute(chosen, report=True) == 130
    document, compared = (chosen.output / f"{name}.md" for name in ("results", "comparison_report"))
    others = dataclasses.replace(chosen, solutions=("other",))
    for _ in range(2):  # as many rows as were asked for at first, but not those
        assert execute(others, resume=True) == session.OK
        assert len(rows_of(chosen)[0]) == 4
        assert "**Incomplete**: rows that were asked for are missing." in document.read_text()
        assert json.loads((chosen.output / "results.json").read_text())["complete"] is False
        assert "- Not measured: absent: not installed" in document.read_text()
        assert "- Not measured: absent: not installed" in compared.read_text()
    registry(solution("ours", right), solution("absent", right))
    assert execute(chosen, resume=True) == session.OK
    assert "Incomplete" not in document.read_text()
    assert "Not measured" not in document.read_text()
    path = chosen.output / "results.json"
    content = rows_of(chosen)[1]
    content["asked"]["uuids"] = ["x"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^--resume: .*: damaged: asked: uuids: expected an obj"):
        execute(chosen, resume=True)


def test_rows_by_host_time_alone_are_missing_and_those_checked_only_are_not(
    tmp_path, registry, monkeypatch
):
    registry(solution("ours", right))
    chosen = settings(tmp_path, "ours", workloads=("1", "7"), num_trials=1)
    assert execute(chosen) == session.OK
    found = saved.read(chosen.output).results
    one, seven = select(("1", "7"))
    checked = dataclasses.replace(
        found.rows["ours", one.uuid], solution="mosaic_interpreted", wall=None
    )
    found.rows[checked.solution, checked.uuid] = checked
    found.roofline = roofline.Roofline(1e12, 1e14, "probes")
    found.write()
    assert header.is_complete(found)
    assert header.count(found) == "5 of 5 rows were measured"
    unfinished = dataclasses.replace(found.rows["ours", seven.uuid], wall=None)
    found.rows["ours", seven.uuid] = unfinished
    assert not header.is_complete(found)
    said = documents.conclusion(found, chosen, documents.Options())
    assert "4 of 5 rows were measured, 1 more by host time alone" in said
    titles, first, second, _ = report.comparison(found)
    assert titles[-1] == "ours us"
    assert [first[-1] != "-", second[-1]] == [True, "-"]

    # What a part of a run leaves in its first pass, before the probes, has the floors of before.
    again = found.rows.pop(("torch_reference", one.uuid))
    found.write()

    def first_pass(settings, solutions, workloads, results, *_):
        results.put(again)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", first_pass)
    assert execute(chosen, resume=True) == 130
    found = saved.read(chosen.output).results
    assert found.roofline
    assert found.solutions() == ["torch_reference", "ours", "mosaic_interpreted"]
    assert [row.solution for row in found.workloads()[0][1]] == found.solutions()
    found.rows = {(unfinished.solution, unfinished.uuid): unfinished}
    assert list(documents.write_all(found, chosen, documents.Options()))
    assert "Median" not in (chosen.output / "results.md").read_text()
    assert "geomean" not in documents.conclusion(found, chosen, documents.Options())


def test_of_two_runs_in_a_folder_neither_is_gone_on_with(tmp_path, registry):
    registry(solution("ours", right))
    chosen = settings(tmp_path, "ours", num_trials=1)
    assert execute(chosen) == session.OK
    (chosen.output / "scaling.json").write_text("another run's")
    for scaling in (False, True):
        one = dataclasses.replace(chosen, scaling=scaling)
        with pytest.raises(
            ValueError, match=r"^--resume: .* holds results\.json and scaling\.json, "
        ):
            execute(one, resume=True)
    assert (chosen.output / "scaling.json").read_text() == "another run's"


def test_documents_that_were_asked_for_later_stay(tmp_path, registry):
    registry(solution("ours", right), solution("other", right))
    chosen = settings(tmp_path, "ours", "other", num_trials=1)
    assert execute(chosen) == session.OK
    for options in (documents.Options(report=True), documents.Options()):
        assert session.write_documents(chosen.output, options) == session.OK
        assert (chosen.output / "comparison_report.md").exists()


def test_a_table_that_nobody_reads_leaves_the_way_to_its_documents(
    tmp_path, registry, monkeypatch, capsys
):
    registry(solution("ours", right))
    chosen = settings(tmp_path, "ours", num_trials=1)

    def unread(*_):
        raise BrokenPipeError

    monkeypatch.setattr(documents, "conclusion", unread)
    with pytest.raises(BrokenPipeError):
        execute(chosen)
    assert len(rows_of(chosen)[0]) == 2
    command = f"python bench_main.py --documents={chosen.output}"
    assert f"results.json is whole, its documents are not; {command}" in capsys.readouterr().err

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results, "write_atomically", full)
    nowhere = settings(tmp_path / "full", "ours", num_trials=1)
    for one, said in ((nowhere, "is not there: nothing was written"), (chosen, "is as it was")):
        with pytest.raises(BrokenPipeError):
            execute(one, overwrite=True)
        assert f"{one.output / 'results.json'} {said}" in capsys.readouterr().err


def test_a_report_that_compares_nothing_is_refused(tmp_path, registry):
    registry(solution("ours", right))
    alone = settings(tmp_path, "torch_reference", num_trials=1)
    with pytest.raises(ValueError, match=r"^--report: compares solutions with torch_ref"):
        execute(alone, report=True)
    assert not alone.output.exists()
    assert execute(alone) == session.OK
    with pytest.raises(ValueError, match=r"^--documents: .*: --report needs rows of more than tor"):
        session.write_documents(alone.output, documents.Options(report=True))


def test_a_plot_says_that_rows_are_missing(tmp_path, registry):
    def interrupted(*arguments):
        if LayerInputs.of(*arguments).tokens == 14:
            raise KeyboardInterrupt
        return right(*arguments)

    registry(solution("ours", interrupted))
    chosen = settings(tmp_path, "ours", workloads=("1", "7", "14"), num_trials=1)
    assert execute(chosen) == 130
    found = saved.read(chosen.output).results
    assert plots.conditions(found).endswith("\nIncomplete: 5 of 6 rows were measured")
    registry(solution("ours", right))
    assert execute(chosen, resume=True) == session.OK
    assert "Incomplete" not in plots.conditions(saved.read(chosen.output).results)


def test_rows_of_another_routing_are_not_gone_on_with(tmp_path, registry):
    """The data set's folder is named as before, and what it holds was exported again."""
    folder = export(tmp_path / "data", seed=0)
    registry(solution("ours", right))
    chosen = settings(
        tmp_path, "ours", workloads=("1",), num_trials=1, inputs="dataset", dataset=str(folder)
    )
    assert execute(chosen) == session.OK
    path = chosen.output / "results.json"
    before = path.read_bytes()
    assert len(json.loads(before)["routing_sha256"]) == 19
    export(folder, seed=3, overwrite=True)
    with pytest.raises(ValueError, match=r"--resume: workload .*: --dataset holds another"):
        execute(chosen, resume=True)
    assert path.read_bytes() == before
    export(folder, seed=0, overwrite=True)
    assert execute(chosen, resume=True) == session.OK
    assert json.loads(path.read_text())["stand_ins"] == json.loads(before)["stand_ins"]
