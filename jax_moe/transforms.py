"""How the layer behaves under JAX's transformations and meshes: grad, vmap, shard_map, Explicit."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec


def forward_only[R](function: Callable[..., R]) -> Callable[..., R]:
    """A function of arrays that vmap runs one by one and that refuses to be differentiated.

    Inside `shard_map` the arguments are brought to the same set of mesh axes, so that loops and
    kernels need not care which of them differ between devices. Explicit mesh axes become Auto
    ones, over which loops and kernels need not say how they are split; the arguments are whole on
    every device (`jax_moe.validate`), and so is the result.

    Args:
        function: Takes positional pytrees of arrays.

    Returns:
        The same function. Differentiating it raises `NotImplementedError`.
    """

    @jax.custom_jvp
    def primal(*args: Any) -> R:
        return as_varying(_over_auto_axes(function, *as_varying(args, args)), args)

    @primal.defjvp
    def _refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "jax_moe is forward only: grad, jvp and vjp through it are not supported. "
            "Wrap the inputs in jax.lax.stop_gradient to treat the layer as a constant."
        )

    return jax.custom_batching.sequential_vmap(primal)


def is_tracing() -> bool:
    """Whether JAX traces the caller (`jax.jit`, `jax.vmap` and the like), arrays of it or not."""
    try:
        jax.sharding.get_mesh()
    except ValueError:  # it is for eager code only
        return True
    return False


def _over_auto_axes[R](function: Callable[..., R], *args: Any) -> R:
    mesh = _mesh_of(args)
    if not mesh.explicit_axes:
        return function(*args)
    whole = NamedSharding(mesh, PartitionSpec())
    inside = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=whole)
    return inside(*args)


def _mesh_of(args: Any) -> AbstractMesh:
    """The mesh of the context, else that of an array, else an empty one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(args))
        mesh = next((found for found in meshes if not found.empty), mesh)
    return mesh


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
