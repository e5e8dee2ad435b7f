"""`bench_main.py --ranks`: the layer over devices, checked; on CPU devices times mean nothing."""

from __future__ import annotations

import errno
import gzip
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from bench import (
    environment,
    parallel,
    parallel_documents,
    parallel_gpus,
    parallel_inputs,
    parallel_rows,
    parallel_trace,
)
from bench.parallel_rows import Row
from bench.workloads import REDUCED

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_ranks_are_checked_and_said_not_to_be_timed(tmp_path):
    command = ("-m", "bench.parallel", "--ranks=2", "--tokens=3", "--routings=even,zipf")
    done = run(*command, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "times mean nothing" in done.stdout
    rows, about = parallel_rows.read(tmp_path / "parallel.json")
    assert about["complete"] is True
    assert [(row.ranks, row.tokens, row.name, row.routing) for row in rows] == [
        (2, 3, "collectives", "even"),
        (2, 3, "collectives", "zipf"),
    ]
    for row in rows:
        assert 0 < row.error < 0.01
        assert row.problem == ""
        assert 1 <= row.busiest <= 2
    assert rows[0].local_us != rows[1].local_us, "each routing has local work of its own"
    assert "collectives  chosen by auto" in about["exchanges"]
    assert about["sizes"] == REDUCED.over(2)._asdict()
    assert about["reduced"] is True
    assert "REDUCED to H=256, I=128, E=64; results are checked, times mean" in about["note"]
    assert about["command"] == f"python {' '.join(command)} --output={tmp_path}"
    assert about["started"][:2] == "20"
    assert about["config"].startswith("MoEConfig(top_k=8")
    assert (tmp_path / "parallel.png").stat().st_size > 1000


def test_ranks_that_cannot_share_the_experts_are_one_line(tmp_path):
    done = run("bench_main.py", "--ranks=3", f"--output={tmp_path}")
    assert done.returncode == 2
    assert "--ranks: expected a divisor of 64 experts, got 3" in done.stderr


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="they run there")
def test_exchanges_that_cannot_run_here_are_refused_first(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "devices_for", lambda _: None)  # JAX has started
    assert parallel.main(["--exchanges=auto,nvlink", f"--output={tmp_path / 'new'}"]) == 2
    said = "--exchanges: exchange='nvlink': needs backend 'mosaic', got 'xla'"
    assert capsys.readouterr() == ("", f"python -m bench.parallel: {said}\n")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("ranks", "started"), [(2, 2), (64, 64), (100_000, 64)])
def test_no_more_devices_are_started_than_there_are_experts(monkeypatch, ranks, started):
    config: dict[str, int] = {}
    update = types.SimpleNamespace(update=config.__setitem__)
    monkeypatch.setattr(parallel, "jax", types.SimpleNamespace(config=update))
    monkeypatch.setattr(environment, "has_gpu_driver", lambda: False)
    parallel.devices_for(ranks)
    assert config == {"jax_num_cpu_devices": started}


ROWS = [
    Row(4, 8, "collectives", "zipf", 2, 20.0, 15.0, busiest=1.5, error=0.001),
    Row(4, 17, "collectives", "zipf", 2, 30.0, 24.0, busiest=1.5, error=0.001),
    Row(4, 8, "nvlink", error=0.5, problem="wrong"),
]
ABOUT = {"device": {"kind": "H200", "platform": "gpu"}}


def test_a_plot_holds_every_point_and_names_every_routing():
    timed = [
        Row(4, tokens, "collectives", routing, pieces, layer_us=10.0, local_us=us)
        for routing, pieces, us in (("zipf", 1, 4.0), ("even", 1, 12.75), ("zipf", 2, 5.0))
        for tokens in (8, 17)
    ]
    figure = parallel_rows.drawn(timed, ABOUT)
    assert figure.get_suptitle() == "4 x H200"
    even, zipf = figure.axes
    assert (even.get_title(), zipf.get_title()) == ("even routing", "zipf routing")
    labels = ["collectives", "collectives, 2 pieces"]
    assert [[line.get_label() for line in one.lines] for one in (even, zipf)] == [
        labels[:1],
        labels,
    ]
    for axes in (even, zipf):
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        points = [point for line in axes.lines for point in line.get_xydata()]
        assert all(left < tokens < right and low < ratio < high for tokens, ratio in points)


