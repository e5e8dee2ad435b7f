"""How every kernel here is made from its body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel`, with the body traced in 32 bits whatever `JAX_ENABLE_X64` says.

    Under x64, sums and loop counters would become i64 and no longer match the i32 beside them.

    Args:
        body: The kernel.
        **options: As for `jax.experimental.pallas.mosaic_gpu.kernel`.

    Returns:
        A function of the kernel's inputs.
    """

    def call(*inputs: Any) -> Any:
        with jax.enable_x64(False):
            return plgpu.kernel(body, **options)(*inputs)

    return call
