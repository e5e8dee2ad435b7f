"""The second published sglang pipeline: SwiGLU on views, quantization kernel, 90 kB workspace."""

from typing import Any

from interop.solutions import sgl_library, sglang_pipeline
from interop.solutions.base import Solution

WORKSPACE_BYTES = 90_000


def run(*arguments: Any) -> Any:
    """The layer on the definition's ten arguments; returns bf16[T, H]."""
    return sglang_pipeline.run(arguments, WORKSPACE_BYTES, _activate)


def _activate(ops: Any, gemm1: Any) -> tuple[Any, Any]:
    import torch

    num_rows, intermediate_size = gemm1.shape[0], gemm1.shape[1] // 2
    gate = gemm1[:, intermediate_size:]
    hidden = torch.nn.functional.silu(gate) * gemm1[:, :intermediate_size]
    values = torch.empty_like(hidden, dtype=torch.float8_e4m3fn)
    num_blocks = intermediate_size // sglang_pipeline.BLOCK
    scales = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=hidden.device)
    ops.sgl_per_token_group_quant_8bit.default(
        hidden, values, scales, sglang_pipeline.BLOCK, 1e-10, -448.0, 448.0, False
    )
    return values, scales


SOLUTION = Solution(
    name="sglang_v2",
    framework="torch",
    description="sglang's FP8 operators: zero-copy SwiGLU, native quantization kernel",
    run=run,
    unavailable_reason=sgl_library.unavailable_reason,
    caveat="computes all T x top_k pairs, as published",
    design={
        "Rows computed": "all T x top_k pairs",
        "SwiGLU": "silu(second half) * first half on views",
        "Intermediate quantization": "sgl_per_token_group_quant_8bit",
        "GEMM workspace": "90,000 byte buffer",
    },
)
