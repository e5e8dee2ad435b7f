"""A results file that no run wrote is refused, by row and field, before a document is replaced."""

from __future__ import annotations

import json
import math
import typing

import pytest

from bench import about, documents, header, run_folder, saved, session
from bench.correctness import Check
from bench.inputs import KINDS
from bench.results import PASS, WRONG, Results, load_rows, rows_of
from bench.routing import PATTERNS
from bench.settings import Settings
from bench.timers import FLUSHES
from tests.bench_rows import ODD, changed, places, row

SETTINGS = Settings(("jax_moe_xla",), timer="wall", on_gpu=False)

ASKED = {"solutions": ["all"], "workloads": ["7"], "report": False, "breakdown": False}


@pytest.fixture
def results(tmp_path):
    """A run of two rows on disk."""
    about = {
        "device": {"kind": "cpu", "compute_capability": ""},
        "versions": {"jax": "0.11.2"},
        "git_commit": "abc",
        "command": SETTINGS.command(),
        "complete": True,
        "settings": SETTINGS.comparable(),
    }
    found = Results(tmp_path / "results.json", about, "wall")
    found.put(row("torch_reference", 7, 100.0))
    found.put(row("jax_moe_xla", 7, 50.0))
    return found


DAMAGES = {
    "no time": (changed(("wall", "median"), 0), "Statistics.median: expected a number in 1e-06"),
    "negative": (changed(("wall", "p10"), -1.0), "Statistics.p10: expected a number in 1e-06"),
    "endless": (changed(("wall", "p90"), math.inf), "Statistics.p90: expected a number in"),
    "unordered": (changed(("wall", "p10"), 1e6), "Row.wall: expected p10 <= median <= p90"),
    "status": (changed(("status",), "MAYBE"), "Row.status: expected PASS, WRONG or ERROR, got"),
    "times of a wrong row": (
        changed(("status",), WRONG),
        "Row.gpu: expected no times of a row that is WRONG",
    ),
    "tokens": (changed(("num_tokens",), 10**30), "Row.num_tokens: expected at most 1048576, got"),
    "few tokens": (changed(("num_tokens",), -1), "Row.num_tokens: expected a number in 0..1e+300"),
    "other tokens": (changed(("num_tokens",), 9), "Row.num_tokens: expected one count, got 9"),
    "column": (changed(("solution",), "a|b"), "Row.solution: expected a name, got 'a|b'"),
    "line": (changed(("solution",), "a\nb"), "Row.solution: expected one line of printable text"),
    "twice": (changed(("solution",), "torch_reference"), "'torch_reference' has two rows"),
    "no list": (changed(("kernels",), None), "Row.kernels: expected a list, got NoneType"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_row_is_named(results, damage, said):
    content = json.loads(results.path.read_text())
    damage(content["rows"][1])
    text = json.dumps(content).replace("Infinity", "1e999")
    results.path.write_text(text)
    document = results.path.with_suffix(".md")
    document.write_text("as it was")
    where = f"{results.path}: damaged: row 2: "
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        session.write_documents(results.path, documents.Options())
    assert str(raised.value).startswith(f"--documents: {where}{said}")
    assert document.read_text() == "as it was"
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        load_rows(results.path, SETTINGS.comparable(), {}, ("wall",))
    assert str(raised.value).startswith(f"--resume: {where}{said}")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rows", {}, "rows: expected a list, got dict"),
        ("rows", [], "rows: expected at least one, got none"),
        ("resumed_commands", "a", "resumed_commands: expected a list, got str"),
        ("rows", None, "rows: expected a list, got NoneType"),
        ("rows", [None], "row 1: Row: expected an object, got NoneType"),
        ("device", None, "device: expected an object, got NoneType"),
        (
            "device",
            {"kind": "\ud800", "compute_capability": None},
            "device: kind: expected one line of printable text, got "
            r"'\ud800'",
        ),
        ("device", {"kind": "cpu"}, "device: no 'compute_capability'"),
        ("versions", {"jax": 1}, "versions: jax: expected str, got 1"),
        ("started", "yesterday", "started: expected a time in ISO 8601, got 'yesterday'"),
        ("gpu_state_after", [], "gpu_state_after: expected an object, got list"),
        ("asked", ASKED | {"rows": "two"}, "asked: rows: expected int, got 'two'"),
        ("asked", ASKED | {"rows": -1}, "asked: rows: expected a number in 0..1e+300, got -1"),
        ("asked", ASKED | {"report": "yes"}, "asked: report: expected bool, got 'yes'"),
        (
            "settings",
            SETTINGS.comparable() | {"flush": "gpu"},
            "settings: flush: expected write or read, got 'gpu'",
        ),
        ("timer", "sundial", "timer: expected gpu or wall, got 'sundial'"),
        ("timer", "gpu", "timer: expected that of the settings, got 'gpu'"),
        ("roofline", {"read_bytes_per_s": 0}, "Roofline: no 'fp8_flops_per_s'"),
    ],
)
def test_a_damaged_file_is_named(results, name, value, said):
    content = json.loads(results.path.read_text())
    results.path.write_text(json.dumps(content | {name: value}))
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        saved.read(results.path)
    assert str(raised.value) == f"{results.path}: damaged: {said}"
    if content.pop(name, None) is not None:
        results.path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"damaged: no '{name}'"):
            saved.read(results.path)


