"""The definition in PyTorch: the oracle of the comparison and the denominator of every speedup."""

from typing import Any

from interop.solutions.base import Solution
from interop.solutions.packages import torch_unavailable


def run(*arguments: Any) -> Any:
    """The layer on the definition's ten arguments; returns bf16[T, H]."""
    from interop import torch_definition  # imports torch

    return torch_definition.run(*arguments)


SOLUTION = Solution(
    name="torch_reference",
    framework="torch",
    description="the definition in float32 PyTorch, one expert at a time; runs on a CPU too",
    run=run,
    unavailable_reason=torch_unavailable,
    capturable=False,
    caveat="dequantizes every local expert in each call, like the published reference",
    design={
        "Rows computed": "local pairs only",
        "SwiGLU": "float32",
        "Intermediate quantization": "none",
        "GEMM workspace": "one dequantized expert",
    },
)
