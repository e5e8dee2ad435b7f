"""How every kernel here is made from its body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun


def kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel`, with the body traced in 32 bits whatever `JAX_ENABLE_X64` says.

    Under x64, sums and loop counters would become i64 and no longer match the i32 beside them.

    Args:
        body: The kernel.
        **options: As for `jax.experimental.pallas.mosaic_gpu.kernel`.

    Returns:
        A function of the kernel's inputs, pytrees of arrays or references.
    """

    def call(*inputs: Any) -> Any:
        run = of_one_device(plgpu.kernel(body, **options))
        with jax.enable_x64(False):
            return run(*inputs)

    return call


def of_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced as on one device also inside of `jax.shard_map`.

    JAX 0.11.2 refuses `plgpu.warp_map` where a kernel's references are marked as different between
    devices.

    Args:
        function: Of pytrees of arrays or references, to arrays; runs kernels.
    """

    def call(*inputs: Any) -> Any:
        leaves, structure = jax.tree.flatten(inputs)
        kinds = [jax.typeof(leaf) for leaf in leaves]
        arrays = all(isinstance(kind, jax.core.ShapedArray) for kind in kinds)
        if not arrays or not any(kind.mat.varying for kind in kinds):
            return function(*inputs)
        specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        local_inputs = jax.tree.unflatten(structure, specs)
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*local_inputs)
        results = jaxpr_as_fun(traced)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call
