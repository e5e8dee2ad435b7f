"""Routers and blocks of transformers' own model code, float32, on the dequantized weights.

Rows whose keys lie within two ulp may go either way; all other ids are equal.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import nn, route
from jax_moe.types import LayerWeights
from tests import numpy_oracle
from tests.moe_inputs import make_inputs, relative_error

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HIDDEN, WIDTH, EXPERTS = 256, 128, 16
TWO_ULP = 2 * np.spacing(np.float32(2))
SIZES = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
}
# Model type: configuration class, block class, and what is not a default.
BLOCKS = {
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3MoE", {"n_group": 4, "topk_group": 2}),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeMoE", {"routed_scaling_factor": 2.5}),
    "kimi_linear": (
        "KimiLinearConfig",
        "KimiLinearMoE",
        {"num_local_experts": EXPERTS, "routed_scaling_factor": 2.5},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeSparseMoeBlock",
        {"num_experts": EXPERTS, "norm_topk_prob": True},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextSparseMoeBlock",
        {"num_experts": EXPERTS, "shared_expert_intermediate_size": WIDTH},
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        "MiniMaxM2SparseMoeBlock",
        {"num_local_experts": EXPERTS, "intermediate_size": WIDTH},
    ),
}
OWN_EXPERTS = ("qwen3_moe", "qwen3_next", "minimax_m2", "kimi_linear")


def model_of(kind):
    """Transformers' block with random weights that FP8 holds exactly, and ours of the same."""
    config_class, block_class, change = BLOCKS[kind]
    sizes = dict(SIZES)
    if kind in OWN_EXPERTS:
        del sizes["n_routed_experts"]
    if kind == "minimax_m2":
        del sizes["moe_intermediate_size"]
    config = getattr(transformers, config_class)(**sizes, **change)
    module = __import__(f"transformers.models.{kind}.modeling_{kind}", fromlist=["x"])
    config._experts_implementation = "eager"
    block = getattr(module, block_class)(config).float().eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        block.gate.weight.copy_(torch.tensor(rng.standard_normal((EXPERTS, HIDDEN)) / 16))
        bias = _bias_of(block)
        if bias is not None:
            bias.copy_(torch.tensor(rng.standard_normal(EXPERTS) / 20))
    routed = _quantized(EXPERTS, 1)
    _copy(block.experts.gate_up_proj, block.experts.down_proj, routed)
    shared = getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)
    shared_weights = None
    if shared is not None:
        shared_weights = _quantized(1, 2)
        gate_up = torch.empty(1, 2 * WIDTH, HIDDEN)
        down = torch.empty(1, HIDDEN, WIDTH)
        _copy(gate_up, down, shared_weights)
        with torch.no_grad():
            shared.gate_proj.weight.copy_(gate_up[0, :WIDTH])
            shared.up_proj.weight.copy_(gate_up[0, WIDTH:])
            shared.down_proj.weight.copy_(down[0])
    shared_gate = getattr(block, "shared_expert_gate", None)
    weights = LayerWeights(
        routed,
        block.gate.weight.detach().numpy(),
        None if bias is None else bias.numpy().astype(np.float32),
        shared_weights,
        None if shared_gate is None else shared_gate.weight.detach().numpy(),
    )
    return block, weights, nn.LayerConfig.from_hf(config.to_dict())


def _bias_of(block):
    found = getattr(block, "e_score_correction_bias", None)
    return getattr(block.gate, "e_score_correction_bias", None) if found is None else found


def _quantized(count, seed):
    inputs = make_inputs(
        1, num_experts=2 * count, num_local_experts=count, hidden_size=HIDDEN, offset=0, seed=seed
    )
    return inputs.weights


def _copy(gate_up, down, weights):
    """Dequantizes into transformers' order, the gate first."""
    with torch.no_grad():
        for expert in range(len(weights.gemm1_weights)):
            w13, w2 = (
                numpy_oracle._dequantize(weights[i][expert], weights[i + 1][expert]) for i in (0, 2)
            )
            gate_up[expert] = torch.tensor(np.concatenate([w13[WIDTH:], w13[:WIDTH]]))
            down[expert] = torch.tensor(w2)


@functools.cache
def layer(config):
    return jax.jit(functools.partial(nn.moe_layer, config=config, backend="xla"))


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) if k == "qwen3_next" else k for k in BLOCKS],
)
def test_block(kind):
    block, weights, config = model_of(kind)
    x = np.random.default_rng(3).standard_normal((1, 96, HIDDEN)).astype(jnp.bfloat16)
    x32 = torch.tensor(x.astype(np.float32))
    with torch.no_grad():
        arguments = (x32, block.e_score_correction_bias) if kind == "minimax_m2" else (x32,)
        logits, topk_weights, topk_ids = block.gate(*arguments)
        expected = block(x32).numpy()

    bias = weights.e_score_correction_bias
    found = route(
        logits.numpy(), bias, config.routed_scaling_factor, config=config.router, backend="xla"
    )
    clear = numpy_oracle.routing_gaps(logits.numpy(), bias, config.router) > TWO_ULP
    assert clear.mean() > 0.98
    ours = _by_id(np.asarray(found.topk_ids), np.asarray(found.topk_weights))
    theirs = _by_id(topk_ids.numpy(), topk_weights.numpy())
    np.testing.assert_array_equal(ours[0][clear], theirs[0][clear])
    np.testing.assert_allclose(ours[1][clear], theirs[1][clear], rtol=2e-6)

    out = np.asarray(layer(config)(weights, x), np.float32)
    error = relative_error(out, expected)
    assert 0.01 < error < 0.06, error  # e4m3 twice, on rows that are exact in bfloat16


def _by_id(ids, weights):
    """Both in the order of the ids: transformers does not sort by weight."""
    order = np.argsort(ids, axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(weights, order, axis=1)
