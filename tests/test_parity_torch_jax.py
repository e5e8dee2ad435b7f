"""The same inputs through PyTorch and JAX on a CPU: routing, quantization, stages, the layer."""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax_moe  # noqa: E402
from interop import to_jax, to_torch, torch_definition, torch_moe  # noqa: E402
from interop.workloads import captured_routing, workloads  # noqa: E402
from tests import numpy_oracle  # noqa: E402
from tests.moe_inputs import array_arguments, scalar_arguments  # noqa: E402
from tests.torch_inputs import (  # noqa: E402
    bits,
    matched_ratio,
    quantize,
    relative_error,
    to_tensor,
    torch_inputs,
)

TWO_ULP = 2 * np.spacing(np.float32(5.0))  # the captured scores lie near 5
XLA = {"backend": "xla"}


def routed(num_tokens: int, seed: int):
    """Captured-like routing through both frameworks, and the gap that decides each token."""
    logits, bias = captured_routing(num_tokens, np.random.default_rng(seed))
    ids, weights = torch_definition.route(to_tensor(logits), to_tensor(bias), 2.5)
    ours = jax_moe.route(logits, bias, 2.5, **XLA)
    gaps = numpy_oracle.routing_gaps(logits, bias, jax_moe.DEEPSEEK_V3)
    return ids.numpy(), weights.numpy(), np.asarray(ours[0]), np.asarray(ours[1]), gaps


def test_experts_agree_outside_of_near_ties():
    ids, _, ours, _, gaps = routed(2000, seed=0)
    same = (np.sort(ids, axis=1) == np.sort(ours, axis=1)).all(axis=1)
    assert same[gaps > TWO_ULP].all()
    assert (gaps > TWO_ULP).mean() > 0.95


def test_exact_ties_go_to_the_lowest_id_in_both():
    logits = np.zeros((3, 64), np.float32)
    logits[1, 5], logits[2] = 1.0, -40.0
    bias = np.zeros(64, np.float32)
    ids, _ = torch_definition.route(to_tensor(logits), to_tensor(bias), 1.0)
    ours = jax_moe.route(logits, bias, 1.0, **XLA).topk_ids
    np.testing.assert_array_equal(ids.numpy(), np.asarray(ours))
    np.testing.assert_array_equal(ids[0].numpy(), np.arange(8))
    np.testing.assert_array_equal(ids[1].numpy(), [5, 0, 1, 2, 3, 4, 6, 7])


def test_weights_agree_to_1e_6():
    ids, weights, our_ids, our_weights, _ = routed(2000, seed=1)
    same = (ids == our_ids).all(axis=1)
    assert same.mean() > 0.95
    np.testing.assert_allclose(our_weights[same], weights[same], rtol=1e-6)


def test_nan_logits_follow_the_same_rule():
    logits = np.random.default_rng(2).standard_normal((40, 64)).astype(np.float32)
    logits[0], logits[1, ::2], logits[2, :9] = np.nan, np.nan, np.inf
    bias = np.zeros(64, np.float32)
    ids, weights = torch_definition.route(to_tensor(logits), to_tensor(bias), 1.0)
    ours = jax_moe.route(logits, bias, 1.0, **XLA)
    np.testing.assert_array_equal(ids.numpy(), np.asarray(ours.topk_ids))
    np.testing.assert_array_equal(
        np.isnan(weights.numpy()), np.isnan(np.asarray(ours.topk_weights))
    )


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 2.0**-130])
def test_quantization_is_bit_equal(scale):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(3)) * scale
    x[3, :128] = 0.0
    x[4, 5], x[5, 6] = float("nan"), float("inf")
    values, scales = quantize(x)
    ours = jax_moe.quantize(to_jax(x), **XLA)
    finite = torch.isfinite(scales.t()).repeat_interleave(128, dim=1)
    np.testing.assert_array_equal(bits(values)[finite], bits(to_torch(ours.values))[finite])
    np.testing.assert_array_equal(scales.numpy(), np.asarray(ours.scales))


