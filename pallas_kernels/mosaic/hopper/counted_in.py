"""Where the CTAs of a matmul count: zeros that no two kernels share.

The kernel takes them as an input that it writes to in place, and says so: where XLA lets two layers
share a plan, and with it the zeros that the plan kernel wrote, it gives the second one a copy.
Without zeros of a plan, a launch clears them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from pallas_kernels.device import num_sms
from pallas_kernels.mosaic import launch
from pallas_kernels.mosaic.hopper import split_k


def num_zeros() -> int:
    """How many a matmul may need on the GPU that is compiled for: flags, or a counter."""
    return split_k.num_flags(num_sms())


def run(
    kernel: Callable[[Any, Any], Any],
    given: Any,
    types: Any,
    zeros: Int32[Array, " num_zeros"] | None = None,
) -> Any:
    """`kernel(given, zeros)`, of arrays and a reference.

    Args:
        kernel: Writes to the zeros and leaves zeros.
        given: A pytree of arrays.
        types: Of its results, a pytree.
        zeros: None for new ones.
    """
    leaves, structure = jax.tree.flatten(types)

    def call(given: Any, zeros: Any) -> list[Array]:
        def body(references):
            zeros_gmem, results_gmem = references
            for to, result in zip(
                results_gmem, jax.tree.leaves(kernel(given, zeros_gmem)), strict=True
            ):
                to[...] = result

        empty = [lax.empty(leaf.shape, leaf.dtype) for leaf in leaves]
        _, results = launch.in_place(body, (zeros, empty))
        return results

    if zeros is None:
        zeros = jnp.zeros((num_zeros(),), jnp.int32)
    return jax.tree.unflatten(structure, launch.of_one_device(call)(given, zeros))
