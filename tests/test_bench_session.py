"""Whole runs of the benchmark on a CPU: verdicts, exit codes, interruption, resuming, files."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import pytest

import jax_moe
from bench import comparison, documents, header, runner, saved, session, solutions
from bench.correctness import Tolerance
from bench.gpu_clock import ClockError
from bench.results import ERROR, PASS, WRONG
from bench.settings import Settings
from interop import folder_lock
from interop.solutions.base import Solution
from jax_moe import LayerInputs
from tests.bench_inputs import reduced_arguments
from tests.bench_rows import cheap_layer

pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs at reduced size")


def solution(name, run, **fields):
    return Solution(name=name, framework="jax", description=f"test {name}", run=run, **fields)


def layer(*arguments):
    return jax_moe.apply(*arguments, backend="xla")


right = cheap_layer


def wrong(*arguments):
    return right(*arguments) * jnp.bfloat16(1.5)


def broken(*arguments):
    raise RuntimeError("no luck\nat all")


@pytest.fixture
def registry(monkeypatch, request):
    """A registry that holds what the test puts there; its reference is the oracle itself.

    The oracle is a cheap one, but for tests that use `real_oracle`.
    """
    if "real_oracle" not in request.fixturenames:
        monkeypatch.setattr(jax_moe, "reference", cheap_layer)
    found = {"torch_reference": solution("torch_reference", jax_moe.reference)}
    monkeypatch.setattr(solutions, "known_to", lambda *_: found)
    monkeypatch.setattr(comparison, "known_to", lambda *_: found)

    def put(*added):
        found.update({one.name: one for one in added})

    return put


@pytest.fixture
def real_oracle():
    """Asks for the layer's own oracle."""


def settings(tmp_path, *names, **fields):
    few = {"warmup": 1, "iterations": 2, "num_trials": 2, "timer": "wall", "on_gpu": False}
    few["cool_down"] = 0.0
    return Settings(
        solutions=names, output=tmp_path / "out", **{**few, "workloads": ("1",), **fields}
    )


def execute(chosen, *, report=False, **how):
    return session.execute(chosen, documents.Options(report=report), **how)


def rows_of(chosen):
    content = json.loads((chosen.output / f"{chosen.stem}.json").read_text())
    return {(row["solution"], row["num_tokens"]): row for row in content["rows"]}, content


def test_a_right_solution_passes_and_everything_is_recorded(
    tmp_path, registry, real_oracle, capsys
):
    registry(solution("ours", layer))
    chosen = settings(tmp_path, "ours", workloads=("1", "7"))
    assert execute(chosen, report=True) == session.OK
    rows, content = rows_of(chosen)
    assert set(rows) == {(n, t) for n in ("torch_reference", "ours") for t in (1, 7)}
    row = rows["ours", 7]
    assert row["status"] == PASS
    assert row["local_expert_offset"] == chosen.sizes.num_experts * 3 // 4
    assert row["wall"]["n"] == 4
    assert row["wall"]["p10"] <= row["wall"]["median"] <= row["wall"]["p90"]
    assert 0.9 < row["check"]["matched_ratio"] <= row["check"]["matched_ratio_sum"] <= 1
    assert 0 < row["check"]["relative_error"] < 0.03
    assert row["figures"]["speedup"] == pytest.approx(
        rows["torch_reference", 7]["wall"]["median"] / row["wall"]["median"]
    )
    assert row["figures"]["tflops"] == pytest.approx(
        row["work"]["flops"] / row["wall"]["median"] / 1e6
    )
    assert row["figures"]["unpromoted_fraction"] is None
    assert content["complete"] is True
    assert content["device"]["platform"] == "cpu"
    assert content["settings"]["seed"] == 0
    assert {"jax", "python", "numpy"} <= set(content["versions"])
    assert len(content["git_commit"]) >= 7
    shown = capsys.readouterr().out
    assert "sizes are REDUCED" in shown
    assert "4 of 4 rows PASS" in shown
    assert (chosen.output / "results.md").read_text().count("| ours | PASS |") == 2
    for name in ("results.png", "comparison_report.png"):
        assert matplotlib.image.imread(chosen.output / name).shape[2] == 4
    comparison_report = (chosen.output / "comparison_report.md").read_text()
    assert "`e05c6c03`" in comparison_report
    assert not [p for p in chosen.output.iterdir() if p.name.startswith(".")]


