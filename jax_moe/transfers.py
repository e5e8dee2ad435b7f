"""Uploads of eager calls, made explicit where `jax.transfer_guard` forbids the implicit ones.

The numbers that a caller passes are ours to upload; NumPy arrays are the caller's, and the guard
stops those, as everywhere in JAX.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_moe.device import jax_device_of


def upload_numbers[T](tree: T) -> T:
    """NumPy scalars as JAX arrays beside the others, under a transfer guard; else nothing.

    An explicit upload costs the host some 50 us, an implicit one a tenth of that.

    Args:
        tree: The arguments of a jitted function.

    Returns:
        The same values.
    """
    if not is_guarded(tree):
        return tree
    where = _beside(tree)
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, where) if isinstance(leaf, np.generic) else leaf, tree
    )


def full(shape: tuple[int, ...], value: float, dtype: Any, like: Any) -> Array:
    """`jnp.full`, under a transfer guard without an implicit upload, beside other arrays."""
    if not is_guarded(like):
        return jnp.full(shape, value, dtype)
    return jax.device_put(np.full(shape, value, dtype), _beside(like))


def is_guarded(tree: Any) -> bool:
    """Whether a guard looks at the uploads and moves of a call; under a trace there are none."""
    to_device = jax.config.jax_transfer_guard_host_to_device
    between = jax.config.jax_transfer_guard_device_to_device
    if to_device in (None, "allow") and between in (None, "allow"):
        return False
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _beside(tree: Any) -> Sharding | jax.Device:
    """Where the first JAX array is, whole; the default device if there is none."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            return NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return jax_device_of(tree)
