"""Two of DeepGEMM's dense FP8 matmuls with a shared expert's shapes: what that expert is held to.

Only the matmuls: no quantization, no SwiGLU between them. The second one's input is cut from the
first one's, since times do not depend on it, and all scales lie as TMA reads them beforehand.
"""

from typing import Any

from interop.solutions.base import Solution
from interop.solutions.deepgemm import unavailable_reason
from jax_moe import LayerInputs


def prepare(inputs: LayerInputs) -> tuple[Any, ...]:
    """Activations and weights of both matmuls, from a layer of one expert.

    Args:
        inputs: PyTorch tensors; the expert's weights have E_local = 1.

    Returns:
        Values e4m3[T,H], scales f32[T,H/128], weights e4m3[2*I,H], f32[2*I/128,H/128], and the same
        four of the down projection: e4m3[T,I], f32[T,I/128], e4m3[H,I], f32[H/128,I/128].
    """
    values: Any = inputs.hidden_states
    scales: Any = inputs.hidden_states_scale
    w13, w13_scale, w2, w2_scale = (one[0] for one in inputs.weights)
    intermediate_size = w2.shape[1]
    return (
        values,
        tma_aligned(scales),
        w13,
        w13_scale,
        values[:, :intermediate_size].contiguous(),
        tma_aligned(scales[: intermediate_size // 128]),
        w2,
        w2_scale,
    )


def tma_aligned(scales: Any) -> Any:
    """f32[K/128,T] as a view f32[T,K/128] whose columns begin at multiples of 16 bytes."""
    num_blocks, num_tokens = scales.shape
    padded = scales.new_zeros(num_blocks, -(-num_tokens // 4) * 4)
    padded[:, :num_tokens] = scales
    return padded.t()[:num_tokens]


def run(
    x: Any,
    x_scale: Any,
    w13: Any,
    w13_scale: Any,
    activations: Any,
    activations_scale: Any,
    w2: Any,
    w2_scale: Any,
) -> Any:
    """Both matmuls; returns the second one's bf16[T, H]."""
    import deep_gemm

    if hasattr(deep_gemm, "set_pdl"):
        deep_gemm.set_pdl(True)  # off by default: its launch then overlaps the previous kernel
    gemm(x, x_scale, w13, w13_scale)
    return gemm(activations, activations_scale, w2, w2_scale)


def gemm(values: Any, scales: Any, weights: Any, weights_scale: Any) -> Any:
    """One of DeepGEMM's dense matmuls.

    Args:
        values: e4m3[M,K].
        scales: f32[M,K/128], columns contiguous and aligned to 16 bytes.
        weights: e4m3[N,K].
        weights_scale: f32[N/128,K/128].

    Returns:
        bf16[M,N].
    """
    import deep_gemm
    import torch

    out = values.new_empty(values.shape[0], weights.shape[0], dtype=torch.bfloat16)
    deep_gemm.fp8_gemm_nt((values, scales), (weights, weights_scale), out, compiled_dims="nk")
    return out


SOLUTION = Solution(
    name="deepgemm_dense",
    framework="torch",
    description="two DeepGEMM fp8_gemm_nt of a shared expert's shapes",
    run=run,
    unavailable_reason=unavailable_reason,
    prepare=prepare,
)
