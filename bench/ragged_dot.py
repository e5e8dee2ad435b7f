"""What a JAX user has today: the layer on `jax.lax.ragged_dot`, in bf16."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import BFloat16, Float32, Int32

import jax_moe
from interop.solutions.base import Solution
from jax_moe import LayerInputs, MoEConfig


def _prepare(config: MoEConfig, inputs: LayerInputs) -> tuple[Any, ...]:
    """Dequantizes the weights to bf16 and counts the local pairs, both before the clock starts."""
    weights, num_local_experts = inputs.weights, inputs.weights.num_local_experts
    routing = jax_moe.route(
        inputs.routing_logits,
        inputs.routing_bias,
        inputs.routed_scaling_factor,
        config=config,
        backend="xla",
    )
    local_ids = routing.topk_ids - inputs.local_expert_offset
    is_local = (local_ids >= 0) & (local_ids < num_local_experts)
    return (
        inputs.routing_logits,
        inputs.routing_bias,
        inputs.hidden_states,
        inputs.hidden_states_scale,
        _dequantized(weights.gemm1_weights, weights.gemm1_weights_scale),
        _dequantized(weights.gemm2_weights, weights.gemm2_weights_scale),
        inputs.local_expert_offset,
        inputs.routed_scaling_factor,
        jnp.arange(max(int(is_local.sum()), 1), dtype=jnp.int32),
    )


@jax.jit
def _dequantized(weights: Array, scales: Array) -> BFloat16[Array, "E_local K N"]:
    """One expert at a time; transposed, as `ragged_dot` wants its right-hand side."""

    def one_expert(pair: tuple[Array, Array]) -> Array:
        values, scale = pair
        scale = jnp.repeat(jnp.repeat(scale, 128, axis=0), 128, axis=1)
        return (values.astype(jnp.float32) * scale).astype(jnp.bfloat16).T

    return lax.map(one_expert, (weights, scales))


def _run(
    config: MoEConfig,
    routing_logits: Float32[Array, "T E"],
    routing_bias: Array,
    hidden_states: Array,
    hidden_states_scale: Float32[Array, "H//128 T"],
    gemm1_weights: BFloat16[Array, "E_local H 2*I"],
    gemm2_weights: BFloat16[Array, "E_local I H"],
    local_expert_offset: Int32[Array, ""],
    routed_scaling_factor: Float32[Array, ""],
    rows: Int32[Array, " pairs"],
) -> BFloat16[Array, "T H"]:
    num_tokens, num_local_experts = hidden_states.shape[0], gemm1_weights.shape[0]
    routing = jax_moe.route(
        routing_logits, routing_bias, routed_scaling_factor, config=config, backend="xla"
    )
    local_ids = routing.topk_ids - local_expert_offset
    is_local = (local_ids >= 0) & (local_ids < num_local_experts)
    expert = jnp.where(is_local, local_ids, num_local_experts).ravel()
    pair = jnp.argsort(expert, stable=True)[: rows.size]  # local pairs first, expert-major
    group_sizes = jnp.bincount(expert, length=num_local_experts).astype(jnp.int32)
    token = pair // routing.topk_ids.shape[1]

    scale = jnp.repeat(hidden_states_scale.T, 128, axis=1)
    x = (hidden_states.astype(jnp.float32) * scale).astype(jnp.bfloat16)[token]
    up, gate = jnp.split(lax.ragged_dot(x, gemm1_weights, group_sizes), 2, axis=1)
    if (limit := config.swiglu_limit) is not None:
        up, gate = jnp.clip(up, -limit, limit), jnp.minimum(gate, limit)
    y = lax.ragged_dot(jax.nn.silu(gate) * up, gemm2_weights, group_sizes)

    is_live = expert[pair] < num_local_experts
    weight = jnp.where(is_live, routing.topk_weights.ravel()[pair], 0)
    out = jnp.zeros((num_tokens, y.shape[1]), jnp.float32)
    out = out.at[token].add(jnp.where(is_live[:, None], y * weight[:, None], 0))
    return out.astype(jnp.bfloat16)


def solution(config: MoEConfig) -> Solution:
    """The solution for one router."""
    return Solution(
        name="jax_ragged_dot",
        framework="jax",
        description="jax.lax.ragged_dot in bf16: what a JAX user has today",
        run=functools.partial(_run, config),
        prepare=functools.partial(_prepare, config),
        compile_ahead=False,
        caveat=(
            "weights dequantized to bf16 and transposed beforehand, so twice the bytes to read; "
            "the number of local pairs is known to the host, which favours it"
        ),
        design={
            "Rows computed": "local pairs only, counted on the host",
            "SwiGLU": "silu(second half) * first half",
            "Intermediate quantization": "none (bf16)",
            "GEMM workspace": "XLA's",
        },
    )
