"""Every Triton kernel in Triton's own CPU interpreter, launched from PyTorch.

Runs in a process of its own, with TRITON_INTERPRET=1 set before Triton is imported:
`tests/test_triton_interpreter.py` starts it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import jax_moe
from interop.triton_launch import launch_torch
from jax_moe import DEEPSEEK_V3, GroupPlan, MoEConfig, Quantized
from pallas_kernels.triton import down_projection, group_quant, routing, unpermute, up_projection
from pallas_kernels.triton import plan as plan_kernels
from pallas_kernels.triton.grouped_matmul import MatmulConfig
from tests import numpy_oracle
from tests.moe_inputs import SMALL, bits, make_inputs, relative_error, replaced

# The interpreter computes with NumPy, which remarks on every infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TINY = float(np.finfo(np.float32).tiny)
_NUMPY_TYPES = {
    "fp8e4nv": ml_dtypes.float8_e4m3fn,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp32": np.float32,
}


@pytest.fixture(autouse=True)
def _mended_interpreter(monkeypatch):
    """Two faults of Triton 3.6's interpreter: rounding that loses the carry, old NumPy scalars."""

    def convert(data, source, target, _rounding_mode):
        values = data.view(_NUMPY_TYPES[source.name]).astype(np.float32)
        return values.astype(_NUMPY_TYPES[target.name]).view(f"u{target.primitive_bitwidth // 8}")

    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)


def to_torch(array):
    array = np.ascontiguousarray(array)
    name = array.dtype.name
    if name in ("float8_e4m3fn", "bfloat16"):
        return torch.from_numpy(bits(array).copy()).view(getattr(torch, name))
    return torch.from_numpy(array.copy())


def to_numpy(tensor):
    name = str(tensor.dtype).removeprefix("torch.")
    if name in ("float8_e4m3fn", "bfloat16"):
        raw = tensor.view(torch.uint8 if name == "float8_e4m3fn" else torch.uint16)
        return raw.numpy().view(getattr(ml_dtypes, name))
    return tensor.numpy()


def run(launch):
    return [to_numpy(out) for out in launch_torch(launch)]


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


# ---- routing ----


def route(logits, bias, factor, config):
    factor = torch.tensor(factor, dtype=torch.float32)
    bias = None if bias is None else to_torch(bias)
    return run(routing.launch(to_torch(logits), bias, factor, **config.routing_options))


