"""What the two published sglang pipelines share: all T x top_k pairs through CUTLASS grouped GEMMs.

The order of the operators is the published one (flashinfer-bench solutions
sglang_fp8_blockwise_moe_v1 and _v2). Every buffer is allocated in the call.
"""

import functools
from collections.abc import Callable
from typing import Any

from interop.solutions import sgl_library
from jax_moe import LayerInputs

TOP_K, N_GROUP, TOPK_GROUP, BLOCK = 8, 8, 4, 128

# ops, gemm1 output bf16[rows, 2*I] -> e4m3[rows, I], f32[rows, I/128]
Activation = Callable[[Any, Any], tuple[Any, Any]]


def run(inputs: LayerInputs, workspace_bytes: int, activate: Activation) -> Any:
    """Runs the pipeline.

    Args:
        inputs: CUDA tensors and two numbers.
        workspace_bytes: size of the buffer that both GEMMs get.
        activate: SwiGLU and quantization, the step in which the two versions differ.

    Returns:
        bf16[T, H].
    """
    import torch

    tensors: Any = inputs  # PyTorch's
    hidden_states, factor = tensors.hidden_states, tensors.routed_scaling_factor
    gemm1_weights, gemm1_scale, gemm2_weights, gemm2_scale = tensors.weights
    ops = sgl_library.load()
    num_tokens, hidden_size = hidden_states.shape
    num_local_experts, _, intermediate_size = gemm2_weights.shape
    if num_tokens == 0:
        return torch.empty(0, hidden_size, dtype=torch.bfloat16, device=hidden_states.device)
    num_pairs = num_tokens * TOP_K

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden_states.device)

    weights, ids = ops.moe_fused_gate.default(
        tensors.routing_logits,
        tensors.routing_bias.float(),
        N_GROUP,
        TOPK_GROUP,
        TOP_K,
        0,
        factor,
        False,
    )
    # The published expert map: pairs of other ranks land on the first or last expert, weight 0.
    shifted = ids - tensors.local_expert_offset
    local = shifted.clamp(0, num_local_experts - 1)
    # In place: torch.where with a number would first fill a tensor with it.
    weights = (weights * factor).masked_fill_(shifted != local, 0.0)

    offsets = empty(num_local_experts + 1)
    problems1, problems2 = empty(num_local_experts, 3), empty(num_local_experts, 3)
    pair_source, pair_row = empty(num_pairs), empty(num_pairs)
    ops.prepare_moe_input.default(
        local.to(torch.int32),
        offsets,
        None,
        problems1,
        problems2,
        pair_source,
        pair_row,
        num_local_experts,
        intermediate_size,
        hidden_size,
    )
    rows = empty(num_pairs, hidden_size, dtype=hidden_states.dtype)
    row_scale = empty(num_pairs, hidden_size // BLOCK, dtype=torch.float32)
    ops.shuffle_rows.default(hidden_states, pair_source, rows)
    scales = tensors.hidden_states_scale.t().contiguous()
    ops.shuffle_rows.default(scales, pair_source, row_scale)

    # As published: what the GEMMs only write into, and strides of one length, serve both of them.
    gemm = functools.partial(
        _grouped_gemm,
        ops,
        pointers=[empty(num_local_experts, dtype=torch.int64) for _ in range(5)],
        layouts=[empty(num_local_experts, 5) for _ in range(2)],
        strides={
            length: torch.full((num_local_experts,), length, dtype=torch.int64, device=rows.device)
            for length in {hidden_size, 2 * intermediate_size, intermediate_size}
        },
        offsets=offsets[:-1],
        workspace=empty(workspace_bytes, dtype=torch.uint8),
    )
    gemm1 = empty(num_pairs, 2 * intermediate_size, dtype=torch.bfloat16)
    gemm(gemm1, (rows, row_scale), (gemm1_weights, gemm1_scale), problems1)
    activations = activate(ops, gemm1)
    gemm2 = empty(num_pairs, hidden_size, dtype=torch.bfloat16)
    gemm(gemm2, activations, (gemm2_weights, gemm2_scale), problems2)

    out = torch.zeros(num_tokens, hidden_size, dtype=torch.bfloat16, device=gemm2.device)
    ops.apply_shuffle_mul_sum.default(gemm2, out, pair_row, weights.to(torch.bfloat16))
    return out


def _grouped_gemm(
    ops: Any,
    out: Any,
    a: Any,
    weights: Any,
    problems: Any,
    *,
    pointers: Any,
    layouts: Any,
    strides: Any,
    offsets: Any,
    workspace: Any,
) -> None:
    """`out[rows of e] = a[rows of e] @ weights[e].T` with block scales, for all experts."""
    (values, scales), (w, w_scale) = a, weights
    row_length = strides[values.shape[1]]
    ops.fp8_blockwise_scaled_grouped_mm.default(
        out,
        *pointers,
        values,
        w.transpose(1, 2),
        scales,
        w_scale.transpose(1, 2),
        row_length,
        row_length,
        strides[out.shape[1]],
        *layouts,
        problems,
        offsets,
        workspace,
    )
