"""The oracle: what the layer computes, in float32, with nothing rounded in between."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import BFloat16, Float, Float8e4m3fn, Float32, Int32

from jax_moe.config import MoEConfig
from jax_moe.numerics import dequantize_rows, dequantize_weight, matmul, route, swiglu, take
from jax_moe.transforms import as_varying

_TILE = 512  # tokens of one expert that are in float32 at a time


def layer(
    routing_logits: Float32[Array, "T E"],
    routing_bias: Float[Array, " E"],
    hidden_states: Float[Array, "T H"],
    hidden_states_scale: Float32[Array, "H//128 T"] | None,
    gemm1_weights: Float8e4m3fn[Array, "E_local 2*I H"],
    gemm1_weights_scale: Float32[Array, "E_local 2*I//128 H//128"],
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    local_expert_offset: Int32[Array, ""],
    routed_scaling_factor: Float32[Array, ""],
    *,
    config: MoEConfig,
) -> BFloat16[Array, "T H"]:
    """See `jax_moe.reference`. One expert is dequantized at a time, and only its tokens visited."""
    num_tokens = hidden_states.shape[0]
    routing = route(routing_logits, routing_bias, routed_scaling_factor, config=config)

    def one_expert(out: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
        local_id, w13, s13, w2, s2 = expert
        is_chosen = routing.topk_ids == local_id + local_expert_offset
        weight = jnp.where(is_chosen, routing.topk_weights, 0).sum(axis=1)
        (tokens,) = jnp.nonzero(
            is_chosen.any(axis=1), size=num_tokens + _TILE, fill_value=num_tokens
        )

        def one_tile(i: Array, out: Array) -> Array:
            rows = lax.dynamic_slice_in_dim(tokens, i * _TILE, _TILE)
            x = take(hidden_states, rows).astype(jnp.float32)
            if hidden_states_scale is not None:
                x = dequantize_rows(x, hidden_states_scale[:, rows])
            # Unfused operands have the same shapes for every T, so a GPU tunes these matmuls once.
            x, up, down = lax.optimization_barrier(
                (x, dequantize_weight(w13, s13), dequantize_weight(w2, s2))
            )
            hidden = lax.optimization_barrier(swiglu(matmul(x, up)))
            y = matmul(hidden, down)
            return out.at[rows].add(y * weight[rows, None], mode="drop")

        tiles = (is_chosen.any(axis=1).sum(dtype=jnp.int32) + _TILE - 1) // _TILE
        return lax.fori_loop(0, tiles, one_tile, out), None

    local_ids = jnp.arange(gemm1_weights.shape[0], dtype=jnp.int32)
    experts = (local_ids, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale)
    out = as_varying(jnp.zeros(hidden_states.shape, jnp.float32), routing)
    out, _ = jax.lax.scan(one_expert, out, experts)
    return out.astype(jnp.bfloat16)