def test_a_wrong_solution_shows_no_speed_and_fails_the_run(tmp_path, registry, capsys):
    registry(solution("ours", right), solution("off", wrong))
    chosen = settings(tmp_path, "ours", "off", seed=3)
    assert execute(chosen, report=True) == session.FAILED
    rows, _ = rows_of(chosen)
    row = rows["off", 1]
    assert row["status"] == WRONG
    assert row["check"]["matched_ratio"] < 0.85
    assert row["wall"] is row["gpu"] is None
    assert row["figures"]["speedup"] is row["figures"]["tflops"] is None
    assert rows["ours", 1]["figures"]["speedup"] is not None
    shown = capsys.readouterr().out
    titles, off = (
        next(re.split(r"\s{2,}", one) for one in shown.splitlines() if one.startswith(name))
        for name in ("solution ", "off ")
    )
    cells = dict(zip(titles, off, strict=True))
    assert cells["status"] == WRONG
    speeds = ("wall us", "p10", "p90", "n", "TFLOP/s", "TB/s", "speedup")
    assert {cells[title] for title in speeds} == {"-"}
    assert "repeat: python bench_main.py --solutions=off --workloads=e05c6c03 --seed=3" in shown
    assert session.write_documents(chosen.output, documents.Options()) == session.OK
    again = capsys.readouterr().out  # names the wrong row, too
    assert again[again.index("2 of 3 rows PASS") :] in shown
    report = (chosen.output / "comparison_report.md").read_text()
    assert "WRONG | - |" in report


def test_more_memory_than_stated_makes_the_row_wrong(tmp_path, registry, real_oracle, capsys):
    shapes = []

    def stated(arguments):
        shapes.append((arguments.hidden_states.shape, arguments.weights.gemm2_weights.shape))
        return 1000

    registry(solution("modest", layer, workspace_bound=lambda _: 10**9))
    registry(solution("greedy", layer, workspace_bound=stated))
    chosen = settings(tmp_path, "modest", "greedy", workloads=("7",), num_trials=1)
    assert execute(chosen) == session.FAILED
    rows, _ = rows_of(chosen)
    assert (rows["modest", 7]["status"], rows["modest", 7]["workspace_bound"]) == (PASS, 10**9)
    assert rows["torch_reference", 7]["workspace_bound"] is None
    row = rows["greedy", 7]
    assert set(shapes) == {((7, 256), (8, 256, 128))}
    assert (row["status"], row["workspace_bound"], row["wall"]) == (WRONG, 1000, None)
    assert row["workspace_bytes"] == rows["modest", 7]["workspace_bytes"] > 1000
    problem = f"a call takes {row['workspace_bytes']:,} bytes of temporary memory, stated are at "
    assert row["problem"] == problem + "most 1,000"
    assert f"WRONG: greedy at T=7: {problem}" in capsys.readouterr().out


def test_one_bad_trial_makes_the_row_wrong(tmp_path, registry):
    def largest_scale(trial):
        return float(reduced_arguments(1, trial).hidden_states_scale.max())

    first, last = largest_scale(0), largest_scale(2)
    assert first != last

    def run(*arguments):
        is_last = LayerInputs.of(*arguments).hidden_states_scale.max() == last
        return right(*arguments) * jnp.where(is_last, jnp.inf, 1).astype(jnp.bfloat16)

    registry(solution("sometimes", run))
    assert execute(settings(tmp_path, "sometimes", num_trials=2)) == session.OK
    chosen = settings(tmp_path, "sometimes", num_trials=3)
    assert execute(chosen, overwrite=True) == session.FAILED
    row = rows_of(chosen)[0]["sometimes", 1]
    assert (row["status"], row["problem"]) == (WRONG, "output holds Inf or NaN")


def test_a_solution_that_raises_does_not_stop_the_others(tmp_path, registry, capsys):
    registry(solution("bad", broken), solution("ours", right))
    chosen = settings(tmp_path, "bad", "ours")
    assert execute(chosen) == session.FAILED
    rows, _ = rows_of(chosen)
    assert rows["bad", 1]["status"] == ERROR
    assert rows["bad", 1]["problem"] == "RuntimeError: no luck"
    assert rows["ours", 1]["status"] == PASS
    assert "ERROR: bad at T=1: RuntimeError: no luck" in capsys.readouterr().out