def test_no_damage_is_a_traceback_or_replaces_a_document_by_half_of_one(results):
    """Of what stands beside the rows, any value that is another or is not there."""
    results.about |= {
        "started": "2026-12-01T12:00:00+00:00",
        "asked": ASKED | {"rows": 2, "uuids": {"jax_moe_xla": [""]}},
        "gpu_state_before": {"name": "GPU"},
        "resumed_commands": ["a"],
    }
    results.write()
    whole = json.loads(results.path.read_text())
    document = results.path.with_suffix(".md")
    refused = 0
    for path in places({**whole, "rows": ""}):
        for odd in ODD:
            content = json.loads(json.dumps(whole))
            changed(path, odd)(content)
            results.path.write_text(json.dumps(content))
            document.write_text("as it was")
            said, expected = "", "# 1 of the 19 workloads on "
            try:
                session.write_documents(results.path, documents.Options())
            except ValueError as error:
                said, expected = str(error), "as it was"
            assert said.startswith(f"--documents: {results.path}: " if said else ""), (path, odd)
            assert document.read_text().startswith(expected), (path, odd)
            refused += bool(said)
    assert refused > 300


def test_the_words_of_settings_are_those_of_the_flags():
    hints = typing.get_type_hints(about.Conditions)
    for name, words in (("inputs", KINDS), ("routing", PATTERNS), ("flush", FLUSHES)):
        assert typing.get_args(hints[name]) == words


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"hello", "Expecting value"), (b"\0" * 99, "its bytes are"), (b'{"\xff"', "its bytes are")],
)
def test_what_is_no_json_is_named_once(results, content, said):
    results.path.write_bytes(content)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        saved.read(results.path)
    assert str(raised.value).startswith(f"{results.path}: not valid JSON: {said}")


def test_a_breakdown_of_host_times_is_refused(results):
    with pytest.raises(ValueError, match=r"--documents: .*: its run took no kernel times for --br"):
        session.write_documents(results.path, documents.Options(breakdown=True))


@pytest.mark.parametrize("error", [math.inf, math.nan])
def test_the_error_of_an_output_that_is_not_finite_is_read_back(results, error):
    check = Check(0.0, 0.0, error, "output holds Inf or NaN")
    results.put(row("jax_moe_xla", 7, None, WRONG, check=check))
    found = {one.solution: one for one in rows_of(json.loads(results.path.read_text()))}
    assert found["jax_moe_xla"].check == check._replace(relative_error=math.inf)
    assert found["torch_reference"].status == PASS
    assert saved.read(results.path).results.rows.keys() == results.rows.keys()
    assert run_folder.files_of_a_run(results.path.parent) == ["results.json"]


def test_rows_that_an_editor_removed_are_missed(results):
    results.about["asked"] = {"rows": 2}
    assert header.is_complete(results)
    del results.rows["jax_moe_xla", row("jax_moe_xla", 7, 50.0).uuid]
    assert not header.is_complete(results)
    said = documents.conclusion(results, SETTINGS, documents.Options(report=False))
    assert "Incomplete: 1 of 2 rows were measured: rows that were asked for are missing" in said
