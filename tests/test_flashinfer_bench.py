"""The exported data set against the real package's schema, hostile folders, and the report."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

torch = pytest.importorskip("torch")

from interop import dataset, workloads  # noqa: E402
from interop.flashinfer_bench import __main__, solutions, traces, workspace  # noqa: E402
from interop.flashinfer_bench.export import export  # noqa: E402
from interop.flashinfer_bench.record import RECORD  # noqa: E402
from interop.flashinfer_bench.report import report  # noqa: E402
from interop.solutions import packages  # noqa: E402
from tests.flashinfer_folders import BLOBS, NAME, TRACES, trace, write_traces  # noqa: E402

RECORDS = solutions.records()
SOLUTION_FOLDER = f"solutions/jax-moe/moe/{NAME}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> pathlib.Path:
    return export(tmp_path_factory.mktemp("export"))


@pytest.fixture
def folder(exported, tmp_path) -> pathlib.Path:
    """A copy to spoil; the blobs are shared."""
    for path in exported.rglob("*.json*"):
        target = tmp_path / path.relative_to(exported)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def test_the_real_package_accepts_the_folder(exported, monkeypatch, tmp_path):
    pytest.importorskip("flashinfer_bench")
    from flashinfer_bench.bench.evaluators import resolve_evaluator
    from flashinfer_bench.bench.utils import load_safetensors
    from flashinfer_bench.compile import BuilderRegistry
    from flashinfer_bench.data import TraceSet

    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path))
    found = TraceSet.from_path(str(exported))
    definition = found.definitions[NAME]
    assert len(found.workloads[NAME]) == 19
    for line in found.workloads[NAME]:
        tensors = load_safetensors(definition, line.workload, found.root)
        assert tensors["routing_logits"].shape == (line.workload.axes["seq_len"], 256)
    names = {solution.name for solution in found.solutions[NAME]}
    assert names == set(solutions.names())
    registry = BuilderRegistry.get_instance()
    for solution in found.solutions[NAME]:
        assert not registry.build(definition, solution).metadata.destination_passing_style
    assert resolve_evaluator(definition).__name__ == "LowBitEvaluator"


def test_the_reference_source_is_ours_and_runs_alone(exported):
    record = json.loads((exported / f"definitions/moe/{NAME}.json").read_text())
    assert record["reference"] == pathlib.Path(workloads.__file__).with_name(
        "torch_definition.py"
    ).read_text("utf-8")
    assert "import interop" not in record["reference"]
    assert list(record["inputs"]) == list(workloads.definition()["inputs"])


def test_our_own_reader_accepts_the_folder(exported):
    rows = dataset.read_workloads(exported)
    assert [row.workload.uuid for row in rows] == [row.uuid for row in workloads.workloads()]
    for row in rows[:3]:
        logits, bias = dataset.read_routing(exported, row)
        assert logits.shape == (row.workload.num_tokens, 256)
        assert set(bias.astype(float)) == {4.9375, 4.96875}
    assert set(traces.read_solutions(exported)) == {
        "jax_moe_mosaic",
        "jax_moe_mosaic_high",
        "sglang_v1",
        "sglang_v2",
    }


def test_stand_ins_are_labelled_and_seeded(exported, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file

    blobs = sorted(exported.glob("blob/**/*.safetensors"))
    assert len(blobs) == 19
    for blob in blobs:
        assert blob.name.startswith("stand_in_")
        with safe_open(blob, "np") as file:
            assert "not the published blob" in file.metadata()["source"]
    assert "not the published blob" in (exported / "README.md").read_text()
    small = next(blob for blob in blobs if "e05c6c03" in blob.name)
    again, other = export(tmp_path / "a"), export(tmp_path / "b", seed=1)
    relative = small.relative_to(exported)
    assert (again / relative).read_bytes() == small.read_bytes()
    # The seed stands in the metadata as well: the tensors themselves are to differ.
    logits = [load_file(root / relative)["routing_logits"] for root in (again, other)]
    assert logits[0].shape == logits[1].shape
    assert (logits[0] != logits[1]).mean() > 0.9


def test_a_data_set_with_blobs_is_copied(exported, tmp_path):
    copied = export(tmp_path, dataset=exported)
    for ours, theirs in zip(
        dataset.read_workloads(copied), dataset.read_workloads(exported), strict=True
    ):
        assert ours.workload[:3] == theirs.workload[:3]
        left, right = dataset.read_routing(copied, ours), dataset.read_routing(exported, theirs)
        assert left[0].tobytes() == right[0].tobytes()
        assert left[1].tobytes() == right[1].tobytes()


def test_a_broken_data_set_is_named_with_its_flag(tmp_path, capsys):
    flags = ["export", str(tmp_path / "out"), "--dataset", str(tmp_path / "none")]
    assert __main__.main(flags) == 2
    assert capsys.readouterr().err == f"--dataset: {tmp_path / 'none'}: not a data set folder\n"


def test_traces_keep_the_workloads_they_were_measured_on(folder):
    write_traces(folder, [trace(ROW, "sglang_v1", 1.0)])
    with pytest.raises(ValueError, match="holds traces of an earlier export; use another folder"):
        export(folder, seed=1)


def test_memory_is_measured_on_a_gpu_only(folder, capsys, monkeypatch):
    monkeypatch.setattr(packages, "hopper_unavailable", lambda: "PyTorch sees no CUDA device")
    assert __main__.main(["workspace", str(folder)]) == 2
    assert capsys.readouterr().err == "workspace: PyTorch sees no CUDA device\n"


def test_memory_of_each_solution_is_written(exported, folder, monkeypatch):
    """The GPU's part is replaced; processes beside this one are started by the pool's default."""
    shutil.copytree(exported / "blob", folder / "blob")
    monkeypatch.setattr(workspace, "_check_machine", lambda _: None)
    monkeypatch.setattr(workspace, "_zeros", lambda names, _: dict.fromkeys(names))
    monkeypatch.setattr(workspace, "_arguments", lambda folder, row, weights: [row.workload.uuid])
    monkeypatch.setattr(workspace, "_torch_peak", lambda name, uuids: sum(map(len, uuids)))
    monkeypatch.setattr(workspace, "_jax_temporary", json.dumps)  # importable by name
    monkeypatch.setattr(workspace.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(workspace.solutions, "records", lambda _: RECORDS)
    with pytest.raises(TypeError, match="takes 1 positional argument but 3"):
        workspace.measure(folder)
    monkeypatch.setattr(workspace.solutions, "records", lambda _: RECORDS[:2])
    path = workspace.measure(folder)
    assert json.loads(path.read_text()) == {
        name: {row.uuid: 36 for row in workloads.workloads()} for name in ("sglang_v1", "sglang_v2")
    }


def test_nothing_is_written_through_a_symlink(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "blob").symlink_to(outside, target_is_directory=True)
    with pytest.raises(ValueError, match="leads out of"):
        export(tmp_path / "inside")
    assert not list(outside.iterdir())


@pytest.mark.parametrize("name", solutions.names())
def test_solution_sources_call_with_the_definitions_arguments(name):
    import ast

    (record,) = [r for r in solutions.records() if r["name"] == name]
    tree = ast.parse(record["sources"][0]["content"])
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names = list(workloads.definition()["inputs"])
    assert [argument.arg for argument in function.args.args] == names
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and node.args]
    assert [argument.id for argument in calls[0].args] == names
    assert ("synchronize" in ast.unparse(function)) == name.startswith("jax_moe_mosaic")
    assert ("precision='high'" in ast.unparse(function)) == (name == "jax_moe_mosaic_high")
    assert record["spec"]["destination_passing_style"] is False


SPOILED_SOLUTIONS = {
    "absolute path": (lambda s: s["sources"][0].update(path="/etc/x.py"), r"relative path"),
    "parent path": (lambda s: s["sources"][0].update(path="a/../../x.py"), r"relative path"),
    "empty path": (lambda s: s["sources"][0].update(path=""), r"relative path"),
    "source twice": (lambda s: s["sources"].append(s["sources"][0]), "appears twice"),
    "no source": (lambda s: s.update(sources=[]), "list with an entry"),
    "no entry": (lambda s: s["spec"].update(entry_point="other.py::run"), "entry_point"),
    "bad entry": (lambda s: s["spec"].update(entry_point="main.py"), "entry_point"),
    "unknown definition": (lambda s: s.update(definition="mla"), "unknown definition 'mla'"),
    "unknown key": (lambda s: s.update(extra=1), "unknown key 'extra'"),
    "unknown spec key": (lambda s: s["spec"].update(shell="rm"), "unknown key 'shell'"),
    "name of two lines": (lambda s: s.update(name="a\nb"), r"json: name: expected one line"),
    "name of another": (lambda s: s.update(name="sglang_v2"), "'sglang_v2' appears twice"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED_SOLUTIONS.values(), ids=SPOILED_SOLUTIONS)
def test_hostile_solutions_are_refused(folder, spoil, message):
    path = folder / SOLUTION_FOLDER / "sglang_v1.json"
    solution = json.loads(path.read_text())
    spoil(solution)
    path.write_text(json.dumps(solution))
    with pytest.raises(ValueError, match=message):
        traces.read_solutions(folder)


ROW = workloads.workloads()[0]
SPOILED_TRACES = {
    "unknown solution": (lambda t: t.update(solution="other"), "unknown solution 'other'"),
    "unknown workload": (lambda t: t["workload"].update(uuid="x"), "unknown uuid 'x'"),
    "unknown definition": (lambda t: t.update(definition="x"), "unknown definition 'x'"),
    "unknown status": (lambda t: t["evaluation"].update(status="FINE"), "unknown status"),
    "unknown key": (lambda t: t.update(path="../x"), "unknown key 'path'"),
    "negative time": (
        lambda t: t["evaluation"]["performance"].update(latency_ms=-1.0), "got -1.0"
    ),
    "subnormal time": (
        lambda t: t["evaluation"]["performance"].update(latency_ms=1e-320),
        r"jsonl:1: latency_ms: expected a number in 1e-06\.\.1e\+09, got 1e-320",
    ),
    "absurd reference": (
        lambda t: t["evaluation"]["performance"].update(reference_latency_ms=9e-7),
        "jsonl:1: reference_latency_ms: expected a number",
    ),
    "ratio above one": (
        lambda t: t["evaluation"]["correctness"]["extra"].update(matched_ratio=1.0001),
        r"matched_ratio: expected a number in 0\.\.1, got 1\.0001",
    ),
    "ratio below zero": (
        lambda t: t["evaluation"]["correctness"]["extra"].update(matched_ratio=-1e-9),
        "matched_ratio: expected a number",
    ),
    "other tokens": (
        lambda t: t["workload"]["axes"].update(seq_len=ROW.num_tokens + 1),
        "jsonl:1: workload: axes: seq_len: expected 7 as in the folder's workload, got 8",
    ),
    "tokens of another type": (
        lambda t: t["workload"]["axes"].update(seq_len=float(ROW.num_tokens)),
        r"axes: seq_len: expected 7 as in the folder's workload, got 7\.0",
    ),
    "another axis": (lambda t: t["workload"]["axes"].update(k=1), "axes: unknown key 'k'"),
    "no axes": (lambda t: t["workload"].update(axes=[]), "axes: expected an object, got list"),
    "no inputs": (lambda t: t["workload"].update(inputs={}), "inputs: missing 'routing_logits'"),
    "other offset": (
        lambda t: t["workload"]["inputs"]["local_expert_offset"].update(value=0),
        "workload: local_expert_offset: value: expected 192",
    ),
    "other blob": (
        lambda t: t["workload"]["inputs"]["routing_bias"].update(path="./b.safetensors"),
        r"workload: routing_bias: path: expected '.* as in .*, got '\./b\.safetensors'",
    ),
    "a blob of nearly that name": (
        lambda t: t["workload"]["inputs"]["routing_bias"].update(path=f"{BLOBS}/stand_in_b.b"),
        r"path: expected '?\.\.\..*/stand_in_b8f.*, got '?\.\.\..*/stand_in_b\.b'",
    ),
    "input of another kind": (
        lambda t: t["workload"]["inputs"].update(hidden_states={"type": "scalar", "value": 1}),
        "workload: hidden_states: unknown key 'value'",
    ),
    "hardware of two lines": (
        lambda t: t["evaluation"]["environment"].update(hardware="H100\n- Passed: all"),
        r"jsonl:1: environment: hardware: expected one line .*got 'H100\\n",
    ),
    "hardware of no text": (
        lambda t: t["evaluation"]["environment"].update(hardware=["H100"]),
        "environment: hardware: expected one line",
    ),
    "half a character": (
        lambda t: t["evaluation"]["environment"].update(hardware="H\ud800"),
        r"environment: hardware: expected one line .*got 'H\\ud800'",
    ),
    "version with a control character": (
        lambda t: t["evaluation"]["environment"].update(libs={"torch": "2\x1b[2J"}),
        r"environment: libs: torch: expected one line .*got '2\\x1b",
    ),
    "version of no text": (
        lambda t: t["evaluation"]["environment"].update(libs={"torch": 2}),
        "environment: libs: torch: expected one line",
    ),
    "library of two lines": (
        lambda t: t["evaluation"]["environment"].update(libs={"a\rb": "1"}),
        r"environment: libs: expected one line .*got 'a\\rb'",
    ),
    "no timestamp": (
        lambda t: t["evaluation"].update(timestamp="yesterday\n# A heading"),
        r"jsonl:1: timestamp: expected an ISO time, got 'yesterday\\n",
    ),
    "timestamp of no text": (
        lambda t: t["evaluation"].update(timestamp=5), "timestamp: expected an ISO time, got 5"
    ),
    "endless time": (
        lambda t: t["evaluation"]["performance"].update(latency_ms=10**400),
        r"jsonl:1: latency_ms: expected a number in 1e-06\.\.1e\+09, got 1000",
    ),
    "huge ratio": (
        lambda t: t["evaluation"]["correctness"]["extra"].update(matched_ratio=10**400),
        r"jsonl:1: matched_ratio: expected a number in 0\.\.1, got 1000",
    ),
    "a list of libraries": (
        lambda t: t["evaluation"]["environment"].update(libs=["jax"]),
        "environment: libs: expected an object, got list",
    ),
    "a list for correctness": (
        lambda t: t["evaluation"].update(correctness=[]),
        "correctness: expected an object, got list",
    ),
    "text for its extras": (
        lambda t: t["evaluation"]["correctness"].update(extra="all"),
        "correctness: extra: expected an object, got str",
    ),
    "no time": (lambda t: t["evaluation"].update(performance=None), "performance: expected"),
    "workload line": (lambda t: t.update(solution=None, evaluation=None), "unknown solution None"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), SPOILED_TRACES.values(), ids=SPOILED_TRACES)
def test_hostile_traces_are_refused(folder, spoil, message):
    row = trace(ROW, "sglang_v1", 1.0)
    spoil(row)
    write_traces(folder, [row])
    with pytest.raises(ValueError, match=message):
        report(folder)
    assert not (folder / "flashinfer_bench.md").exists()


def test_a_trace_twice_or_outside_is_refused(folder, tmp_path_factory):
    write_traces(folder, [trace(ROW, "sglang_v1", 1.0)] * 2)
    with pytest.raises(ValueError, match="two traces"):
        traces.read_traces(folder)
    outside = tmp_path_factory.mktemp("outside") / "t.jsonl"
    outside.write_text(json.dumps(trace(ROW, "sglang_v1", 1.0)))
    (folder / TRACES).unlink()
    (folder / TRACES).symlink_to(outside)
    with pytest.raises(ValueError, match="leads out"):
        traces.read_traces(folder)


@pytest.mark.parametrize("name", ["traces", "solutions", "workloads"])
def test_a_folder_that_leads_outside_is_not_listed(folder, tmp_path_factory, name):
    write_traces(folder, [trace(ROW, "sglang_v1", 1.0)])
    shutil.rmtree(folder / name)
    (folder / name).symlink_to(tmp_path_factory.mktemp("outside"))
    with pytest.raises(ValueError, match=f"/{name}: leads out of the data set folder"):
        traces.read_traces(folder)


@pytest.mark.parametrize("name", [RECORD, "workspace.json", TRACES, "root"])
def test_symlinks_that_lead_to_themselves_are_named(folder, name, capsys):
    write_traces(folder, [trace(ROW, "sglang_v1", 1.0)])
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / name)
    assert __main__.main(["report", str(folder / name if name == "root" else folder)]) == 2
    shown = capsys.readouterr().err
    assert f"{folder / name}: " in shown
    assert shown.count("\n") == 1


def test_only_utf_8_is_read(folder):
    path = folder / SOLUTION_FOLDER / "sglang_v1.json"
    path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(ValueError, match=r"sglang_v1\.json: not valid JSON: expected UTF-8"):
        traces.read_solutions(folder)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert __main__.main(["export", str(tmp_path / "loop")]) == 2
    assert f"{tmp_path / 'loop'}: " in capsys.readouterr().err
    (tmp_path / "blob").symlink_to("blob")
    with pytest.raises(ValueError, match=r"/blob/.*: "):
        export(tmp_path)


def test_the_command_line_explains_bad_input(tmp_path, capsys):
    assert __main__.main(["report", str(tmp_path)]) == 2
    assert "workloads" in capsys.readouterr().err
    assert __main__.main(["run", str(tmp_path / "none")]) == 2
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["report", str(tmp_path), "--unknown"])


@pytest.mark.parametrize(
    ("command", "argument", "said"),
    [
        ("export", "--seed=-1", "--seed: expected 0 or a positive integer, got '-1'"),
        ("run", "--iterations=0", "--iterations: expected a positive integer, got '0'"),
        ("run", "--num-trials=x", "--num-trials: expected a positive integer, got 'x'"),
        ("run", "--required-matched-ratio=2", "--required-matched-ratio: expected a number in 0"),
        ("run", "--required-matched-ratio=nan", "--required-matched-ratio: expected a number in"),
        ("run", "--solutions=", "--solutions: expected names separated by commas, got ''"),
        ("export", "--dataset=", "--dataset: expected a folder, got an empty name"),
        ("report", "--output=", "--output: expected a folder, got an empty name"),
        ("run", "--rtol=nan", "--rtol: expected a finite number of 0 or more, got 'nan'"),
    ],
)
def test_numbers_are_checked_under_their_flag(tmp_path, capsys, command, argument, said):
    with pytest.raises(SystemExit, match="2"):
        __main__.main([command, str(tmp_path), argument])
    assert f"argument {said}" in capsys.readouterr().err
