"""The steps in which the two published sglang pipelines differ, each in both ways."""

import dataclasses
from collections.abc import Callable
from typing import Any

from interop.solutions import sgl_library, sglang_pipeline
from interop.solutions.base import Solution
from interop.solutions.sglang_pipeline import BLOCK
from jax_moe import LayerInputs

# ops, gemm1 output bf16[rows, 2*I] -> bf16[rows, I]
SwiGLU = Callable[[Any, Any], Any]
# ops, bf16[rows, I] -> e4m3[rows, I], f32[rows, I/128]
Quantize = Callable[[Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to do a step: how, and in words for the report's differences table."""

    do: Any
    text: str


def _swap_by_copy(ops: Any, gemm1: Any) -> Any:
    import torch

    half = gemm1.shape[1] // 2
    up, gate = gemm1[:, :half], gemm1[:, half:]
    hidden = torch.empty_like(up, memory_format=torch.contiguous_format)
    # silu_and_mul gates the first half, the definition the second.
    ops.silu_and_mul.default(hidden, torch.cat([gate, up], dim=1))
    return hidden


def _on_views(_: Any, gemm1: Any) -> Any:
    import torch

    half = gemm1.shape[1] // 2
    return torch.nn.functional.silu(gemm1[:, half:]) * gemm1[:, :half]


def _composed(_: Any, hidden: Any) -> tuple[Any, Any]:
    import torch

    blocks = hidden.float().view(hidden.shape[0], -1, BLOCK)
    scales = blocks.abs().amax(dim=2).clamp(min=1e-10) / 448.0
    values = (blocks / scales[:, :, None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return values.view(hidden.shape[0], -1), scales


def _native(ops: Any, hidden: Any) -> tuple[Any, Any]:
    import torch

    num_rows, intermediate_size = hidden.shape
    values = torch.empty_like(hidden, dtype=torch.float8_e4m3fn)
    shape = (num_rows, intermediate_size // BLOCK)
    scales = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    ops.sgl_per_token_group_quant_8bit.default(
        hidden, values, scales, BLOCK, 1e-10, -448.0, 448.0, False
    )
    return values, scales


SWAP_BY_COPY = Choice(_swap_by_copy, "torch.cat swaps the halves, then silu_and_mul")
ON_VIEWS = Choice(_on_views, "silu(second half) * first half on views")
COMPOSED = Choice(_composed, "PyTorch amax/clamp/div/cast per (row, 128)")
NATIVE = Choice(_native, "sgl_per_token_group_quant_8bit")
LARGE_WORKSPACE = Choice(1 << 30, "1 GiB buffer")
SMALL_WORKSPACE = Choice(90_000, "90,000 byte buffer")


def solution(
    name: str, description: str, swiglu: Choice, quantization: Choice, workspace: Choice
) -> Solution:
    """A pipeline with these steps.

    Args:
        name: Of the solution.
        description: One line.
        swiglu: `SWAP_BY_COPY` or `ON_VIEWS`.
        quantization: `COMPOSED` or `NATIVE`.
        workspace: `LARGE_WORKSPACE` or `SMALL_WORKSPACE`.

    Returns:
        The solution; its `run` takes the definition's ten arguments and returns bf16[T, H].
    """

    def activate(ops: Any, gemm1: Any) -> tuple[Any, Any]:
        return quantization.do(ops, swiglu.do(ops, gemm1))

    def run(*arguments: Any) -> Any:
        return sglang_pipeline.run(LayerInputs.of(*arguments), workspace.do, activate)

    return Solution(
        name=name,
        framework="torch",
        description=description,
        run=run,
        unavailable_reason=sgl_library.unavailable_reason,
        caveat="computes all T x top_k pairs, as published",
        design={
            "Rows computed": "all T x top_k pairs",
            "SwiGLU": swiglu.text,
            "Intermediate quantization": quantization.text,
            "GEMM workspace": workspace.text,
        },
    )