def test_a_plot_of_reduced_sizes_says_so():
    about = {"device": {"kind": "cpu"}, "sizes": REDUCED.over(2)._asdict(), "reduced": True}
    figure = parallel_rows.drawn([Row(2, 8, "collectives", layer_us=2.0, local_us=1.0)], about)
    assert figure.get_suptitle().splitlines() == [
        "2 x cpu",
        "REDUCED sizes H=256 I=128 E=64 E_local=32: times mean nothing",
    ]
    assert figure.axes[0].get_xlim() == (4, 16)  # the one token count in the middle


def test_a_table_has_no_speed_for_a_wrong_result():
    _, right, _, wrong, problem = parallel_rows.table(ROWS)
    numbers = ["20.0", "15.0", "5.0", "1.333", "0.750", "1.50", "0.00100"]
    assert right.split() == ["collectives", "zipf", "4", "8", "2", *numbers]
    assert wrong.split() == ["nvlink", "even", "4", "8", "1", *["-"] * 6, "0.50000"]
    assert problem == "nvlink T=8 even: wrong"


def test_pieces_and_shapes_are_those_that_were_asked_for():
    mesh = parallel_inputs.mesh_of(1)
    specs = parallel_inputs.input_specs(mesh, 5, REDUCED)
    made = parallel_inputs.make_inputs(mesh, 5, REDUCED)
    for spec, array in zip(specs.arguments, made.arguments, strict=True):
        if array is not made.local_expert_offset:
            assert (spec.shape, spec.dtype) == (array.shape, array.dtype)
            assert spec.sharding.is_equivalent_to(array.sharding, array.ndim)
    assert [parallel_gpus.pieces_of(t) for t in (128, 1024, 8192)] == [(1,), (1, 2), (1, 2, 4)]


def test_a_row_says_how_many_pieces_were_run_and_is_measured_once():
    assert parallel_inputs.pieces_run(1, (2, 7)) == [1]
    assert parallel_inputs.pieces_run(17, (1, 4, 4, 7)) == [1, 4, 6]
    assert parallel_inputs.pieces_run(5, (4,)) == [3]
    assert parallel.token_counts("4,1,4") == (4, 1)
    assert parallel._names("zipf,even,zipf") == ("zipf", "even")


def test_zipf_wants_experts_in_proportion_to_one_over_their_place():
    drawn = parallel_inputs.draw("zipf", 4096, 64)
    first = np.bincount(drawn.logits.argmax(axis=-1).ravel(), minlength=64)  # top-1 of each token
    share = np.sort(first)[::-1] / first.sum()
    expected = 1 / np.arange(1, 65)
    np.testing.assert_allclose(share[:4], expected[:4] / expected.sum(), rtol=0.1)
    with pytest.raises(ValueError, match="expected some of even, captured, zipf, got 'one'"):
        parallel_inputs.draw("one", 4, 64)


def event(pid, tid, name, us):
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "dur": us}


def named(kind, pid, name, tid=0):
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


EVENTS = [
    named("process_name", 1, "/device:GPU:0"),
    named("process_name", 2, "/device:GPU:1"),
    named("process_name", 9, "/host:CPU"),
    named("thread_name", 1, "Stream #13(Compute)", 5),
    named("thread_name", 1, "XLA Ops", 6),
    named("thread_name", 2, "Stream #14(Compute)", 5),
    named("thread_name", 9, "Stream of consciousness", 5),
    *(event(1, 5, "up_projection", us) for us in (10.0, 11.0, 12.0)),
    event(1, 6, "fusion", 40.0),  # the same time again, by operation
    event(2, 5, "ncclDevKernel_AllGather", 30.0),
    event(9, 5, "up_projection", 99.0),
]


def test_a_trace_is_summed_up_by_kernel_and_rank():
    assert parallel_trace.by_kernel(EVENTS, calls=3) == [
        parallel_trace.KernelTime(0, "up_projection", 11.0, 1.0),
        parallel_trace.KernelTime(1, "ncclDevKernel_AllGather", 10.0, pytest.approx(1 / 3)),
    ]


