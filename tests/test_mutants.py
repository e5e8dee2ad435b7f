"""`tools.mutants`: which changes are drawn, and what a report says of them."""

from __future__ import annotations

import json
import pathlib

import pytest

from tests.mutants_explained import EXPLAINED
from tools import mutants, mutants_report
from tools.mutants_report import Mutant, Verdict

ROOT = pathlib.Path(__file__).parent.parent
DIFF = "--- mutation diff ---\n--- a\n+++ b\n@@ -1 +1 @@\n-    a = b + c\n+    a = b - c\n"


def test_every_module_and_its_tests_exist():
    for module, tests in mutants.MODULES.items():
        assert (ROOT / module).is_file()
        for name, _, function in (test.partition("::") for test in tests):
            assert f"def {function}" in (ROOT / "tests" / name).read_text()


def test_annotations_are_found_and_code_is_not():
    source = "def f(x: int | None = 1 | 2) -> a | b:\n    y: c | d = x | 3\n    return y | 4\n"
    found = mutants.annotations(source)
    bars = [
        (line, column)
        for line, text in enumerate(source.splitlines(), 1)
        for column, character in enumerate(text)
        if character == "|"
    ]
    assert [place in found for place in bars] == [True, False, True, True, False, False]


def some(count):
    (module, *_) = mutants.MODULES
    return [Mutant(module, "core/AddNot", n, 1, 0, f"job {n}") for n in range(count)]


def test_a_seed_draws_the_same_mutants_in_any_order():
    drawn = mutants.drawn(some(40), 5, seed=1)
    assert len(drawn) == 5
    assert drawn == mutants.drawn(reversed(some(40)), 5, seed=1)
    assert drawn != mutants.drawn(some(40), 5, seed=2)
    assert mutants.drawn(some(3), 5, seed=1) == some(3)


def test_a_report_counts_and_explains_survivors():
    one, two, three = some(3)
    found = [Verdict(one, "killed"), Verdict(two, "survived", DIFF), Verdict(three, "")]
    text = mutants_report.report(found, {}, "Seed 1.")
    assert "1 of 2 are killed, 50.0%." in text
    assert "**Incomplete**: 1 are not judged yet." in text
    assert f"`{one.module}` line 1: not explained" in text
    assert "-    a = b + c\n+    a = b - c" in text
    explained = {(one.module, "a = b + c"): "both are zero"}
    assert "line 1: both are zero" in mutants_report.report(found, explained, "Seed 1.")


def test_a_change_is_made_again_in_the_line_nearest_to_where_it_was():
    (one,) = (mutant._replace(line=4) for mutant in some(1))
    source = "    a = b + c\n# new\n\n# new\n    a = b + c\n"
    expected = "    a = b + c\n# new\n\n# new\n    a = b - c\n"
    assert mutants_report.applied(source, Verdict(one, "survived", DIFF)) == expected
    assert mutants_report.applied("a = b + c\n", Verdict(one, "survived", DIFF)) is None


def test_what_was_judged_again_counts_as_it_was_judged_last(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "FOLDER", tmp_path)
    (tmp_path / "drawn.json").write_text('{"commit": "abc"}')
    found = [Verdict(one, "survived", DIFF) for one in some(3)]
    mutants.write_report(found, "seed 1")
    assert "0 of 3 are killed" in (tmp_path / "mutants.md").read_text()
    outcomes = {"job 0": ("killed", "def"), "job 1": ("survived", "123")}
    again = {job: {"outcome": one, "commit": commit} for job, (one, commit) in outcomes.items()}
    (tmp_path / "again.json").write_text(json.dumps(again))
    mutants.write_report(found, "seed 1")
    text = (tmp_path / "mutants.md").read_text()
    assert "1 of 3 are killed" in text
    said = "Of the 3 that survived, code and tests of later commits judged again: def 1, 123 1."
    assert said in text
    rows = json.loads((tmp_path / "mutants.json").read_text())["rows"]
    assert [row["outcome"] for row in rows] == ["killed", "survived", "survived"]


def test_only_survivors_that_are_not_explained_are_judged_again():
    (module, line) = next(iter(EXPLAINED))
    one, two, three = (mutant._replace(module=module) for mutant in some(3))
    found = [Verdict(one, "survived", f"-  {line}\n+  x"), Verdict(two, "survived", DIFF)]
    assert (
        mutants_report.unexplained([*found, Verdict(three, "killed", DIFF)], EXPLAINED) == found[1:]
    )


def test_nothing_is_said_about_nothing():
    assert "0 of 0 are killed." in mutants_report.report([], {}, "Seed 1.")


def test_explained_lines_are_still_there():
    for module, line in EXPLAINED:
        assert line in map(str.strip, (ROOT / module).read_text().splitlines()), module


def test_what_an_ended_run_left_changed_is_taken_back(tmp_path):
    for name in mutants.MODULES:
        for folder, text in (("unchanged", "a = 1"), ("tree", "a = 2")):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(text)
    mutants.restore(tmp_path)
    assert {(tmp_path / "tree" / name).read_text() for name in mutants.MODULES} == {"a = 1"}


def test_another_draw_than_the_one_begun_is_refused():
    mutants.check_drawn({"count": 3, "seed": 1, "commit": "abc"}, 3, 1)
    for count, seed in ((300, 1), (3, 2)):
        with pytest.raises(SystemExit, match="holds a run with --count 3 --seed 1"):
            mutants.check_drawn({"count": 3, "seed": 1, "commit": "abc"}, count, seed)


@pytest.mark.parametrize("flag", ["--count=0", "--count=-3", "--seed=x"])
def test_numbers_that_cannot_be_meant_are_refused(capsys, flag):
    with pytest.raises(SystemExit):
        mutants.main([flag])
    name, _, text = flag.partition("=")
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {name}: expected an integer of " in line
    assert line.endswith(f" or more, got {text!r}")


def test_without_cosmic_ray_nothing_is_copied(monkeypatch, tmp_path):
    monkeypatch.setattr(mutants, "FOLDER", tmp_path / "mutants")
    monkeypatch.setattr(mutants.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="needs cosmic-ray: `make mutants` installs"):
        mutants.main([])
    assert not (tmp_path / "mutants").exists()


def test_a_second_run_at_once_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(mutants, "FOLDER", tmp_path / "mutants")
    monkeypatch.setattr(mutants.importlib.util, "find_spec", lambda _: "there")
    ran = []
    refusal = f"another run is at work in {tmp_path / 'mutants'}"

    def run(*what):
        ran.append(what)
        with pytest.raises(SystemExit, match=refusal):
            mutants.main(["--seed=5"])

    monkeypatch.setattr(mutants, "_run", run)
    for _ in range(2):
        mutants.main(["--count=3", "--again"])
    assert ran == [(3, mutants.SEED, True)] * 2
