"""How every kernel here is made from its body."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
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


def in_place(body: Callable[[Any], None], state: Any) -> Any:
    """`pl.run_state(body)(state)`, of which no result becomes part of a larger array unseen.

    The barrier keeps XLA's dynamic-slice fusion away. With it a kernel would write straight into a
    slice of a larger array, as of the stacked results of `lax.scan` and of `jax.vmap`. But it
    forgets that a result is an operand written in place: the kernel writes to the operand, and the
    slice stays as it was (seen with JAX 0.11.2 on an H200).

    Args:
        body: Runs kernels that write to some of the references that it gets.
        state: A pytree of arrays.

    Returns:
        The arrays, as `body` leaves them.
    """
    return lax.optimization_barrier(pl.run_state(body)(state))


class Blocks(NamedTuple):
    """Blocks of a launch that do one kind of work.

    Attributes:
        num_blocks: How many there are.
        inputs: Arrays that they take.
        out_type: Shapes and dtypes of the arrays that they give.
        body: `body(block, *inputs, *outputs)`, with references in place of the arrays.
    """

    num_blocks: int
    inputs: tuple[Any, ...]
    out_type: tuple[Any, ...]
    body: Callable[..., None]


def side_by_side(
    *kinds: Blocks, kernel_name: str, interpret: Any = None
) -> tuple[tuple[Any, ...], ...]:
    """One launch of blocks of several kinds, none of which waits for another.

    Args:
        *kinds: The blocks, those first that take the longest.
        kernel_name: Of the launch.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        The arrays that each kind gives.
    """
    ends = list(itertools.accumulate(kind.num_blocks for kind in kinds))

    def body(*refs: Any) -> None:
        block = lax.axis_index("block")
        inputs, outputs = refs[: len(kinds)], refs[len(kinds) :]
        for kind, end, ins, outs in zip(kinds, ends, inputs, outputs, strict=True):
            first = end - kind.num_blocks
            run = functools.partial(kind.body, block - first if first else block, *ins, *outs)
            if len(kinds) == 1:
                run()
            else:
                pl.when((block >= first) & (block < end))(run)

    return kernel(
        body,
        out_type=tuple(kind.out_type for kind in kinds),
        grid=(ends[-1],),
        grid_names=("block",),
        kernel_name=kernel_name,
        interpret=interpret,
    )(*(kind.inputs for kind in kinds))


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