def test_documents_are_made_of_what_there_is(tmp_path):
    """A run that was cut short: one layer, one check, a trace, a step without its file."""
    about = {"device": {"kind": "H200", "platform": "gpu"}, "versions": {"jax": "1"}}
    parallel_rows.write(ROWS, about, tmp_path / "layer_8" / "parallel.json")
    check = {"exchange": "nvlink", "tokens": 8, "runs": 100, "same_bits": False, "error": 0.5}
    moved = {"name": "all_gather", "bytes": 2048, "us": 20.0, "gb_s": 0.1024}
    trace = {"exchange": "nvlink", "tokens": 8, "trace": "trace_nvlink_8.json.gz"}
    files = {
        "check_nvlink": check | {"right": False},
        "primitives_nvlink": moved,
        "trace_nvlink_8": trace,
    }
    for name, row in files.items():
        parallel_documents.write_json({"about": about, "rows": [row]}, tmp_path / f"{name}.json")
    with gzip.open(tmp_path / trace["trace"], "wt") as file:
        json.dump({"traceEvents": EVENTS}, file)
    states = ("killed after 75 s", "ok")
    lines = [{"step": "layer_1", "state": state, "seconds": 75.0} for state in states]
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 0
    text = (tmp_path / "parallel_gpus.md").read_text()
    for line in (
        "# Expert parallelism over 4 x H200",
        "| collectives | zipf | 4 | 8 | 2 | 20.0 | 15.0 | 5.0 | 1.333 | 0.750 | 1.50 | 0.00100 |",
        "- nvlink T=8 even: wrong",
        "| check_nvlink | nvlink | 8 | 100 | **no** | 0.50000 | **no** |",
        "| all_gather | 2,048 | 20.0 | 0.1 |",
        "| `up_projection` | 1 | 11.0 | 0.0 |",
        "| layer_1 | results are gone | 75.0 |",
        "| layer_8 | not recorded | 0.0 |",
    ):
        assert line in text.splitlines()
    content = json.loads((tmp_path / "parallel_gpus.json").read_text())
    states = {step["step"]: step["state"] for step in content["steps"]}
    assert states.pop("layer_1") == "results are gone", "the last state of each was ok"
    assert set(states.values()) == {"not recorded"}
    assert (tmp_path / "parallel_gpus.png").stat().st_size > 1000


