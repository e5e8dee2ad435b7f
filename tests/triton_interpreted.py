"""The Triton kernels around the matmuls in Triton's own CPU interpreter (`triton_on_cpu`)."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

import jax_moe
from interop.triton_launch import launch_torch
from jax_moe import DEEPSEEK_V3, GroupPlan, MoEConfig
from pallas_kernels.triton import group_quant
from tests import numpy_oracle, triton_on_cpu
from tests.moe_inputs import bits
from tests.triton_on_cpu import plan_of, route, run, to_torch

pytestmark = triton_on_cpu.QUIET
mended_interpreter = triton_on_cpu.mended_interpreter

TINY = float(np.finfo(np.float32).tiny)
# ---- quantization ----


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("rows", "scale_format"), [(1, "f32"), (33, "f32"), (33, "ue8m0")])
def test_quantize_equals_numpy_to_the_bit(dtype, rows, scale_format):
    x = np.random.default_rng(rows).standard_normal((rows, 256)).astype(dtype)
    values, scales = run(group_quant.launch(to_torch(x), scale_format))
    expected_values, expected_scales = numpy_oracle.quantize(x, scale_format)
    np.testing.assert_array_equal(bits(scales), bits(expected_scales))
    np.testing.assert_array_equal(bits(values), bits(expected_values))


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
def test_quantize_at_the_edges(scale_format):
    edges = [447.9, 448, 464, 465, 1e30, 3.4e38, 1e-30, TINY, -TINY, TINY / 2, 1e-45, -0.0, 0.0]
    edges += [448 * (1 + 2**-23), 448 * (1 - 2**-24)]
    x = np.zeros((len(edges) + 3, 128), np.float32)
    x[: len(edges), :2] = np.array(edges, np.float32)[:, None]
    x[: len(edges), 2], x[0, 3] = 1.0, -448.0
    x[len(edges) :, 5] = np.nan, np.inf, -np.inf
    values, scales = run(group_quant.launch(to_torch(x), scale_format))
    finite = slice(0, len(edges))
    expected_values, expected_scales = numpy_oracle.quantize(x[finite], scale_format)
    np.testing.assert_array_equal(bits(scales[:, finite]), bits(expected_scales))
    np.testing.assert_array_equal(bits(values[finite]), bits(expected_values))
    dequantized = values.astype(np.float32) * scales.T
    assert np.isnan(dequantized[len(edges) :]).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_quantize_to_f16_equals_the_plain_backend_to_the_bit(dtype):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((35, 256)) * 10.0 ** rng.integers(-37, 38, (35, 1))
    x = x.astype(np.float32)
    x[0], x[1, 5], x[2, 7], x[3, 9] = 0, np.inf, np.nan, -np.inf
    x[4, 3], x[5, 200] = np.finfo(np.float32).max, -np.finfo(np.float32).max
    x[6, ::2], x[7, ::2] = TINY, TINY / 2
    x = x.astype(dtype)
    values, scales = run(group_quant.launch(to_torch(x), precision="high"))
    expected = jax_moe.quantize(x, precision="high", backend="xla")
    np.testing.assert_array_equal(bits(scales), bits(expected.scales))
    is_nan = np.isnan(np.asarray(expected.values, np.float32))
    np.testing.assert_array_equal(np.isnan(values), is_nan)
    np.testing.assert_array_equal(bits(values)[~is_nan], bits(expected.values)[~is_nan])


# ---- routing ----


@pytest.mark.parametrize(
    ("num_experts", "config"),
    [
        (256, DEEPSEEK_V3),
        (72, MoEConfig(top_k=3, n_group=3, topk_group=2)),
        (16, MoEConfig(top_k=8, n_group=4, topk_group=2)),
        (1, MoEConfig(top_k=1)),
    ],
)
def test_routing_equals_the_plain_backend(num_experts, config):
    rng = np.random.default_rng(0)
    logits = np.round(rng.standard_normal((8, num_experts)) * 8).astype(np.float32) / 8
    bias = np.where(np.arange(num_experts) % 3, 0.25, 0.5).astype(ml_dtypes.bfloat16)
    logits[3, 1::2], logits[4], logits[5, :3], logits[6] = np.nan, np.nan, np.inf, -1e4
    ids, weights = route(logits, bias, 2.5, config)
    expected = jax_moe.route(logits, bias, 2.5, config=config, backend="xla")
    np.testing.assert_array_equal(ids, expected.topk_ids)
    np.testing.assert_allclose(weights, expected.topk_weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("num_experts", "has_bias", "config"),
    [
        (72, False, MoEConfig(3, 3, 2, scoring="softmax")),
        (40, True, MoEConfig(4, scoring="softmax", renormalize=False)),
        (16, True, MoEConfig(8, 4, 2, scoring="sqrtsoftplus")),
        (64, False, MoEConfig(4, 4, 2, scoring="sqrtsoftplus")),
        (64, False, MoEConfig(4, 4, 2)),
    ],
)
def test_other_routers_equal_the_plain_backend(num_experts, has_bias, config):
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((7, num_experts)) * 3).astype(np.float32)
    logits[0] = np.round(logits[0] * 8) / 8  # ties
    logits[1, 1::2], logits[2], logits[3, :3] = np.nan, np.nan, np.inf
    logits[4] *= np.float32(1e-40)
    group = num_experts // config.n_group
    logits[5, :group], logits[5, 1] = np.nan, 9  # its group's sum is no number
    bias = (rng.standard_normal(num_experts) / 10).astype(np.float32) if has_bias else None
    ids, weights = route(logits, bias, 2.5, config)
    expected = jax_moe.route(logits, bias, 2.5, config=config, backend="xla")
    np.testing.assert_array_equal(ids, expected.topk_ids)
    np.testing.assert_allclose(weights, expected.topk_weights, rtol=1e-6)


# ---- group plan ----


def expected_plan(topk_ids, offset, num_local_experts, block_m, rows):
    """The definition, pair by pair."""
    row_token = np.full(rows, -1, np.int32)
    pair_row = np.full(topk_ids.shape, -1, np.int32)
    sizes, offsets, tile_expert, row = [], [], np.zeros(rows // block_m, np.int32), 0
    for expert in range(num_local_experts):
        chosen = topk_ids == offset + expert
        tokens = np.flatnonzero(chosen.any(axis=1))
        for place, token in enumerate(tokens, row):
            row_token[place], pair_row[token, chosen[token]] = token, place
        sizes.append(len(tokens))
        offsets.append(row)
        tiles = -(-len(tokens) // block_m)
        tile_expert[row // block_m :][:tiles] = expert
        row += tiles * block_m
    return GroupPlan(sizes, offsets, row_token, pair_row, tile_expert, [row // block_m])


def draw_ids(rng, num_tokens, top_k, num_experts):
    return rng.random((num_tokens, num_experts)).argsort(axis=1)[:, :top_k].astype(np.int32)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_local", "num_experts", "offset", "block_m"),
    [
        (1, 8, 32, 256, 32, 16),
        (37, 8, 32, 256, 0, 16),
        (300, 8, 32, 64, 32, 64),
        (301, 3, 5, 5, 0, 16),
        (33, 8, 256, 256, 0, 16),
        (90, 16, 300, 512, 150, 16),
        (3, 130, 200, 200, 0, 16),  # more choices than pairs are read at a time
    ],
)
def test_plan_equals_its_definition(num_tokens, top_k, num_local, num_experts, offset, block_m):
    topk_ids = draw_ids(np.random.default_rng(num_tokens), num_tokens, top_k, num_experts)
    topk_ids[num_tokens // 2 :: 5, 0] = -1
    topk_ids[::3, -1] = topk_ids[::3, 1]
    found = plan_of(topk_ids, offset, num_local, num_experts, block_m)
    expected = expected_plan(topk_ids, offset, num_local, block_m, len(found.row_token))
    for name, a, b in zip(GroupPlan._fields, found, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("num_tokens", [20, 60])
@pytest.mark.parametrize("top_k", [4, 8])
def test_pairs_of_a_token_with_one_id_share_a_row(num_tokens, top_k):
    topk_ids = np.random.default_rng(0).integers(-1, 6, (num_tokens, top_k)).astype(np.int32)
    found = plan_of(topk_ids, 1, 4, 6, 16)
    expected = expected_plan(topk_ids, 1, 4, 16, len(found.row_token))
    for name, a, b in zip(GroupPlan._fields, found, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("num_tokens", [20, 600])
@pytest.mark.parametrize("expert", [0, 31])
def test_plan_of_one_expert_that_takes_all_and_of_none(num_tokens, expert):
    topk_ids = np.full((num_tokens, 1), expert, np.int32)
    for offset in (0, 32):
        found = plan_of(topk_ids, offset, 32, 64, 16)
        expected = expected_plan(topk_ids, offset, 32, 16, len(found.row_token))
        for name, a, b in zip(GroupPlan._fields, found, expected, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_no_tokens_launch_nothing():
    empty = torch.empty((0, 256), dtype=torch.float32)
    values, scales = launch_torch(group_quant.launch(empty))
    assert values.shape == (0, 256)
    assert scales.shape == (2, 0)
    plan = plan_of(np.zeros((0, 8), np.int32), 0, 4, 16, 16)
    assert not plan.group_sizes.any()
    assert plan.num_tiles == 0


def test_a_strided_tensor_is_refused():
    with pytest.raises(ValueError, match="input 0: expected a contiguous tensor"):
        launch_torch(group_quant.launch(torch.zeros((256, 256)).T))


def test_jax_runs_on_the_cpu_here():
    assert jax.default_backend() == "cpu"
