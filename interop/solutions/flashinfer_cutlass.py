"""flashinfer's fused MoE on Hopper (PyPI flashinfer-python), FP8 block scales, local pairs only.

`cutlass_fused_moe` is TensorRT-LLM's: sort, copy rows, quantize, matmul, SwiGLU, quantize, matmul,
weighted sum, each a kernel. On Hopper it takes bf16 hidden states only, so `prepare` dequantizes
ours. It does not route: our router (`deepgemm.route`) does.
"""

from typing import Any

from interop.solutions import deepgemm
from interop.solutions.base import Solution
from interop.solutions.packages import hopper_unavailable, missing, nvcc_unavailable
from jax_moe import LayerInputs


def prepare(inputs: LayerInputs) -> tuple[Any, ...]:
    """The ten arguments with bf16[T, H] hidden states; their scales stay unused.

    Args:
        inputs: PyTorch tensors and two numbers.
    """
    tensors: Any = inputs  # PyTorch's
    hidden, scales = tensors.hidden_states, tensors.hidden_states_scale
    blocks = hidden.float().view(hidden.shape[0], -1, 128) * scales.t()[:, :, None]
    return inputs._replace(hidden_states=blocks.flatten(1).bfloat16()).arguments


def run(*arguments: Any) -> Any:
    """The layer on what `prepare` returns; bf16[T, H]."""
    import torch
    from flashinfer.fused_moe import cutlass_fused_moe

    inputs: Any = LayerInputs.of(*arguments)  # of PyTorch's tensors
    hidden, weights = inputs.hidden_states, inputs.weights
    out = torch.empty_like(hidden)
    if hidden.shape[0] == 0:
        return out
    # Ids are local: this is rank 0 of as many as there are, and -1 belongs to none.
    pair_expert, _, topk_weights, _ = deepgemm.route(
        inputs.routing_logits,
        inputs.routing_bias,
        inputs.local_expert_offset,
        inputs.routed_scaling_factor,
        weights.num_local_experts,
    )
    cutlass_fused_moe(
        hidden,
        pair_expert,
        topk_weights,
        weights.gemm1_weights,  # up first, as ours
        weights.gemm2_weights,
        torch.bfloat16,
        [weights.gemm1_weights_scale, weights.gemm2_weights_scale],
        ep_size=inputs.routing_logits.shape[1] // weights.num_local_experts,
        ep_rank=0,
        output=out,
        use_deepseek_fp8_block_scale=True,
    )
    return out


def unavailable_reason() -> str | None:
    """Why flashinfer cannot be used here, or None."""
    packages = (
        ("flashinfer", "flashinfer-python"),
        ("tvm_ffi", "apache-tvm-ffi"),
        ("triton", "triton"),
    )
    for package, distribution in packages:
        if reason := missing(package, distribution):
            return reason
    return nvcc_unavailable() or hopper_unavailable()


SOLUTION = Solution(
    name="flashinfer_cutlass",
    framework="torch",
    description="flashinfer's cutlass_fused_moe, FP8 block scales, with a Triton router",
    run=run,
    unavailable_reason=unavailable_reason,
    prepare=prepare,
    caveat=(
        "takes bf16 hidden states, which are dequantized beforehand, and quantizes them itself, "
        "once for each local pair"
    ),
    design={
        "Rows computed": "local pairs only",
        "SwiGLU": "a kernel of its own, bf16",
        "Intermediate quantization": "a kernel per (row, 128)",
        "GEMM workspace": "of the worst case, allocated in the call",
    },
)
