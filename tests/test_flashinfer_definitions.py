"""flashinfer-bench's other definitions: their data, our reference and solution, a folder each."""

from __future__ import annotations

import json
import pathlib
import re
import runpy
import shutil

import jax
import numpy as np
import pytest

import jax_moe
from interop import definitions
from jax_moe import models
from tests.moe_inputs import relative_error

torch = pytest.importorskip("torch")

import interop  # noqa: E402
from interop import dataset, torch_oracle  # noqa: E402
from interop.flashinfer_bench import __main__, export, run, solutions, traces  # noqa: E402
from interop.solutions import packages  # noqa: E402

OTHERS = definitions.ALL[1:]
MODELS = {  # of the tag, where the definition has the model's sizes
    "deepseek-v3": "deepseek-v3",
    "kimi-k2": "kimi-k2",
    "minimax-m2": "minimax-m2",
    "qwen3-235b-a22b": "qwen3-235b",
    "qwen3-30b-a3b": "qwen3-30b",
    "qwen3-next-80b-a3b": "qwen3-next",
}
NOT_THE_MODELS = {  # as published: a mistaken I, and a quarter of the experts
    "moe_fp8_block_scale_ds_routing_topk8_ng1_kg1_e256_h3072_i8192": "intermediate_size",
    "moe_fp8_block_scale_renorm_topk10_e128_h2048_i512": "num_experts",
}


@pytest.mark.parametrize("definition", definitions.ALL, ids=lambda one: one.name)
def test_the_layer_takes_each_definitions_inputs(definition):
    shapes = definition.shapes(64)
    specs = {
        name: jax.ShapeDtypeStruct(shapes[name], one["dtype"])
        for name, one in definition.record["inputs"].items()
    }
    constants = {"routing_bias": None, **definition.scalars}
    config = jax_moe.MoEConfig(**definition.router)
    out = jax.eval_shape(
        lambda specs: jax_moe.apply(**(constants | specs), config=config, backend="xla"), specs
    )
    assert list(definition.record["inputs"]) == [n for n in definition.arguments if n in specs]
    (output,) = definition.record["outputs"].values()
    sizes = definition.sizes(64)
    assert out.shape == tuple(sizes[axis] for axis in output["shape"])
    assert out.dtype == output["dtype"]


@pytest.mark.parametrize("definition", definitions.ALL, ids=lambda one: one.name)
def test_names_sizes_and_models_agree(definition):
    sizes = definition.sizes(1)
    named = {key: int(n) for key, n in re.findall(r"_(topk|ng|kg|e|h|i)(\d+)", definition.name)}
    found = {
        "topk": definition.router["top_k"],
        "ng": definition.router["n_group"],
        "kg": definition.router["topk_group"],
        "e": definition.num_local_experts,
        "h": sizes["hidden_size"],
        "i": sizes["intermediate_size"],
    }
    assert named == {key: found[key] for key in named}
    assert {"topk", "e", "h", "i"} <= set(named)
    assert sizes["gemm1_out_size"] == 2 * sizes["intermediate_size"]
    for blocks, size in (("hidden", "hidden"), ("intermediate", "intermediate")):
        assert sizes[f"num_{blocks}_blocks"] * 128 == sizes[f"{size}_size"]
    assert sizes["num_gemm1_out_blocks"] * 128 == sizes["gemm1_out_size"]
    (tag, *_) = (t[6:] for t in definition.record["tags"] if t.startswith("model:"))
    model = models.get(MODELS[tag])
    ours = {
        "num_experts": definition.num_experts,
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
    } | dict(definition.router)
    differing = [name for name, value in ours.items() if getattr(model, name) != value]
    assert differing == [name for name in [NOT_THE_MODELS.get(definition.name)] if name]
    assert definition.scalars["routed_scaling_factor"] == model.routed_scaling_factor


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("export")
    assert export.export_each(root, [one.name for one in (*OTHERS, OTHERS[0])]) == [
        root / one.name for one in OTHERS
    ]
    return root