def test_an_unavailable_solution_is_one_line(tmp_path, registry, capsys):
    registry(solution("absent", right, unavailable_reason=lambda: "no such package"))
    registry(solution("ours", right))
    chosen = settings(tmp_path, "absent", "ours")
    assert execute(chosen) == session.OK
    assert "skipped: absent: no such package" in capsys.readouterr().out
    assert rows_of(chosen)[1]["unavailable"] == {"absent": "no such package"}
    with pytest.raises(ValueError, match="none of those asked for can run here: absent: no such"):
        execute(dataclasses.replace(chosen, solutions=("absent",)))


def test_an_interrupted_run_keeps_its_rows_and_can_be_resumed(tmp_path, registry, capsys):
    calls = []

    def interrupted(*arguments):
        calls.append(LayerInputs.of(*arguments).tokens)
        if calls[-1] == 7 and calls.count(7) == 1:
            raise KeyboardInterrupt
        return right(*arguments)

    registry(solution("ours", interrupted))
    chosen = settings(tmp_path, "ours", workloads=("1", "7"), num_trials=1)
    assert execute(chosen) == 130
    rows, content = rows_of(chosen)
    assert set(rows) == {("torch_reference", 1), ("ours", 1), ("torch_reference", 7)}
    assert content["complete"] is False
    assert "**Incomplete**" in (chosen.output / "results.md").read_text()
    first = rows["ours", 1]
    assert execute(chosen, resume=True) == session.OK
    rows, content = rows_of(chosen)
    assert set(rows) == {(n, t) for n in ("torch_reference", "ours") for t in (1, 7)}
    assert rows["ours", 1] == first
    assert calls.count(1) == 1, "the finished row was measured again"
    assert (content["complete"], content["resumed_rows"]) == (True, 3)
    text = (chosen.output / "results.md").read_text()
    assert text.count(chosen.command()) == 2
    assert "\n# resumed with\n" in text


def test_only_comparable_and_whole_files_are_resumed(tmp_path, registry):
    registry(solution("ours", right))
    chosen = settings(tmp_path, "ours")
    assert execute(chosen) == session.OK
    changes = {
        "seed": 7,
        "tolerance": Tolerance(rtol=0.5),
        "inputs": "flashinfer",
        "precision": "high",
        "batch_invariant": True,
    }
    for field, value in changes.items():
        other = dataclasses.replace(chosen, **{field: value})
        with pytest.raises(ValueError, match=f"measured with other settings: {field}"):
            execute(other, resume=True)
    path = chosen.output / "results.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "versions": {}}))
    with pytest.raises(ValueError, match="measured with other versions"):
        execute(chosen, resume=True)
    path.write_text(json.dumps({**content, "rows": [{"solution": "ours"}]}))
    with pytest.raises(ValueError, match="damaged: row 1: no '"):
        execute(chosen, resume=True)
    row = content["rows"][0] | {"wall": content["rows"][0]["wall"] | {"median": "x"}}
    path.write_text(json.dumps({**content, "rows": [row]}))
    with pytest.raises(ValueError, match=r"damaged: row 1: .*Statistics\.median: .*float, got 'x'"):
        execute(chosen, resume=True)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="not valid JSON"):
        execute(chosen, resume=True)


def test_rows_from_before_there_was_a_bound_are_kept(tmp_path, registry):
    registry(solution("ours", right))
    chosen = settings(tmp_path, "ours", num_trials=1)
    assert execute(chosen) == session.OK
    path = chosen.output / "results.json"
    content = json.loads(path.read_text())
    for row in content["rows"]:
        del row["workspace_bound"]
    path.write_text(json.dumps(content))
    assert execute(chosen, resume=True) == session.OK
    rows, content = rows_of(chosen)
    assert content["resumed_rows"] == len(rows) == 2
    assert {row["workspace_bound"] for row in rows.values()} == {None}


def test_failed_rows_are_measured_again_when_resumed(tmp_path, registry):
    registry(solution("ours", wrong))
    chosen = settings(tmp_path, "ours", num_trials=1)
    assert execute(chosen) == session.FAILED
    registry(solution("ours", right))
    assert execute(chosen, resume=True) == session.OK
    assert rows_of(chosen)[0]["ours", 1]["status"] == PASS


