"""The solutions that need PyTorch or compare designs, by name.

Importing them needs none of their packages.
"""

from interop.solutions import (
    deepgemm,
    deepgemm_mega,
    flashinfer_cutlass,
    jax_v1,
    jax_v2,
    sglang_v1,
    sglang_v2,
    torch_reference,
)
from interop.solutions.base import Solution

SOLUTIONS: dict[str, Solution] = {
    solution.name: solution
    for solution in (
        torch_reference.SOLUTION,
        sglang_v1.SOLUTION,
        *sglang_v1.VARIANTS,
        sglang_v2.SOLUTION,
        *deepgemm.solutions(),
        deepgemm_mega.SOLUTION,
        flashinfer_cutlass.SOLUTION,
        jax_v1.SOLUTION,
        jax_v2.SOLUTION,
    )
}
