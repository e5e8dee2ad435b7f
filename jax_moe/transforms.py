"""How the layer behaves under JAX's transformations: grad, vmap and shard_map."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def forward_only[R](function: Callable[..., R]) -> Callable[..., R]:
    """A function of arrays that vmap runs one by one and that refuses to be differentiated.

    Inside `shard_map` the arguments are brought to the same set of mesh axes, so that loops and
    kernels need not care which of them differ between devices.

    Args:
        function: Takes positional pytrees of arrays.

    Returns:
        The same function. Differentiating it raises `NotImplementedError`.
    """

    @jax.custom_jvp
    def primal(*args: Any) -> R:
        return as_varying(function(*as_varying(args, args)), args)

    @primal.defjvp
    def _refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "jax_moe is forward only: grad, jvp and vjp through it are not supported. "
            "Wrap the inputs in jax.lax.stop_gradient to treat the layer as a constant."
        )

    return jax.custom_batching.sequential_vmap(primal)


def as_varying[T](tree: T, like: Any) -> T:
    """Marks arrays as different on every device of the mesh axes that `like` differs over.

    `shard_map` with `check_vma=True` tracks this, and a loop must start with what it ends with.

    Args:
        tree: Arrays.
        like: Arrays; all their axes together are taken.

    Returns:
        The same values.
    """
    axes = frozenset[str]().union(*(_varying_axes(leaf) for leaf in jax.tree.leaves(like)))

    def cast(leaf: Any) -> Any:
        missing = tuple(axes - _varying_axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _varying_axes(leaf: Any) -> frozenset[str]:
    return jax.typeof(leaf).mat.varying