def test_a_tie_with_the_required_ratio_is_right(tmp_path, registry):
    registry(solution("ours", right))
    assert execute(settings(tmp_path, "ours", tolerance=Tolerance(0, 0, 1.0))) == session.OK


def test_untimed_preparation_reaches_the_solution(tmp_path, registry):
    def doubled(inputs):
        twice = inputs._replace(routed_scaling_factor=inputs.routed_scaling_factor * 2)
        return (*twice.arguments, jnp.float32(0.5))

    def run(*arguments):
        *ten, half = arguments
        return (right(*ten) * ten[9] / 2.5 * half).astype(jnp.bfloat16)

    registry(solution("prepared", run, prepare=doubled))
    assert execute(settings(tmp_path, "prepared")) == session.OK


def test_a_profile_leaves_a_trace_that_perfetto_opens(tmp_path, registry):
    registry(solution("ours", right))
    execute(settings(tmp_path, "ours", num_trials=1), profile=tmp_path / "traces")
    found = list((tmp_path / "traces" / "ours_T1").rglob("perfetto_trace.json.gz"))
    assert len(found) == 1
    for folder, resume in ((tmp_path / "2", False), (tmp_path / "3", True)):  # another run each
        with pytest.raises(ValueError, match=r"--profile: .*traces holds traces .* \(ours_T1, tor"):
            execute(settings(folder, "ours"), resume=resume, profile=tmp_path / "traces")
        assert not folder.exists()
    chosen = settings(tmp_path, "ours", num_trials=1)
    with (
        folder_lock.held(tmp_path / "traces"),
        pytest.raises(ValueError, match=r"--profile: .*traces: another run is writing here"),
    ):
        execute(chosen, resume=True, profile=tmp_path / "traces")
    execute(chosen, resume=True, profile=tmp_path / "traces")
    execute(chosen, overwrite=True, profile=chosen.output)  # beside the results


def test_a_profile_on_a_full_disk_ends_the_run(tmp_path, registry, monkeypatch, capsys):
    registry(solution("ours", right))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)

    def full():
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device\nmore")

    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    chosen = settings(tmp_path, "ours", num_trials=1)
    assert execute(chosen, profile=tmp_path / "traces") == session.FAILED
    shown = capsys.readouterr()
    said = "cannot be written: RuntimeError: RESOURCE_EXHAUSTED: No space left on device\n"
    assert f"{tmp_path / 'traces' / 'torch_reference_T1'}: {said}" in shown.err
    assert "no rows were finished" in shown.out


def test_scaling_runs_on_powers_of_two(tmp_path, registry):
    registry(solution("ours", right))
    chosen = settings(tmp_path, "ours", scaling=True, workloads=("1",), num_trials=1)
    assert execute(chosen) == session.OK
    assert {row["uuid"] for row in rows_of(chosen)[0].values()} == {"scaling-1"}
    text = (chosen.output / "scaling.md").read_text()
    assert text.startswith("# Scaling on ")
    assert "**T=1 offset=8 scaling: " in text
    with pytest.raises(ValueError, match=r"unknown workload '3'; expected 'all' .* 8192, 16384$"):
        execute(dataclasses.replace(chosen, workloads=("3",)))
    assert not (chosen.output / "scaling.png").exists()  # a point alone


def test_how_the_cache_is_emptied_reaches_the_clocks(tmp_path, registry, monkeypatch):
    """Both passes of a run on a GPU: the wall's here, the profiler's as far as a CPU goes."""
    asked = []
    monkeypatch.setattr(runner, "wall_times", lambda *given: asked.append(given[2]) or [1.0])
    registry(solution("right", right))
    chosen = settings(tmp_path, "right", flush="read", num_trials=1)
    assert execute(chosen) == session.OK
    assert set(asked) == {"read"}

    results = saved.read(tmp_path / "out").results

    def clock(flush_by):
        raise ClockError(f"emptied by {flush_by}")

    monkeypatch.setattr(runner, "GpuClock", clock)
    on_gpu = dataclasses.replace(chosen, timer="gpu", wall_time=False)
    with pytest.raises(ClockError, match="emptied by read"):
        runner.run(on_gpu, {}, [], results, None)
    said = dict(header.lines(results, dataclasses.replace(on_gpu, on_gpu=True)))
    assert "256 MB read (nothing to write back) before each call" in said["Timing"]
