"""The second published design in JAX: SwiGLU on slices and the native quantization kernel."""

from typing import Any

import jax
from jaxtyping import Array, BFloat16

import jax_moe
from interop.solutions import jax_pipeline
from interop.solutions.base import Solution


def run(*arguments: Any) -> BFloat16[Array, "T H"]:
    """The layer on the definition's ten arguments."""
    return jax_pipeline.run(jax_moe.LayerInputs.of(*arguments), _activate)


def _activate(gemm1: BFloat16[Array, "M 2*I"]) -> jax_moe.Quantized:
    intermediate_size = gemm1.shape[1] // 2
    gate = gemm1[:, intermediate_size:]
    return jax_moe.quantize(jax.nn.silu(gate) * gemm1[:, :intermediate_size])


SOLUTION = Solution(
    name="jax_v2",
    framework="jax",
    description="the second published design in JAX: SwiGLU on slices, quantization kernel",
    run=run,
    caveat="computes all T x top_k pairs, as published",
    design={
        "Rows computed": "all T x top_k pairs",
        "SwiGLU": "silu(second half) * first half, one fusion",
        "Intermediate quantization": "jax_moe.quantize",
        "GEMM workspace": "none",
    },
)
