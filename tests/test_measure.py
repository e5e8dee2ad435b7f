"""Commands that run one after another: `bench.steps`, and those of `tools.measure`."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from bench import parallel_gpus
from bench.steps import Step, run_all
from tools import measure

ROOT = pathlib.Path(__file__).parent.parent


def states(folder):
    lines = (folder / "steps.jsonl").read_text().splitlines()
    return {line["step"]: line["state"] for line in map(json.loads, lines)}


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path, capsys):
    steps = [
        Step("wrong", ["-c", "print('why'); raise SystemExit(3)"], 20),
        Step("hangs", ["-c", "import time; time.sleep(600)"], 0.5),
        Step("right", ["-c", "import os; print(os.environ['SAID'])"], 20, {"SAID": "so"}),
    ]
    assert run_all(steps, tmp_path, 1) == 1
    expected = {"wrong": "failed with 3", "hangs": "killed after 0 s", "right": "ok"}
    assert states(tmp_path) == expected
    assert [(tmp_path / f"{name}.log").read_text() for name in expected] == ["why\n", "", "so\n"]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_without_time_nothing_begins(tmp_path):
    assert run_all([Step("late", ["-c", "print(1)"], 20)], tmp_path, 0.1) == 1
    assert states(tmp_path) == {"late": "not run: no time left"}
    assert not (tmp_path / "late.log").exists()


def test_what_is_done_is_left_out(tmp_path, monkeypatch):
    kinds = {
        "a": measure.Kind("-c print('{}')", 20, "one"),
        "b": measure.Kind("-c 1/0", 20, "other"),
    }
    monkeypatch.setattr(measure, "KINDS", kinds)
    assert measure.main([f"--output={tmp_path}"]) == 1
    assert (tmp_path / "a.log").read_text() == f"{tmp_path / 'a'}\n"
    assert measure.done(tmp_path) == {"a"}
    assert measure.main([f"--output={tmp_path}", "a"]) == 0
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 2  # a was not run again


def test_an_unknown_step_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        measure.main([f"--output={tmp_path}", "benhc"])
    assert "unknown step 'benhc'; expected some of bench, " in capsys.readouterr().err


OUT = pathlib.Path("out")
COMMANDS = {name: one.arguments(OUT) for name, one in measure.KINDS.items()}
COMMANDS["parallel_gpus"] = list(parallel_gpus.steps_of(OUT, "")[0].arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_one_of_the_command(name):
    words = COMMANDS[name]
    if words[0] == "-m":
        path = ROOT / (words[1].replace(".", "/") + ".py")
        path = path if path.exists() else path.with_suffix("") / "__main__.py"
    else:
        path = ROOT / words[0]
    source = path.read_text() + (ROOT / "pallas_kernels/tuning/command.py").read_text()
    for flag in (part for part in words[1:] if part.startswith("--")):
        word = flag[2:].partition("=")[0].removeprefix("no")
        assert re.search(rf'"(--)?(no)?{word}"', source), f"{name}: {flag}"


def test_the_list_says_what_each_step_is(capsys):
    assert measure.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(measure.KINDS)