def test_the_text_is_there_without_a_plot_that_the_disk_has_no_room_for(
    tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    about = {"device": {"kind": "H200", "platform": "gpu"}, "versions": {"jax": "1"}}
    parallel_rows.write(ROWS, about, tmp_path / "layer_8" / "parallel.json")
    monkeypatch.setattr(parallel_rows, "plot", full)
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 1
    said = f"{tmp_path / 'parallel_gpus.png'}: cannot be written: No space left on device\n"
    assert capsys.readouterr().err == said
    assert "parallel_gpus.png" not in (tmp_path / "parallel_gpus.md").read_text()


def test_the_rest_is_there_without_matplotlib(tmp_path, monkeypatch, capsys):
    about = {"device": {"kind": "H200", "platform": "gpu"}, "versions": {"jax": "1"}}
    parallel_rows.write(ROWS, about, tmp_path / "layer_8" / "parallel.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import fails
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 0
    names = [tmp_path / f"parallel_gpus.{ending}" for ending in ("json", "png", "md")]
    needs = "not written: needs matplotlib (pip install matplotlib)"
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {names[0]}",
        f"{names[1]}: {needs}",
        f"wrote {names[2]}",
    ]
    assert "parallel_gpus.png" not in names[2].read_text()
    assert not parallel_rows.plot(ROWS[:1], about, tmp_path / "parallel.png")  # a single point
    assert capsys.readouterr().out == ""
    # What `bench.parallel` itself calls at its end.
    assert not parallel_rows.plot(ROWS, about, tmp_path / "parallel.png")
    assert capsys.readouterr().out == f"{tmp_path / 'parallel.png'}: {needs}\n"
    assert not (tmp_path / "parallel.png").exists()


def test_steps_of_several_commits_are_told_apart_also_from_the_json_file_alone(tmp_path):
    lines = []
    for tokens, commit in ((8, "aaaaaaa"), (4096, "bbbbbbb")):
        about = {"device": {"kind": "H200", "platform": "gpu"}, "git_commit": commit}
        row = Row(2, tokens, "nvlink", layer_us=20.0, local_us=15.0)
        parallel_rows.write([row], about, tmp_path / "run" / f"layer_{tokens}" / "parallel.json")
        lines.append(json.dumps({"step": f"layer_{tokens}", "state": "ok", "seconds": 3.0}))
    (tmp_path / "run" / "steps.jsonl").write_text("\n".join(lines))
    assert parallel_gpus.main([f"--output={tmp_path / 'run'}", "--documents"]) == 0
    texts = [(tmp_path / "run" / "parallel_gpus.md").read_text()]
    (tmp_path / "kept").mkdir()
    (tmp_path / "run" / "parallel_gpus.json").rename(tmp_path / "kept" / "parallel_gpus.json")
    assert parallel_gpus.main([f"--output={tmp_path / 'kept'}", "--documents"]) == 0
    texts.append((tmp_path / "kept" / "parallel_gpus.md").read_text())
    assert texts[0] == texts[1]
    for line in (
        "- Commit: aaaaaaa, bbbbbbb",
        "| layer_8 | ok | 3.0 | aaaaaaa |",
        "| layer_4096 | ok | 3.0 | bbbbbbb |",
    ):
        assert line in texts[0].splitlines()
    assert (tmp_path / "kept" / "parallel_gpus.png").stat().st_size > 1000


def test_on_a_machine_without_gpus_only_what_cpus_can_check(monkeypatch):
    names = {}
    for has_gpu in (False, True):
        monkeypatch.setattr(environment, "has_gpu_driver", lambda has=has_gpu: has)
        names[has_gpu] = [step.name for step in parallel_gpus.steps_of(pathlib.Path("out"), "")]
    assert set(names[False]) == set(parallel_gpus.WITHOUT_GPUS) < set(names[True])
    assert len(set(names[True])) == len(names[True])


def test_a_run_whose_steps_all_failed_is_a_document_too(tmp_path):
    line = {"step": "layer_1", "state": "killed after 75 s", "seconds": 75.0}
    line |= {"written": "2026-01-01T10:20:30+00:00", "arguments": ["-m", "x", "--step", "layer_1"]}
    (tmp_path / "steps.jsonl").write_text(json.dumps(line))
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 0
    text = (tmp_path / "parallel_gpus.md").read_text()
    assert text.startswith("# Expert parallelism over unknown devices\n\n**Incomplete**: 1 of 1 ")
    assert "- Date: 2026-01-01 10:20 UTC\n- Command: `python -m x`\n" in text


def test_on_a_full_disk_what_was_measured_is_shown(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    about = {"device": {"kind": "H200", "platform": "gpu"}, "versions": {"jax": "1"}}
    parallel_rows.write(ROWS, about, tmp_path / "layer_8" / "parallel.json")
    for module in (parallel_documents, parallel_rows):
        monkeypatch.setattr(module, "write_atomically", full)
    assert parallel_gpus.main([f"--output={tmp_path}", "--documents"]) == 1
    shown = capsys.readouterr()
    files = [str(tmp_path / f"parallel_gpus.{ending}") for ending in ("json", "png", "md")]
    said = "cannot be written: No space left on device"
    assert shown.err == "; ".join(f"{file}: {said}" for file in files) + "\n"
    assert "| collectives | zipf | 4 | 8 | 2 | 20.0 | 15.0 |" in shown.out


def test_a_step_on_two_cpu_devices_ends_in_a_document(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(environment, "has_gpu_driver", lambda: False)
    command = ["--ranks=2", "--only=primitives", "--minutes=2", f"--output={tmp_path}"]
    code = parallel_gpus.main(command)
    assert code == 0, (tmp_path / "primitives_collectives.log").read_text()
    content = json.loads((tmp_path / "parallel_gpus.json").read_text())
    names = ["nothing", "all_gather", "all_to_all", "reduce_scatter"]
    assert [(row["name"], row["bytes"]) for row in content["primitives"]] == [
        (name, size) for size in (1024, 4096) for name in names
    ]
    assert all(row["us"] > 0 for row in content["primitives"])
    assert {row["name"] for row in content["primitives"] if row["gb_s"] == 0} == {"nothing"}
    assert content["about"]["device"]["platform"] == "cpu"
    text = (tmp_path / "parallel_gpus.md").read_text()
    assert "**REDUCED sizes**: No GPU found" in text
    assert "- Sizes: REDUCED sizes H=256 I=128 E=64 E_local=32\n" in text
    command = f"`python -m bench.parallel_gpus --output {tmp_path} --ranks 2 --minutes 2"
    command += " --only primitives`"
    assert command in " ".join(text.split())
    assert f"- Date: {content['about']['started'][:10]}" in text


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 8])
def test_all_that_cpu_devices_can_check(tmp_path, ranks):
    done = run("-m", "bench.parallel_gpus", f"--ranks={ranks}", f"--output={tmp_path}", "--jobs=4")
    assert done.returncode == 0, done.stdout
    content = json.loads((tmp_path / "parallel_gpus.json").read_text())
    assert [step["state"] for step in content["steps"]] == ["ok"] * 4
    assert all(check["right"] for check in content["checks"])
    assert {(row["pieces"], row["routing"]) for row in content["layers"]} == {
        (pieces, routing) for pieces in (1, 2) for routing in parallel_inputs.ROUTINGS
    }
    assert content["traces"][0]["kernels"] == [], "CPU devices have no streams"
