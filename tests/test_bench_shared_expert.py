"""`bench_main.py --shared_expert`: its forms are one layer, its costs differences of times."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import gpu_clock, shared_expert
from bench.workloads import FULL, Sizes, sizes_of
from interop.solutions import deepgemm_dense
from jax_moe import LayerWeights, models
from tests.moe_inputs import make_inputs

torch = pytest.importorskip("torch")

from interop import torch_definition  # noqa: E402

FORMS_OF = shared_expert.forms
SIZES = Sizes(num_experts=64, num_local_experts=8, hidden_size=256, intermediate_size=128)


@pytest.fixture(scope="module")
def layer() -> shared_expert.Layer:
    """One whose shared expert alone is there: the forms are replaced."""
    config = shared_expert.layer_config(models.DEEPSEEK_V3, SIZES)
    weights = make_inputs(1, num_local_experts=1).weights
    shared = jax.tree.map(jnp.asarray, weights)
    whole = LayerWeights(experts=shared, gate_weight=jnp.zeros((8, 256)), shared_experts=shared)
    return shared_expert.Layer(whole, whole, config)


@pytest.fixture(autouse=True)
def forms(monkeypatch, request) -> dict[str, float]:
    """What each form multiplies its input by; a layer compiles for seconds."""
    factors = {"without": 2.0, "with": 3.0, "fused": 3.01, "alone": 1.0}

    def made(_, x):
        return {name: (lambda x, f=factor: x * f, (x,)) for name, factor in factors.items()}

    if request.function is not test_the_command_checks_and_writes:
        monkeypatch.setattr(shared_expert, "forms", made)
    return factors


@pytest.fixture
def deep_gemm(monkeypatch) -> list[tuple[int, ...]]:
    """In place of the package: a float32 product that checks how it is called."""
    calls: list[tuple[int, ...]] = []

    def fp8_gemm_nt(a, b, out, compiled_dims):
        (values, scales), (weights, weights_scale) = a, b
        assert compiled_dims == "nk"
        assert all(one.is_contiguous() for one in (values, weights, weights_scale, out))
        assert scales.shape == (len(values), values.shape[1] // 128)
        # Column-major, each column at a multiple of 16 bytes: DeepGEMM copies anything else.
        assert scales.stride(1) == -(-len(values) // 4) * 4
        assert len(values) == 1 or scales.stride(0) == 1
        rows = values.float().view(len(values), -1, 128) * scales[:, :, None]
        out.copy_(rows.flatten(1) @ torch_definition.dequantize(weights, weights_scale).t())
        calls.append((*values.shape, weights.shape[0]))

    package = types.ModuleType("deep_gemm")
    package.fp8_gemm_nt = fp8_gemm_nt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", package)
    here = dataclasses.replace(deepgemm_dense.SOLUTION, unavailable_reason=lambda: None)
    monkeypatch.setattr(deepgemm_dense, "SOLUTION", here)
    return calls


class Clock:
    """Spans in the order of the forms; each call runs."""

    def __init__(self) -> None:
        self.spans = [100.0, 130.0, 120.0, 25.0, 40.0] * 5

    def time(self, execution, calls):
        execution.block(execution.call())
        kernels = (gpu_clock.Kernel("k", 0.0, 1.0),) * 2
        return [gpu_clock.Sample(self.spans.pop(0), 1, kernels)] * calls


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5])
def test_scales_lie_as_tma_reads_them(deep_gemm, num_tokens):
    inputs = make_inputs(num_tokens, num_local_experts=1)
    given = (inputs.hidden_states, inputs.hidden_states_scale, *inputs.weights)
    values, scales, *weights = (torch.tensor(np.asarray(one, np.float32)) for one in given)
    aligned = deepgemm_dense.tma_aligned(scales)
    assert torch.equal(aligned, scales.t())
    deepgemm_dense.gemm(values, aligned, weights[0][0], weights[1][0])  # which looks at strides
    assert deep_gemm == [(num_tokens, 256, 256)]


def test_costs_are_differences(layer, deep_gemm):
    row = shared_expert.measure(7, layer, Clock())
    assert row.problem == ""
    assert 0 < row.error < 0.01
    assert (row.without_us, row.with_us, row.fused_us, row.alone_us) == (100, 130, 120, 25)
    assert (row.cost_us, row.fused_cost_us, row.gemms_us, row.gemms_kernels) == (30, 20, 40, 2)
    assert row.ratio == 0.5
    assert shared_expert.table([row])[-1].split()[-1] == "0.50"
    assert set(deep_gemm) == {(7, 256, 256), (7, 128, 256)}


def test_a_wrong_product_is_no_peer(layer):
    output = jnp.ones((3, 256), jnp.bfloat16)
    with pytest.raises(ValueError, match="deepgemm_dense: relative error"):
        shared_expert.check_dense(output, output, layer)


def test_a_wrong_form_has_no_time(layer, forms):
    forms["fused"] = 3.1
    row = shared_expert.measure(1, layer, Clock())
    assert (row.problem, row.with_us, row.ratio) == ("wrong", None, None)
    assert shared_expert.table([row])[-1] == "T=1: wrong"


def test_a_rank_gets_its_share_of_the_pairs():
    for name, experts, pairs in (("deepseek-v3", 32, 1), ("kimi-k2", 48, 1), ("glm-5", 32, 1)):
        model = models.get(name)
        config = shared_expert.layer_config(model, sizes_of(model))
        assert (config.num_experts, config.router.top_k) == (experts, pairs)
        assert config.shared_intermediate_size == model.intermediate_size


def test_the_forms_are_traced_at_full_size():
    config = shared_expert.layer_config(models.DEEPSEEK_V3, FULL)

    def outputs():
        layer = shared_expert.make_layer(config)
        x = jnp.zeros((64, 7168), jnp.bfloat16)
        return {name: f(*arguments) for name, (f, arguments) in FORMS_OF(layer, x).items()}

    found = jax.eval_shape(outputs)
    assert set(found) == {"without", "with", "fused", "alone"}
    assert {(one.shape, str(one.dtype)) for one in found.values()} == {((64, 7168), "bfloat16")}


def test_the_record_says_where_it_comes_from(tmp_path, monkeypatch, capsys, layer):
    monkeypatch.setattr(shared_expert, "make_layer", lambda _: layer)
    assert shared_expert.run("deepseek-v3", (3,), tmp_path) == 0
    about = json.loads((tmp_path / "shared_expert.json").read_text())["about"]
    assert about["sizes"] == SIZES._asdict()
    assert about["reduced"] is True
    assert "REDUCED to H=256, I=128, E=64; results are checked, nothing" in about["note"]
    assert about["note"] in capsys.readouterr().out
    assert {"started", "command"} <= set(about)


@pytest.mark.slow
def test_the_command_checks_and_writes(tmp_path, capsys):
    assert shared_expert.main(["--tokens=3", f"--output={tmp_path}"]) == 0
    assert "nothing is timed" in capsys.readouterr().out
    found = json.loads((tmp_path / "shared_expert.json").read_text())
    (row,) = found["rows"]
    assert (row["tokens"], row["problem"], row["with_us"], row["ratio"]) == (3, "", None, None)
    assert row["error"] < 0.01
    assert found["about"]["model"] == "deepseek-v3"
    assert found["about"]["complete"] is True
    assert found["about"]["config"]["num_experts"] == 8


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model=qwen3-235b", "--model: expected one with shared experts, got qwen3-235b"),
        ("--model=none", "model: expected one of"),
        ("--tokens=0", "--tokens"),
    ],
)
def test_bad_flags_are_refused(flag, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        shared_expert.main([flag, f"--output={tmp_path}"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