@pytest.mark.parametrize(
    ("num_experts", "config"),
    [
        (256, DEEPSEEK_V3),
        (72, MoEConfig(top_k=3, n_group=3, topk_group=2)),
        (16, MoEConfig(top_k=8, n_group=4, topk_group=2)),
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


def plan_of(topk_ids, offset, num_local_experts, num_experts, block_m):
    sizes = {"num_local_experts": num_local_experts, "num_experts": num_experts}
    arrays = (to_torch(topk_ids), torch.tensor(offset, dtype=torch.int32))
    counts = None
    if not plan_kernels.is_counted_by_all(*topk_ids.shape):
        (counts,) = launch_torch(plan_kernels.count_launch(*arrays, **sizes))
    return GroupPlan(*run(plan_kernels.plan_launch(*arrays, counts, block_m=block_m, **sizes)))


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


# ---- matmuls and unpermute ----


def layer(inputs, config, tiling, num_sms=2, **epilogue):
    """The stages one after the other, and what came out of each."""
    x, x_scale, w13, s13, w2, s2 = (
        to_torch(a) for a in (inputs.hidden_states, inputs.hidden_states_scale, *inputs.weights)
    )
    ids, weights = route(
        inputs.routing_logits, inputs.routing_bias, inputs.routed_scaling_factor, config
    )
    plan = plan_of(
        ids, inputs.local_expert_offset, len(w13), inputs.routing_logits.shape[1], tiling.block_m
    )
    tiles = (to_torch(plan.tile_expert), to_torch(plan.num_tiles))
    limits = {"config": tiling, "num_sms": num_sms}
    up = launch_torch(
        up_projection.launch(
            x, x_scale, w13, s13, to_torch(plan.row_token), *tiles, **limits, **epilogue
        )
    )
    (down,) = launch_torch(down_projection.launch(*up, w2, s2, *tiles, **limits))
    (out,) = run(unpermute.launch(down, to_torch(weights), to_torch(plan.pair_row)))
    return plan, [to_numpy(a) for a in up], to_numpy(down), out


@pytest.mark.parametrize(
    ("tiling", "hidden_size", "intermediate_size", "epilogue"),
    [
        (MatmulConfig(16), 384, 256, {}),
        (MatmulConfig(16, swap_ab=True), 384, 256, {"swiglu_limit": 0.75}),
        (MatmulConfig(32, programs_per_sm=1, swap_ab=True), 256, 128, {"scale_format": "ue8m0"}),
    ],
)
def test_stages_equal_the_plain_backend(tiling, hidden_size, intermediate_size, epilogue):
    inputs = make_inputs(
        21, num_experts=32, num_local_experts=4, hidden_size=hidden_size,
        intermediate_size=intermediate_size, offset=8,
    )  # fmt: skip
    plan, up, down, out = layer(inputs, SMALL, tiling, **epilogue)
    on_jax = GroupPlan(*map(jnp.asarray, plan))
    live = plan.row_token >= 0
    expected = jax_moe.up_project(
        inputs.hidden_states,
        inputs.hidden_states_scale,
        inputs.weights.gemm1_weights,
        inputs.weights.gemm1_weights_scale,
        on_jax,
        backend="xla",
        **epilogue,
    )
    assert relative_error(up[1][:, live], np.asarray(expected.scales)[:, live]) < 1e-5
    dequantized, expected_dequantized = (
        q.values.astype(np.float32) * np.repeat(np.asarray(q.scales).T, 128, axis=1)
        for q in (Quantized(*up), Quantized(*map(np.asarray, expected)))
    )
    assert relative_error(dequantized[live], expected_dequantized[live]) < 1e-3
    up = Quantized(*map(jnp.asarray, up))
    expected = np.asarray(
        jax_moe.down_project(
            up,
            inputs.weights.gemm2_weights,
            inputs.weights.gemm2_weights_scale,
            on_jax,
            backend="xla",
        ),
        np.float32,
    )
    assert relative_error(down[live].astype(np.float32), expected[live]) < 4e-3
    expected = jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla", **epilogue)
    assert relative_error(out, expected) < 4e-3
    assert not bits(out)[(plan.pair_row < 0).all(axis=1)].any()


@pytest.mark.parametrize("swap_ab", [False, True])
def test_distinct_scales_and_exact_values_are_exact(swap_ab):
    """Powers of two per (row, block) and small integers: nothing rounds before the bf16 store."""
    rng = np.random.default_rng(5)
    rows, hidden_size, intermediate_size, experts = 32, 384, 256, 2
    values = rng.integers(-2, 3, (rows, intermediate_size)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.exp2(rng.integers(-3, 4, (2, rows))).astype(np.float32) * rng.choice(
        [-1, 1], (2, rows)
    )
    weights = np.zeros((experts, hidden_size, intermediate_size), np.float32)
    weights[..., ::37] = rng.integers(-2, 3, weights[..., ::37].shape)
    weights_scale = np.exp2(rng.integers(-2, 3, (experts, 3, 2))).astype(np.float32)
    launch = down_projection.launch(
        *map(to_torch, (values, scales.astype(np.float32))),
        to_torch(weights.astype(ml_dtypes.float8_e4m3fn)),
        to_torch(weights_scale),
        to_torch(np.array([1, 0], np.int32)),
        to_torch(np.array([2], np.int32)),
        config=MatmulConfig(16, swap_ab=swap_ab),
        num_sms=1,
    )
    (found,) = run(launch)
    x = values.astype(np.float64) * np.repeat(scales.T, 128, axis=1)
    w = weights * np.repeat(np.repeat(weights_scale, 128, axis=1), 128, axis=2)
    expected = np.concatenate([x[:16] @ w[1].T, x[16:] @ w[0].T]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("epilogue", [{}, {"swiglu_limit": 0.75, "scale_format": "ue8m0"}])
def test_nan_stays_with_its_token_and_its_expert(epilogue):
    inputs = make_inputs(
        13, num_experts=16, num_local_experts=4, hidden_size=128, intermediate_size=128, offset=4
    )
    clean_plan, _, _, clean = layer(inputs, SMALL, MatmulConfig(16, swap_ab=True), **epilogue)
    poisoned = replaced(
        inputs,
        hidden_states_scale=inputs.hidden_states_scale.copy(),
        gemm1_weights_scale=inputs.weights.gemm1_weights_scale.copy(),
    )
    poisoned.hidden_states_scale[:, 0] = np.nan  # padding rows read token 0
    poisoned.weights.gemm1_weights_scale[2] = np.nan
    _, _, _, out = layer(poisoned, SMALL, MatmulConfig(16, swap_ab=True), **epilogue)
    first, last = clean_plan.group_offsets[2:4]
    reached = np.isin(np.arange(13), clean_plan.row_token[first:last]) | (np.arange(13) == 0)
    local = (clean_plan.pair_row >= 0).any(axis=1)
    assert np.isnan(out[reached & local].astype(np.float32)).all()
    np.testing.assert_array_equal(bits(out)[~reached], bits(clean)[~reached])


def test_combine_skips_what_is_not_local_and_takes_any_width():
    outputs = np.random.default_rng(0).standard_normal((8, 384)).astype(ml_dtypes.bfloat16)
    outputs[3] = np.nan
    pair_row = np.array([[0, 7], [-1, 2], [-1, -1]], np.int32)
    weights = np.array([[0.5, 2.0], [np.nan, 1.0], [np.inf, np.nan]], np.float32)
    (found,) = run(unpermute.launch(*map(to_torch, (outputs, weights, pair_row))))
    rows = outputs.astype(np.float32)
    expected = np.stack([0.5 * rows[0] + 2 * rows[7], rows[2], 0 * rows[0]])
    np.testing.assert_array_equal(bits(found), bits(expected.astype(ml_dtypes.bfloat16) + 0))


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