def drawn(definition, num_tokens, **small):
    """Inputs as flashinfer-bench draws them, of a small layer."""
    torch.manual_seed(0)
    sizes = definition.sizes(num_tokens) | small
    values = {"local_expert_offset": 40, "routed_scaling_factor": 2.5}
    inputs = definition.record["inputs"]
    for name, one in inputs.items():
        if one["shape"] is not None:
            value = torch.randn([sizes[axis] for axis in one["shape"]])
            dtype = getattr(torch, one["dtype"])
            values[name] = (value.clamp(-2, 2) if dtype.itemsize == 1 else value).to(dtype)
    return {name: values[name] for name in inputs}


SMALL = {
    "num_experts": 64,
    "hidden_size": 256,
    "intermediate_size": 128,
    "gemm1_out_size": 256,
    "num_hidden_blocks": 2,
    "num_intermediate_blocks": 1,
    "num_gemm1_out_blocks": 2,
}


def runs(definition, root, tmp_path, change):
    """`run` of the reference and of the solution, each from its exported source alone."""
    (path,) = root.glob("definitions/**/*.json")
    reference = json.loads(path.read_text())["reference"]
    assert "interop" not in reference
    solution = solutions.records(definition)[0]["sources"][0]["content"]
    found = []
    for name, source in (("reference.py", reference), ("main.py", change(solution))):
        (tmp_path / name).write_text(source)
        found.append(runpy.run_path(str(tmp_path / name))["run"])
    return found


def small_inputs(definition):
    local = 24 if definition.num_local_experts < definition.num_experts else SMALL["num_experts"]
    inputs = drawn(definition, 33, **SMALL, num_local_experts=local)
    every = {} if local < SMALL["num_experts"] else {"local_expert_offset": 0}
    return inputs | {name: value for name, value in every.items() if name in inputs}


@pytest.fixture
def no_stream(monkeypatch):
    stream = type("Stream", (), {"synchronize": lambda self: None})
    monkeypatch.setattr(torch.cuda, "current_stream", stream)


