"""The oracle: what the layer computes, in float32, with nothing rounded in between."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import BFloat16

from jax_moe.config import MoEConfig
from jax_moe.numerics import dequantize_rows, dequantize_weight, matmul, swiglu, take
from jax_moe.router import route
from jax_moe.transforms import as_varying
from jax_moe.types import ExpertWeights, LayerInputs, RoutedInputs

_TILE = 512  # tokens of one expert that are in float32 at a time


def layer(
    inputs: LayerInputs, *, config: MoEConfig, swiglu_limit: float | None
) -> BFloat16[Array, "T H"]:
    """See `jax_moe.reference`."""
    routing = route(
        inputs.routing_logits, inputs.routing_bias, inputs.routed_scaling_factor, config=config
    )
    num_experts = inputs.routing_logits.shape[1]
    return routed_layer(inputs.routed(routing), num_experts=num_experts, swiglu_limit=swiglu_limit)


def routed_layer(
    inputs: RoutedInputs, *, num_experts: int, swiglu_limit: float | None
) -> BFloat16[Array, "T H"]:
    """See `jax_moe.reference_routed`.

    One expert is dequantized at a time, and only its tokens are visited.
    """
    topk_ids, topk_weights = inputs.routing
    exists = (topk_ids >= 0) & (topk_ids < num_experts)

    def one_expert(out: Array, expert: tuple[Array, ExpertWeights]) -> tuple[Array, None]:
        local_id, weights = expert
        is_chosen = exists & (topk_ids == local_id + inputs.local_expert_offset)
        weight = jnp.where(is_chosen, topk_weights, 0).sum(axis=1)
        (tokens,) = jnp.nonzero(
            is_chosen.any(axis=1), size=inputs.tokens + _TILE, fill_value=inputs.tokens
        )

        def one_tile(i: Array, out: Array) -> Array:
            rows = lax.dynamic_slice_in_dim(tokens, i * _TILE, _TILE)
            y = _one_expert_of_rows(inputs, weights, rows, swiglu_limit)
            return out.at[rows].add(y * weight[rows, None], mode="drop")

        tiles = (is_chosen.any(axis=1).sum(dtype=jnp.int32) + _TILE - 1) // _TILE
        return lax.fori_loop(0, tiles, one_tile, out), None

    local_ids = jnp.arange(inputs.weights.num_local_experts, dtype=jnp.int32)
    out = as_varying(jnp.zeros(inputs.hidden_states.shape, jnp.float32), inputs)
    out, _ = jax.lax.scan(one_expert, out, (local_ids, inputs.weights))
    return out.astype(jnp.bfloat16)


def _one_expert_of_rows(
    inputs: RoutedInputs, weights: ExpertWeights, rows: Array, swiglu_limit: float | None
) -> Array:
    """f32[rows,H] of one expert, whose weights come without their first axis."""
    x = take(inputs.hidden_states, rows).astype(jnp.float32)
    if inputs.hidden_states_scale is not None:
        x = dequantize_rows(x, inputs.hidden_states_scale[:, rows])
    up_gate = dequantize_weight(weights.gemm1_weights, weights.gemm1_weights_scale)
    down = dequantize_weight(weights.gemm2_weights, weights.gemm2_weights_scale)
    # Unfused operands have the same shapes for every T, so a GPU tunes these matmuls once.
    x, up_gate, down = lax.optimization_barrier((x, up_gate, down))
    hidden = lax.optimization_barrier(swiglu(matmul(x, up_gate), swiglu_limit))
    return matmul(hidden, down)
