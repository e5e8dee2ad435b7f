"""The published pipelines rebuilt from our public stages: all pairs, plain grouped matmuls.

Only the step between the matmuls differs between the two versions, as in `sglang_pipeline`, so what
they show of the design can be compared across the frameworks.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import BFloat16

import jax_moe

# gemm1 output bf16[rows, 2*I] -> e4m3[rows, I] and f32[I/128, rows]
Activation = Callable[[Array], jax_moe.Quantized]


def run(inputs: jax_moe.LayerInputs, activate: Activation) -> BFloat16[Array, "T H"]:
    """Runs the pipeline.

    Args:
        inputs: Arrays, and two scalars.
        activate: SwiGLU and quantization.

    Returns:
        bf16[T, H].
    """
    weights, num_local_experts = inputs.weights, inputs.weights.num_local_experts
    topk_ids, topk_weights = jax_moe.route(
        inputs.routing_logits, inputs.routing_bias, inputs.routed_scaling_factor
    )
    num_tokens, top_k = topk_ids.shape
    if num_tokens == 0:
        return jnp.zeros(inputs.hidden_states.shape, jnp.bfloat16)
    # The published expert map: pairs of other ranks land on the first or last expert, weight 0.
    local = topk_ids - inputs.local_expert_offset
    is_local = (local >= 0) & (local < num_local_experts)
    pairs = jnp.clip(local, 0, num_local_experts - 1).reshape(-1, 1)
    plan = jax_moe.plan_groups(
        pairs, 0, num_local_experts=num_local_experts, num_experts=num_local_experts
    )

    source = jnp.maximum(plan.row_token, 0) // top_k
    assert inputs.hidden_states_scale is not None
    rows = lax.optimization_barrier(
        (inputs.hidden_states[source], inputs.hidden_states_scale[:, source])
    )
    gemm1 = jax_moe.down_project(
        jax_moe.Quantized(*rows), weights.gemm1_weights, weights.gemm1_weights_scale, plan
    )
    gemm2 = jax_moe.down_project(
        activate(gemm1), weights.gemm2_weights, weights.gemm2_weights_scale, plan
    )

    outputs = gemm2[plan.pair_row.reshape(num_tokens, top_k)].astype(jnp.float32)
    weighted = outputs * topk_weights[:, :, None]
    return jnp.where(is_local[:, :, None], weighted, 0).sum(axis=1).astype(jnp.bfloat16)
