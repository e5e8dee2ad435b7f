"""Commands that run one after another: `bench.steps`, and those of `tools.measure`."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from bench import commands, parallel_gpus, step_record
from bench.steps import Step, run_all
from interop import folder_lock
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


def test_steps_run_in_the_order_in_which_they_are_named():
    names = ["tests", "bench", "tests"]
    assert [step.name for step in measure.steps_of(names, OUT)] == ["tests", "bench"]
    assert [step.name for step in measure.steps_of([], OUT)] == list(measure.KINDS)


def test_what_a_step_said_last_is_not_jax_s_advice(tmp_path, capsys):
    wrong = "import jax; jax.jit(lambda x: x.no_such)(1.0)"
    silent = "raise SystemExit(1)"
    assert run_all(
        [Step("wrong", ["-c", wrong], 20), Step("silent", ["-c", silent], 20)], tmp_path, 1
    )
    said = [json.loads(line)["said"] for line in capsys.readouterr().out.splitlines()]
    assert said[0].startswith("AttributeError: ")
    assert "no_such" in said[0]
    assert said[1] == "its log is empty"


def test_without_time_nothing_begins(tmp_path):
    assert run_all([Step("late", ["-c", "print(1)"], 20)], tmp_path, 0.1) == 1
    assert states(tmp_path) == {"late": "not run: no time left"}
    assert not (tmp_path / "late.log").exists()
    (tmp_path / "late.log").write_text("an earlier run's last line")
    assert run_all([Step("late", ["-c", "print(1)"], 20)], tmp_path, 0.1) == 1
    assert "said" not in step_record.read(tmp_path)["late"]


TAKES_A_TURN = """
import json, sys, time
from pathlib import Path
from bench.steps import wait_for_turn
print("compiles", flush=True)
killed = sorted(wait_for_turn())
busy = Path(sys.argv[1]) / "busy"
assert not busy.exists(), "two at once"
busy.touch()
time.sleep(0.1)
busy.unlink()
print("ran after", killed)
"""


def test_steps_compile_at_once_and_run_in_turns(tmp_path):
    slow = "import time; time.sleep(0.6)" + TAKES_A_TURN
    hangs = "from bench.steps import wait_for_turn; wait_for_turn(); import time; time.sleep(600)"
    late = "import time; time.sleep(600)"
    fails = "raise SystemExit('no such device')"
    sources = {"hangs": (hangs, 0.3), "slow": (slow, 20), "late": (late, 20)}
    sources |= {"fails": (fails, 20), "quick": (TAKES_A_TURN, 20)}
    steps = [
        Step(name, ["-c", source, str(tmp_path)], seconds, before=1.5 if name == "late" else 20)
        for name, (source, seconds) in sources.items()
    ]
    assert run_all(steps, tmp_path, 1, jobs=5) == 1
    expected = {
        "hangs": "killed after 0 s",
        "slow": "ok",
        "late": "not begun",
        "fails": "failed with 1",
        "quick": "ok",
    }
    found = states(tmp_path)
    assert re.fullmatch(r"not begun: killed after \d+ s of compiling", found["late"])
    assert found | {"late": "not begun"} == expected
    for name in ("slow", "quick"):
        said = (tmp_path / f"{name}.log").read_text()
        assert said.endswith("ran after ['hangs']\n")
    lines = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert {line["step"]: line.get("said") for line in lines}["fails"] == "no such device"
    assert not list(tmp_path.glob("*.asks"))


def test_a_step_that_needs_no_quiet_does_not_wait_for_others(tmp_path):
    quick = Step("quick", ["-c", TAKES_A_TURN, str(tmp_path)], 20, before=20, quiet=False)
    source = """
import sys, time
from pathlib import Path
while "ran after" not in Path(sys.argv[1], "quick.log").read_text():
    time.sleep(0.05)
"""
    slow = Step("slow", ["-c", source, str(tmp_path)], 20, before=20)
    (tmp_path / "quick.log").touch()
    assert run_all([slow, quick], tmp_path, 1, jobs=2) == 0
    assert list(states(tmp_path)) == ["quick", "slow"]


def test_what_is_done_is_left_out(tmp_path, monkeypatch):
    kinds = {
        "a": measure.Kind("-c print('{}')", 20, "one"),
        "b": measure.Kind("-c 1/0", 20, "other"),
    }
    monkeypatch.setattr(measure, "KINDS", kinds)
    monkeypatch.setattr(measure.environment, "has_gpu_driver", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        measure.main([f"--output={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(measure.environment, "has_gpu_driver", lambda: True)
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


def test_a_home_that_nobody_has_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        measure.main(["--list", "--output=~nobody_here/x"])
    said = "argument --output: expected a path, got '~nobody_here/x': that user has no home"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_one_of_the_command(name):
    words = COMMANDS[name]
    if words[0] == "-m":
        path = ROOT / (words[1].replace(".", "/") + ".py")
        path = path if path.exists() else path.with_suffix("") / "__main__.py"
    else:
        path = ROOT / words[0]
    shared = ("pallas_kernels/tuning/command.py", "bench/commands.py")
    source = path.read_text() + "".join((ROOT / one).read_text() for one in shared)
    for flag in (part for part in words[1:] if part.startswith("--")):
        word = flag[2:].partition("=")[0].removeprefix("no")
        assert re.search(rf'"(--)?(no)?{word}"', source), f"{name}: {flag}"


def test_a_folder_of_another_command_or_another_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "run_all", lambda *_: pytest.fail("ran"))
    record = '{"step": "check_collectives", "state": "ok", "seconds": 1.0}\n'
    (tmp_path / "steps.jsonl").write_text(record)
    (tmp_path / "layers.json").touch()
    with pytest.raises(SystemExit, match="2"):
        measure.main([f"--output={tmp_path}", "loading"])
    assert "holds layers.json of another command" in capsys.readouterr().err
    (tmp_path / "layers.json").unlink()
    for said in ("holds steps of another command (check_collectives); ", "another run is writing"):
        with pytest.raises(SystemExit, match="2"):
            measure.main([f"--output={tmp_path}", "loading"])
        assert f"error: {tmp_path}: {said}" in capsys.readouterr().err
        if (tmp_path / "steps.jsonl").exists():
            assert (tmp_path / "steps.jsonl").read_text() == record
            (tmp_path / "steps.jsonl").unlink()
            lock = folder_lock.held(tmp_path)
            lock.__enter__()
    lock.__exit__(None, None, None)


def test_a_step_that_writes_a_file_finds_its_folder(tmp_path, monkeypatch):
    folders = {}

    def run_all(steps, *_):
        for step in steps:
            (output,) = [one for one in step.arguments if one.startswith("--output=")]
            folders[step.name] = output.removeprefix("--output=")

    monkeypatch.setattr(measure, "run_all", run_all)
    measure.main(["compile", "loading", f"--output={tmp_path / 'out'}"])
    assert commands.file(folders["compile"]).parent == tmp_path / "out" / "compile"
    assert commands.usable(folders["loading"]) == tmp_path / "out" / "loading"
    assert not (tmp_path / "out" / "loading").exists()  # its command makes it


def test_the_list_says_what_each_step_is(capsys):
    assert measure.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(measure.KINDS)
    assert measure.main(["--list", "tests"]) == 0
    assert capsys.readouterr().out.splitlines() == [line for line in lines if "tests " in line]
    with pytest.raises(SystemExit, match="2"):
        measure.main(["--list", "benhc"])