def test_each_stage_stays_within_its_bound():
    inputs = torch_inputs(70)
    _, _, hidden, hidden_scale, w13, s13, w2, s2, offset, _ = inputs.arguments
    arrays = jax_moe.LayerInputs.of(
        *map(to_jax, array_arguments(inputs)), *scalar_arguments(inputs)
    )
    routing = jax_moe.route(
        arrays.routing_logits, arrays.routing_bias, arrays.routed_scaling_factor, **XLA
    )
    weights = arrays.weights
    counts = {"num_local_experts": 8, "num_experts": 64}
    plan = jax_moe.plan_groups(routing.topk_ids, offset, **counts, **XLA)
    activations = jax_moe.up_project(
        arrays.hidden_states,
        arrays.hidden_states_scale,
        weights.gemm1_weights,
        weights.gemm1_weights_scale,
        plan,
        **XLA,
    )
    outputs = jax_moe.down_project(
        activations, weights.gemm2_weights, weights.gemm2_weights_scale, plan, **XLA
    )
    result = to_torch(jax_moe.unpermute(outputs, routing.topk_weights, plan, **XLA))

    pair_row = torch.tensor(np.asarray(plan.pair_row)).long()
    token, choice = (pair_row >= 0).nonzero(as_tuple=True)
    row = pair_row[token, choice]
    expert = torch.tensor(np.asarray(routing.topk_ids)).long()[token, choice] - offset
    x = hidden.float().view(70, -1, 128) * hidden_scale.t()[:, :, None]

    def matmul(rows: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        dense = [torch_definition.dequantize(weights[e], scales[e]) for e in range(8)]
        return torch.stack([r @ dense[e].t() for r, e in zip(rows, expert, strict=True)])

    gemm1 = matmul(x.flatten(1)[token], w13, s13)
    up, gate = gemm1.chunk(2, dim=1)
    swiglu = gate * torch.sigmoid(gate) * up
    values = to_torch(activations.values)[row].float().view(len(row), -1, 128)
    dequantized = (values * to_torch(activations.scales).t()[row][:, :, None]).flatten(1)
    assert relative_error(dequantized, swiglu) < 0.03

    gemm2 = matmul(dequantized, w2, s2)
    assert relative_error(to_torch(outputs)[row], gemm2) < 0.004

    weights = torch.tensor(np.asarray(routing.topk_weights))[token, choice]
    combined = torch.zeros(70, 256).index_add_(0, token, gemm2 * weights[:, None])
    assert relative_error(result, combined) < 0.006


@pytest.mark.parametrize("row", workloads(), ids=lambda row: f"T={row.num_tokens}")
def test_the_layer_meets_the_published_tolerance(row):
    """The 19 workloads with their token counts; sizes reduced, the same routing group local.

    The small ones are the live rows of one padded size, which compiles once.
    """
    rows = max(row.num_tokens, 80)
    inputs = torch_inputs(rows, offset=row.local_expert_offset // 4, seed=row.num_tokens)
    found = torch_moe(*inputs.arguments, num_tokens=row.num_tokens, **XLA)
    assert not found[row.num_tokens :].any()
    found = found[: row.num_tokens]
    expected = torch_definition.run(*inputs.arguments)[: row.num_tokens]
    assert matched_ratio(found, expected) >= 0.93
    idle = ~expected.any(dim=1)
    assert torch.equal(found[idle], expected[idle])
    if not idle.all():
        assert relative_error(found, expected) < 0.05


def test_ids_are_the_same_under_jit():
    logits, bias = captured_routing(100, np.random.default_rng(7))
    eager = jax_moe.route(logits, bias, 2.5, **XLA)
    jitted = jax.jit(lambda *a: jax_moe.route(*a, **XLA))(logits, bias, 2.5)
    np.testing.assert_array_equal(np.asarray(eager.topk_ids), np.asarray(jitted.topk_ids))
