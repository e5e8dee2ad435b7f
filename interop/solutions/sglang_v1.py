"""The first published sglang pipeline: swap by copy, composed quantization, 1 GiB workspace."""

from typing import Any

from interop.solutions import sgl_library, sglang_pipeline
from interop.solutions.base import Solution

WORKSPACE_BYTES = 1 << 30


def run(*arguments: Any) -> Any:
    """The layer on the definition's ten arguments; returns bf16[T, H]."""
    return sglang_pipeline.run(arguments, WORKSPACE_BYTES, _activate)


def _activate(ops: Any, gemm1: Any) -> tuple[Any, Any]:
    import torch

    num_rows, twice = gemm1.shape
    up, gate = gemm1[:, : twice // 2], gemm1[:, twice // 2 :]
    hidden = torch.empty_like(up, memory_format=torch.contiguous_format)
    # silu_and_mul gates the first half, the definition the second.
    ops.silu_and_mul.default(hidden, torch.cat([gate, up], dim=1))
    blocks = hidden.float().view(num_rows, -1, sglang_pipeline.BLOCK)
    scales = blocks.abs().amax(dim=2).clamp(min=1e-10) / 448.0
    values = (blocks / scales[:, :, None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return values.view(num_rows, -1), scales


SOLUTION = Solution(
    name="sglang_v1",
    framework="torch",
    description="sglang's FP8 operators, unfused: swap copy, PyTorch quantization",
    run=run,
    unavailable_reason=sgl_library.unavailable_reason,
    caveat="computes all T x top_k pairs, as published",
    design={
        "Rows computed": "all T x top_k pairs",
        "SwiGLU": "torch.cat swaps the halves, then silu_and_mul",
        "Intermediate quantization": "PyTorch amax/clamp/div/cast per (row, 128)",
        "GEMM workspace": "1 GiB buffer",
    },
)
