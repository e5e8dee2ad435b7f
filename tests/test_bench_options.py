"""`python -m bench.options`: every variant runs and is checked; ratios are over their own kind."""

from __future__ import annotations

import concurrent.futures as futures
import json
from concurrent.futures.process import BrokenProcessPool

import jax
import pytest

from bench import inputs, option_variants, options
from bench.options import Row, Variant
from bench.workloads import REDUCED, select
from jax_moe import backends
from jax_moe.device import Device


@pytest.fixture(scope="module")
def given():
    (workload,) = select(["7"])
    weights = inputs.draw_weights("realistic", REDUCED, 0)
    return options.make_inputs(workload, REDUCED, weights)


def measure(variant, given, program=None):
    order = options.Order(variant, "xla", given[variant.dtype])
    asked = options.Order(options.question(variant), options.ORACLE, given[variant.dtype])
    expected = options.answer(asked, None)
    return options.measure(order, program, expected, clock=None, iterations=1)


def of(stage, name):
    return next(one for one in options.VARIANTS if (one.stage, one.name) == (stage, name))


def test_a_layer_is_held_against_the_oracle(given):
    fast = measure(of("layer", "bf16"), given)
    assert (fast.problem, fast.tokens) == ("", 7)
    assert 0.03 < fast.error < 0.06  # of FP8, so it is not an oracle of FP8 either
    assert 0.5 < fast.equal < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("variant", options.VARIANTS, ids=lambda one: f"{one.stage}-{one.name}")
def test_every_variant_runs(variant, given):
    row = measure(variant, given)
    assert row.problem == ""
    expected = 0.5 if variant.stage == "layer" and "high" not in variant.name else 0.999
    assert row.equal > expected


def test_what_fails_is_a_row_with_the_reason(given):
    row = measure(Variant("layer", "e4m3"), given, program=RuntimeError("no\nmore"))
    assert (row.problem, row.us) == ("RuntimeError: no", None)


def test_without_an_oracle_there_is_no_time(given):
    order = options.Order(of("route", "softmax"), "xla", given["e4m3"])
    lost = options.answer(order._replace(backend=options.ORACLE), MemoryError("lost"))
    row = options.measure(order, None, lost, clock=None, iterations=1)
    assert (row.problem, row.us) == ("MemoryError: lost", None)


def test_layers_that_differ_in_precision_share_an_oracle(given):
    asked = [one for one in options.orders_of(given, "xla") if one.backend == options.ORACLE]
    layers = [one.variant.options for one in asked if one.variant.stage == "layer"]
    assert layers == [{}, {"swiglu_limit": 7.0}, {}]  # the last is of bf16 rows
    assert [one.given is given["bf16"] for one in asked[:3]] == [False, False, True]


def test_ratios_are_over_the_first_of_a_kind():
    def row(name, us, tokens=1):
        return Row("layer", name, tokens, us=us)

    rows = [row("e4m3", 10.0), row("e4m3, high", 15.0), row("bf16", 20.0), row("bf16, high", 25.0)]
    rows += [row("e4m3", 40.0, 7), row("e4m3, high", 44.0, 7), row("bf16", None, 7)]
    ratios = [one.ratio for one in options.with_ratios(rows)]
    (alone,) = options.with_ratios(rows[1:2])  # nothing that it could be compared with
    assert alone.ratio is None
    assert ratios == [1.0, 1.5, 1.0, 1.25, 1.0, pytest.approx(1.1), None]


def test_a_run_is_written_down(tmp_path, monkeypatch, capsys):
    known = of("route", "softmax"), of("layer", "bf16")
    monkeypatch.setattr("bench.option_variants.VARIANTS", known)
    assert (
        options.main(["--workloads=1", "--jobs=2", "--variants=soft", f"--output={tmp_path}"]) == 0
    )
    shown = capsys.readouterr().out
    assert "times mean nothing" in shown
    assert "1 of 2 programs compiled, left: route softmax, T=1" in shown
    compiled = "2 of 2 programs compiled\n1 of 1: route softmax, T=1, for the check\n1 of 1: route"
    assert f"{compiled} softmax, T=1\n" in shown
    written = json.loads((tmp_path / "options.json").read_text())
    assert [one["equal"] for one in written["rows"]] == [1.0]
    assert written["about"]["versions"]["jax"] == jax.__version__
    assert written["about"]["complete"] is True
    document = (tmp_path / "options.md").read_text()
    assert "| route | softmax | 1 |" in document
    assert "Incomplete" not in document
    assert "**REDUCED sizes**: No GPU found" in document
    assert written["about"]["reduced"] is True
    assert written["about"]["command"] in " ".join(document.split())


