"""`--model`: a rank of another model is measured with its own sizes and router, and said so."""

from __future__ import annotations

import re

import jax
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from bench import comparison, documents, header, routing, session, solutions
from bench.results import Results
from bench.settings import Settings
from bench.workloads import FULL, REDUCED, WORKLOADS, select, sizes_of
from interop.host_routing import topk_ids
from jax_moe import models
from jax_moe.models import DEEPSEEK_V3, MODELS

on_cpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs at reduced size")


def test_the_default_is_the_definition():
    chosen = Settings(("jax_moe",))
    assert chosen.sizes == FULL == (256, 32, 7168, 2048)
    assert chosen.measured is DEEPSEEK_V3
    assert Settings(("jax_moe",), on_gpu=False).sizes == REDUCED == (64, 8, 256, 128)
    assert "--model" not in chosen.command()


def test_a_command_names_another_model():
    assert "--model=kimi-k2" in Settings(("jax_moe",), model="kimi-k2").command().split()


def test_a_command_of_one_row_has_no_option_that_its_solution_does_not_take():
    options = {"precision": "high", "backend": "xla", "batch_invariant": True, "seed": 3}
    chosen = Settings(("jax_moe", "jax_v1"), **options)
    ours = {"--precision=high", "--backend=xla", "--batch_invariant"}
    for solution, expected in ((None, ours), ("jax_moe", ours), ("jax_v1", set())):
        words = set(chosen.command(solution, WORKLOADS[0]).split())
        assert words & ours == expected
        assert "--seed=3" in words


def test_a_rank_may_hold_other_experts_than_an_eighth():
    chosen = Settings(("jax_moe",), model="qwen3-30b", num_local_experts=128)
    assert chosen.sizes == (128, 128, 2048, 768)
    assert {chosen.sizes.offset(workload) for workload in WORKLOADS} == {0}
    assert "--num_local_experts=128" in chosen.command().split()
    half = Settings(("jax_moe",), num_local_experts=128).sizes
    assert {half.offset(workload) for workload in WORKLOADS} == {0, 128}


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_workload_has_a_rank_of_every_model(model, reduced):
    sizes = sizes_of(model, reduced=reduced)
    for workload in WORKLOADS:
        first = sizes.offset(workload)
        assert first % sizes.num_local_experts == 0
        assert 0 <= first <= sizes.num_experts - sizes.num_local_experts
    assert {size % 128 for size in sizes[2:]} == {0}


NAMES = ("kimi-k2", "qwen3-30b", "ling-1t", "longcat-flash", "mixtral-8x7b")


@pytest.mark.parametrize("name", NAMES)
def test_a_draw_asks_of_the_rank_what_the_model_would(name):
    model = models.get(name)
    (workload,) = select(["901"])
    sizes = sizes_of(model)
    drawn = routing.draw(workload, sizes, 0, model=model)
    assert drawn.logits.shape == (901, model.num_experts)
    assert bool(np.asarray(drawn.bias, np.float32).any()) == (model.scoring == "sigmoid")
    load = routing.local_load(drawn, workload, sizes, model.config)
    expected = 901 * model.top_k * model.num_local_experts / model.num_experts
    assert 0.5 * expected < load.pairs < 2 * expected


@pytest.mark.parametrize("name", NAMES)
def test_patterns_give_each_token_one_local_expert(name):
    model = models.get(name)
    (workload,) = select(["901"])
    sizes = sizes_of(model)
    for pattern in routing.PATTERNS[1:]:
        drawn = routing.draw(workload, sizes, 0, pattern, model)
        load = routing.local_load(drawn, workload, sizes, model.config)
        assert (load.pairs, load.tokens) == (901, 901), pattern


def test_what_knows_the_definition_only_is_not_available_for_other_models():
    for name, one in solutions.registry("xla", models.get("kimi-k2")).items():
        reason = one.unavailable_reason() or ""
        ours = name.startswith(("jax_moe", "mosaic_interpreted", "jax_ragged_dot"))
        ours |= name in ("deepgemm", "deepgemm64", "deepgemm128")
        assert reason.startswith("not for this model: ") != ours, name
        assert ours or reason.endswith("got kimi-k2")
    for one in solutions.registry("xla", DEEPSEEK_V3).values():
        assert "not for this model" not in (one.unavailable_reason() or "")


def test_a_stand_in_is_named_until_the_layer_can_do_it():
    for model in MODELS:
        said = header.stand_in(Settings(("jax_moe",), model=model.name))
        assert bool(said) == bool(model.unsupported)
        assert all(f"{field}=" in said for field in model.unsupported)


@on_cpu
@pytest.mark.parametrize("name", ["qwen3-30b", pytest.param("hy3", marks=pytest.mark.slow)])
def test_a_run_of_another_model(tmp_path, capsys, name):
    chosen = Settings(
        solutions=("torch_reference", "jax_moe_xla", "jax_ragged_dot"),
        workloads=("7",),
        model=name,
        warmup=1,
        iterations=1,
        num_trials=1,
        timer="wall",
        on_gpu=False,
        output=tmp_path / "out",
    )
    assert session.execute(chosen, documents.Options(report=True)) == session.OK
    shown = capsys.readouterr().out
    model = models.get(name)
    assert f"one rank of {name}, routed as `{model.config}`" in shown
    assert f"E={model.num_experts}, E_local={model.num_local_experts}" in shown
    assert "skipped: torch_reference: not for this model: " in shown
    assert "2 of 2 rows PASS" in shown
    for document in ("results.md", "comparison_report.md"):
        text = (chosen.output / document).read_text()
        assert (f"**Stand-in for {name}**" in text) == bool(model.unsupported)
        assert f"rank of {name}" in text
    assert "\nThe reference was not timed, so there are no speedups.\n" in text
    assert not re.search(r"\n### [^\n]*\n\n#", text), "a heading over nothing"


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_the_host_counts_the_experts_that_the_layer_chooses(scoring):
    config = jax_moe.MoEConfig(top_k=6, n_group=1, topk_group=1, scoring=scoring)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((50, 64)).astype(np.float32)
    bias = (rng.standard_normal(64) / 4).astype(ml_dtypes.bfloat16)
    layer = jax_moe.route(logits, bias, 1.0, config=config, backend="xla")
    np.testing.assert_array_equal(topk_ids(logits, bias, config), layer.topk_ids)


@pytest.mark.parametrize(
    ("capability", "backend"), [("9.0", "mosaic"), ("8.9", "triton"), (None, "xla")]
)
def test_a_report_has_the_designs_of_the_device_that_was_measured(tmp_path, capability, backend):
    """Documents may be written again on another machine."""
    device = {"kind": "a device", "platform": "gpu", "compute_capability": capability}
    about = {"device": device, "versions": {}}
    results = Results(tmp_path / "results.json", about, "wall")
    designs = comparison.designs_of(results, Settings(("jax_moe",)))
    assert designs["jax_moe"] == designs[f"jax_moe_{backend}"]
    assert designs["jax_moe_mosaic"] != designs["jax_moe_xla"]