@pytest.mark.parametrize("definition", OTHERS, ids=lambda one: one.name)
def test_the_solution_calls_the_layer_that_the_reference_is(
    exported, definition, monkeypatch, tmp_path, no_stream
):
    """With the PyTorch oracle in place of our layer, the two are equal."""

    def layer(*arguments, config, backend):
        assert backend == "mosaic"
        return torch_oracle.layer(*arguments, **config.routing_options)

    monkeypatch.setattr(interop, "torch_moe", layer)
    root = exported / definition.name
    reference, solution = runs(definition, root, tmp_path, lambda source: source)
    inputs = small_inputs(definition)
    expected = reference(**inputs)
    assert (expected.shape, expected.dtype) == ((33, 256), torch.bfloat16)
    assert expected.float().abs().max() > 1
    assert torch.equal(solution(**inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("index", [1, 5, 8])
def test_solution_and_reference_agree(exported, index, tmp_path, no_stream):
    """The solution with the backend that a CPU has."""
    definition = definitions.ALL[index]
    root = exported / definition.name
    reference, solution = runs(
        definition, root, tmp_path, lambda source: source.replace("mosaic", "xla")
    )
    inputs = small_inputs(definition)
    found, expected = (run(**inputs).float().numpy() for run in (solution, reference))
    assert relative_error(found, expected) < 0.04


def test_workloads_are_read_back(exported):
    for definition in OTHERS:
        root = exported / definition.name
        assert dataset.definition_of(root) is definition
        rows = dataset.read_workloads(root, definition)
        assert [row.workload.num_tokens for row in rows] == [1, 64, 1024]
        assert not any(row.blobs for row in rows)
        assert {row.routed_scaling_factor for row in rows} == {
            definition.scalars["routed_scaling_factor"]
        }
        assert set(traces.read_solutions(root)) == {"jax_moe_mosaic", "jax_moe_mosaic_high"}
        assert not (root / "blob").exists()
        text = (root / "README.md").read_text()
        assert definition.source in text
        assert f"{definition.weight_bytes / 1e9:.1f} GB" in text


def test_traces_of_another_definition_are_read(exported, tmp_path):
    definition = OTHERS[-1]
    root = tmp_path / definition.name
    shutil.copytree(exported / definition.name, root)
    (path,) = root.glob("workloads/**/*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (root / "traces").mkdir()
    measured = {
        "solution": "jax_moe_mosaic",
        "evaluation": {
            "status": "PASSED",
            "environment": {"hardware": "NVIDIA H100"},
            "timestamp": "2026-01-01T00:00:00",
            "performance": {
                "latency_ms": 0.5,
                "reference_latency_ms": 10.0,
                "speedup_factor": 20.0,
            },
        },
    }
    text = "".join(json.dumps(line | measured) + "\n" for line in lines)
    (root / "traces" / path.name).write_text(text)
    found = traces.read_traces(root)
    assert found.definition is definition
    assert {uuid: row.latency_ms for uuid, row in found.results["jax_moe_mosaic"].items()} == {
        "T1": 0.5,
        "T64": 0.5,
        "T1024": 0.5,
    }


def test_a_random_input_that_comes_from_a_file_is_refused(exported, tmp_path):
    definition = OTHERS[-1]
    (path,) = (exported / definition.name).glob("workloads/**/*.jsonl")
    line = json.loads(path.read_text().splitlines()[0])
    line["workload"]["inputs"]["routing_logits"]["type"] = "safetensors"
    (tmp_path / "workloads").mkdir()
    (tmp_path / "workloads" / path.name).write_text(json.dumps(line))
    with pytest.raises(ValueError, match="routing_logits: expected type 'random', got 'safet"):
        dataset.read_workloads(tmp_path, definition)


def test_the_data_sets_of_a_folder_run_one_after_another(exported, monkeypatch):
    commands = []

    def start(command, env, check):
        commands.append(command)
        return type("Done", (), {"returncode": len(commands) == 2})

    monkeypatch.setattr(run, "_is_installed", lambda: True)
    monkeypatch.setattr(run, "git_commit", lambda: "abc")
    monkeypatch.setattr(packages, "hopper_unavailable", lambda: None)
    monkeypatch.setattr(run.subprocess, "run", start)
    assert __main__.main(["run", str(exported), "--tokens=64", "--num-trials=1"]) == 1
    assert [c[c.index("--definitions") + 1] for c in commands] == [one.name for one in OTHERS]
    for command in commands:
        first = command.index("--solutions") + 1
        assert command[first : command.index("--warmup-runs")] == ["jax_moe_mosaic"]
        assert command[command.index("--num-trials") + 1] == "1"


def test_a_folder_of_data_sets_is_written_and_listed(tmp_path, capsys):
    names = ",".join(one.name for one in OTHERS[-2:])
    assert __main__.main(["export", str(tmp_path), f"--definitions={names}"]) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == sorted(names.split(","))
    assert __main__.main(["export", str(tmp_path / "x"), "--definitions=mla"]) == 2
    assert "unknown definition 'mla'; `python -m interop" in capsys.readouterr().err
    flags = ["export", str(tmp_path), f"--definitions={OTHERS[0].name}", "--dataset=x"]
    assert __main__.main(flags) == 2
    assert "--dataset: has workloads of moe_fp8" in capsys.readouterr().err
    assert __main__.main(["report", str(tmp_path)]) == 2  # one without traces stops no other
    assert capsys.readouterr().err.count(" with a measured trace") == 2
    assert __main__.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(one.name in shown and one.source in shown for one in definitions.ALL)


def test_the_real_package_accepts_the_folders(exported, monkeypatch, tmp_path):
    pytest.importorskip("flashinfer_bench")
    from flashinfer_bench.bench.evaluators import resolve_evaluator
    from flashinfer_bench.compile import BuilderRegistry
    from flashinfer_bench.data import TraceSet

    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path))
    registry = BuilderRegistry.get_instance()
    for ours in OTHERS:
        found = TraceSet.from_path(str(exported / ours.name))
        definition = found.definitions[ours.name]
        assert [line.workload.axes["seq_len"] for line in found.workloads[ours.name]] == [
            1, 64, 1024,
        ]  # fmt: skip
        assert len(found.solutions[ours.name]) == 2
        for solution in found.solutions[ours.name]:
            registry.build(definition, solution)
        registry.build_reference(definition)
        assert ("LowBit" in resolve_evaluator(definition).__name__) == ours.name.startswith("moe")


def test_interop_says_which_definition_is_the_default():
    assert definitions.DEFAULT.is_default
    assert definitions.DEFAULT.reference() == pathlib.Path(interop.__path__[0]).joinpath(
        "torch_definition.py"
    ).read_text("utf-8")
    assert np.unique([one.name for one in definitions.ALL]).size == 9
