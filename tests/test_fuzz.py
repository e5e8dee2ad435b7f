"""The fuzzer: it finds planted defects, its cases can be repeated, and a short run finds nothing.

`python -m tests.fuzz --minutes 10` is the long run, on a GPU too.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import re
import signal

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from pallas_kernels import interruption
from tests import fuzz, fuzz_cases, fuzz_checks, numpy_oracle
from tests.backend_cases import EVERYWHERE
from tests.moe_inputs import bits


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(
    ("slot", "few"),  # the second is the largest, the last one is batch invariant
    [(0, 20), (2, 8), (4, 20), pytest.param(19, 20, marks=pytest.mark.slow)],
)
def test_a_few_cases(case, slot, few):
    for count in range(few):
        number = 7000 * len(fuzz_cases.SLOTS) + count * len(fuzz_cases.SLOTS) + slot
        drawn = fuzz_cases.draw(number)
        outcome = fuzz_checks.check(drawn, fuzz_checks.oracle(drawn), case)
        assert outcome.problem is None, drawn


def test_only_a_tie_of_equal_numbers_is_clear():
    config = jax_moe.MoEConfig(1, 2, 1)
    logits = np.array([[0.25, -0.25, 0.5, -0.5], [0.25, -0.25, -0.25, 0.25], [1.0, 0.0, 0.5, 0.5]])
    gaps = numpy_oracle.routing_gaps(logits, np.zeros(4), config)
    assert gaps[0] < 1e-15  # sigmoid(x) + sigmoid(-x) is 1 twice
    assert gaps[1] > 0.1  # the same two numbers twice: the lower id
    one, half = 1 / (1 + np.exp([-1.0, -0.5]))
    np.testing.assert_allclose(gaps[2], 2 * half - (one + 0.5))


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels run for real there")
@hypothesis.settings(max_examples=3, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 2**24))
def test_cases_in_the_interpreter(count):
    slots = fuzz_cases.INTERPRETED_SLOTS
    drawn = fuzz_cases.draw(count * len(fuzz_cases.SLOTS) + slots[count % len(slots)])
    outcome = fuzz_checks.check(drawn, fuzz_checks.oracle(drawn), fuzz.INTERPRETED)
    assert outcome.problem is None, drawn


def test_a_number_is_always_the_same_case():
    first, second = fuzz_cases.draw(4321), fuzz_cases.draw(4321)
    for left, right in zip(first.spoiled.arguments, second.spoiled.arguments, strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
    assert str(first) == str(second) != str(fuzz_cases.draw(4321 + len(fuzz_cases.SLOTS)))


def test_every_kind_of_routing_and_fault_is_drawn():
    numbers = range(0, 150 * len(fuzz_cases.SLOTS), len(fuzz_cases.SLOTS))
    drawn = [fuzz_cases.draw(number) for number in numbers]
    assert {one.routing for one in drawn} == set(fuzz_cases.ROUTINGS)
    assert {one.fault for one in drawn} == {*fuzz_cases.FAULTS, None}
    assert np.mean([one.clear.mean() for one in drawn]) > 0.95


def off_by_a_tenth(out, inputs, calls):
    return out.at[3].multiply(1.1)


def one_element(out, inputs, calls):
    return out.at[2, ::8].multiply(-1)


def garbage_in_idle_rows(out, inputs, calls):
    return jnp.where(out == 0, 1e-6, out).astype(out.dtype)


def not_repeatable(out, inputs, calls):
    return out.at[1, 0].multiply(1 + 2.0**-7 * (len(calls) % 2))


def spreads_nan(out, inputs, calls):
    poisoned = jnp.isnan(jnp.asarray(inputs.hidden_states, jnp.float32)).any()
    return jnp.where(poisoned, jnp.nan, out).astype(out.dtype)


def stops(out, inputs, calls):
    raise RuntimeError("an illegal memory access was encountered\nmore")


DEFECTS = {
    off_by_a_tenth: "differ",
    one_element: "differ",
    garbage_in_idle_rows: "is not zero",
    not_repeatable: "changed",
    spreads_nan: "the fault 'token' changed",
    stops: "RuntimeError: an illegal memory access",
}


@pytest.mark.parametrize(
    ("defect", "said"), DEFECTS.items(), ids=lambda d: getattr(d, "__name__", "")
)
def test_planted_defects_are_found(monkeypatch, defect, said):
    apply, calls = jax_moe.apply, []

    def spoiled(*inputs, **options):
        calls.append(1)
        return defect(apply(*inputs, **options), jax_moe.LayerInputs.of(*inputs), calls)

    monkeypatch.setattr(jax_moe, "apply", spoiled)
    told = []
    campaign = fuzz.Campaign(["xla"], told.append)
    problems = []
    for count in range(60):
        campaign.run(count * len(fuzz_cases.SLOTS))
        problems = [failure["problem"] for failure in campaign.failures]
        if any(said in problem for problem in problems):
            break
    else:
        pytest.fail(f"not found: {problems}")
    assert len(told) == len(problems)
    assert f"\n  {campaign.failures[0]['repeat']}" in told[0]


def test_bits_that_depend_on_the_batch_are_found(monkeypatch):
    """With a layer that nothing has to be compiled for, and an oracle that agrees with it."""
    drawn, defect = fuzz_cases.draw(19), []
    assert drawn.model.batch_invariant

    def layer(*inputs, **_):
        out = np.array(jax_moe.LayerInputs.of(*inputs).hidden_states, np.float32)
        if defect and len(out) < len(drawn.ids):
            out[0] += 1
        return out.astype(jnp.bfloat16)

    monkeypatch.setattr(jax_moe, "apply", layer)
    monkeypatch.setattr(fuzz_checks, "compare", lambda *_: fuzz_checks.Outcome(None, 0, 0.0))
    assert fuzz_checks.check(drawn, None, "xla").problem is None
    defect.append("the first token depends on the others")
    found = fuzz_checks.check(drawn, None, "xla").problem
    assert re.match(r"1 of 16 rows differ in another batch: \d+, ", found)


def test_the_oracle_is_the_reference():
    drawn = fuzz_cases.draw(2)
    expected = jax_moe.reference(*drawn.inputs.arguments, config=drawn.model.config)
    found = fuzz_checks.oracle(drawn).astype(jnp.bfloat16)
    np.testing.assert_array_equal(bits(found), bits(expected))


def test_the_command_line_writes_what_ran(tmp_path, capsys):
    arguments = ["--minutes", "0.05", "--seed", "1", "--backend", "xla"]
    assert fuzz.main([*arguments, "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "fuzz.json").read_text())
    assert content["cases"] == content["checks"] == sum(content["shapes"].values()) > 0
    assert content["complete"] is True
    assert content["failures"] == []
    assert content["seconds"] >= 3
    assert {"device", "versions", "commit", "seed", "rows_compared"} <= set(content)
    assert [path.name for path in tmp_path.iterdir()] == ["fuzz.json"]
    assert "0 failures" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_its_exit_code(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fuzz.Campaign, "run", lambda *_: signal.raise_signal(number))
    command = ["--backend", "xla", "--output", str(tmp_path)]
    assert interruption.ended(lambda: fuzz.main(command)) == 128 + number
    assert json.loads((tmp_path / "fuzz.json").read_text())["complete"] is False
    assert capsys.readouterr().err == "interrupted\n"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fuzz, "fuzz", full)
    said = f"{tmp_path / 'running.txt'}: cannot be written: No space left on device"
    with pytest.raises(SystemExit, match=f"^{re.escape(said)}$"):
        fuzz.main([f"--output={tmp_path}", "--minutes=0.01"])
    assert not list(tmp_path.iterdir())


def test_what_an_earlier_run_found_is_replaced_only_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "fuzz", lambda *_: True)
    command = ["--backend=xla", "--minutes=0.01", f"--output={tmp_path}"]
    for name, whose in (("fuzz.json", "an earlier run"), ("results.json", "another command")):
        (tmp_path / name).write_text("kept")
        with pytest.raises(SystemExit, match="2"):
            fuzz.main(command)
        said = f"error: --output: {tmp_path} holds {name} of {whose}; "
        assert said in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "kept"
        (tmp_path / name).unlink()
    (tmp_path / "fuzz.json").write_text("replaced")
    assert fuzz.main([*command, "--overwrite"]) == 0
    assert json.loads((tmp_path / "fuzz.json").read_text())["cases"] == 0


def test_the_command_line_repeats_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(jax_moe, "apply", lambda *_, **__: stops(None, None, None))
    assert fuzz.main(["--case", "16", "--backend", "xla"]) == 1
    shown = capsys.readouterr().out
    assert "python -m tests.fuzz --case 16 --backend xla" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--backend cuda", "--backend: expected some of "),
        ("--seed -1", "argument --seed: expected 0 or a positive integer, got '-1'"),
        ("--case -1", "argument --case: expected 0 or a positive integer, got '-1'"),
        ("--case 3", "--case: runs one case and writes nothing, got --output too"),
        ("--minutes 0", "argument --minutes: expected a finite number of more than 0, got '0'"),
    ],
)
def test_the_command_line_names_what_is_wrong_and_makes_no_folder(
    tmp_path, capsys, arguments, said
):
    with pytest.raises(SystemExit, match="2"):
        fuzz.main([*arguments.split(), "--output", str(tmp_path / "new")])
    assert f"error: {said}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_without_pytest_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        fuzz.main(["--case", "3"])
    assert "error: needs pytest, as its cases are those of tests" in capsys.readouterr().err


def test_slots_open_as_time_allows(monkeypatch, tmp_path):
    """Opening costs ten times what a case costs: most of the time goes to known shapes."""
    now, ran = [0.0], []
    campaign = fuzz.Campaign(["xla"])

    def run(number):
        slot = fuzz_cases.slot_of(number)
        now[0] += 1.0 if slot in map(fuzz_cases.slot_of, ran) else 10.0
        ran.append(number)

    monkeypatch.setattr(campaign, "run", run)
    monkeypatch.setattr(fuzz.time, "monotonic", lambda: now[0])
    slots = list(range(len(fuzz_cases.SLOTS)))
    with (tmp_path / "running.txt").open("w") as running:
        assert fuzz.fuzz(campaign, 3, 300.0, slots, running)
    assert len(set(ran)) == len(ran)
    opened = {fuzz_cases.slot_of(number) for number in ran}
    assert 8 <= len(opened) < len(slots)
    assert len(ran) > 150
    assert (tmp_path / "running.txt").read_text() == fuzz.repro(ran[-1], "xla") + "\n"