def test_rows_are_kept_whatever_becomes_of_the_next_one(tmp_path, monkeypatch, capsys):
    known = of("route", "softmax"), of("route", "sigmoid")
    monkeypatch.setattr("bench.option_variants.VARIANTS", known)

    def endless(order, program):
        """A program of whose compilation there is no end, until somebody ends it."""
        if order.variant.name == "sigmoid":
            raise KeyboardInterrupt
        return order.given

    monkeypatch.setattr(options, "answer", endless)
    monkeypatch.setattr(options, "measure", lambda *_, **__: Row("route", "softmax", 1, us=2.0))
    with pytest.raises(KeyboardInterrupt):
        options.main(["--workloads=1", f"--output={tmp_path}"])
    shown, table = capsys.readouterr().out.split("2 of 2: route sigmoid, T=1, for the check\n")
    assert "1 of 2: route softmax" in shown
    assert "softmax" in table
    assert "sigmoid" not in table  # it was not finished
    assert table.endswith(f"what was finished is in {tmp_path / 'options.json'}\n")
    written = json.loads((tmp_path / "options.json").read_text())
    assert [row["variant"] for row in written["rows"]] == ["softmax"]
    assert written["about"]["complete"] is False
    assert "**Incomplete**: 1 of 2 rows." in (tmp_path / "options.md").read_text()


class Pool(futures.Executor):
    """Compiles nothing: a program is `result`, from the third one on `then` is raised."""

    def __init__(self, result, then):
        self.result, self.then, self.taken = result, then, 0

    def submit(self, *_):
        self.taken += 1
        if self.taken > 2:
            raise self.then
        future = futures.Future()
        future.set_result(self.result)
        return future


@pytest.fixture
def two_routers(tmp_path, monkeypatch):
    """Runs two variants with two processes, which are a pool of ours."""
    known = of("route", "softmax"), of("route", "sigmoid")
    monkeypatch.setattr("bench.option_variants.VARIANTS", known)

    def run(pool):
        monkeypatch.setattr(options, "spawned", lambda *_: pool)
        return options.main(["--workloads=1", "--jobs=2", f"--output={tmp_path}"])

    return run


def test_rows_are_measured_before_later_programs_are_compiled(two_routers, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "answer", lambda *_: None)
    monkeypatch.setattr(options, "measure", lambda *_, **__: Row("route", "softmax", 1, us=2.0))
    with pytest.raises(KeyboardInterrupt):
        two_routers(Pool(None, KeyboardInterrupt))
    written = json.loads((tmp_path / "options.json").read_text())
    assert [row["variant"] for row in written["rows"]] == ["softmax"]
    assert written["about"]["complete"] is False


def test_a_pool_that_broke_is_the_reason_of_the_rows_that_are_left(two_routers, tmp_path):
    assert two_routers(Pool(MemoryError("no more"), BrokenProcessPool("a process ended"))) == 1
    written = json.loads((tmp_path / "options.json").read_text())
    problems = [row["problem"] for row in written["rows"]]
    assert problems == ["MemoryError: no more", "BrokenProcessPool: a process ended"]
    assert written["about"]["complete"] is True


def test_an_unknown_workload_is_refused(capsys):
    with pytest.raises(SystemExit):
        options.main(["--workloads=3"])
    assert "unknown workload '3'" in capsys.readouterr().err


def test_a_backend_that_cannot_run_here_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(backends, "device_of", lambda: Device("cpu", None))
    monkeypatch.setattr(options, "run", lambda *_: 0)
    (tmp_path / "options.md").write_text("an earlier run's")
    arguments = ["--overwrite", f"--output={tmp_path}"]
    with pytest.raises(SystemExit, match="2"):
        options.main(["--backend=mosaic", *arguments])
    said = "error: --backend=mosaic: needs an NVIDIA GPU of compute capability 9.0 (Hopper)"
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)
    assert (tmp_path / "options.md").exists()
    assert options.main(["--backend=xla", *arguments]) == 0


@pytest.mark.parametrize("unknown", ["--workloads=3", "--variants=tanh"])
def test_an_unknown_name_leaves_an_earlier_run_whole(tmp_path, unknown):
    (tmp_path / "options.md").write_text("an earlier run's")
    with pytest.raises(SystemExit):
        options.main([unknown, "--overwrite", f"--output={tmp_path}"])
    assert (tmp_path / "options.md").exists()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("e4m3, high", ("e4m3, high",)),
        ("e4m3,bf16", ("e4m3", "bf16")),
        ("e4m3, bf16 ", ("e4m3", "bf16")),
        ("bf16, ue8m0,sigmoid, no bias, softmax", ("bf16, ue8m0", "sigmoid, no bias", "softmax")),
        ("e4m3,high", ("e4m3", "high")),
        ("e4m3, high, batch_invariant", ("e4m3, high, batch_invariant",)),
    ],
)
def test_names_of_variants_may_hold_commas(text, names):
    assert option_variants.variant_names(text) == names
    for one in option_variants.VARIANTS:
        assert option_variants.variant_names(one.name) == (one.name,)


def test_an_unknown_variant_is_refused(capsys):
    with pytest.raises(SystemExit):
        options.main(["--workloads=1", "--variants=e4m3,tanh"])
    assert "expected the beginning of 'e4m3', " in capsys.readouterr().err
    chosen = options.chosen_variants(["e4m3, high", "sig"])
    assert [one.name for one in chosen] == [
        "e4m3, high", "e4m3, high, batch_invariant", "sigmoid", "sigmoid, no bias",
        "sigmoid, not renormalized",
    ]  # fmt: skip
