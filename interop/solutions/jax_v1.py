"""The first published design in JAX: swap by copy, composed quantization, every step in memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16

import jax_moe
from interop.solutions import jax_pipeline
from interop.solutions.base import Solution

_BLOCK = 128


def run(*arguments: Any) -> BFloat16[Array, "T H"]:
    """The layer on the definition's ten arguments."""
    return jax_pipeline.run(jax_moe.LayerInputs.of(*arguments), _activate)


def _activate(gemm1: BFloat16[Array, "M 2*I"]) -> jax_moe.Quantized:
    """Each barrier stands for a PyTorch operator's end: XLA would fuse all of it."""
    up, gate = jnp.split(gemm1, 2, axis=1)
    swapped = lax.optimization_barrier(jnp.concatenate([gate, up], axis=1))
    first, second = jnp.split(swapped, 2, axis=1)
    hidden = lax.optimization_barrier(jax.nn.silu(first) * second)
    num_rows, intermediate_size = hidden.shape
    blocks = hidden.astype(jnp.float32).reshape(num_rows, intermediate_size // _BLOCK, _BLOCK)
    amax = lax.optimization_barrier(jnp.abs(blocks).max(axis=2))
    scales = jnp.maximum(amax, 1e-10) / 448.0
    scaled = lax.optimization_barrier(blocks / scales[:, :, None])
    values = jnp.clip(scaled, -448.0, 448.0).astype(jnp.float8_e4m3fn)
    return jax_moe.Quantized(values.reshape(hidden.shape), scales.T)


SOLUTION = Solution(
    name="jax_v1",
    framework="jax",
    description="the first published design in JAX: unfused, all pairs",
    run=run,
    caveat="computes all T x top_k pairs, as published",
    design={
        "Rows computed": "all T x top_k pairs",
        "SwiGLU": "jnp.concatenate swaps the halves, then silu * up",
        "Intermediate quantization": "jnp amax/clip/div/cast per (row, 128)",
        "GEMM workspace": "none; each step in its own full-size array",
    },
)
