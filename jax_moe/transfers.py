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
    if not _is_guarded(tree):
        return tree
    where = _beside(tree)
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, where) if isinstance(leaf, np.generic) else leaf, tree
    )


def zeros(shape: tuple[int, ...], like: Any) -> Array:
    """bf16 zeros, under a transfer guard without an implicit upload."""
    if not _is_guarded(like):
        return jnp.zeros(shape, jnp.bfloat16)
    return jax.device_put(np.zeros(shape, jnp.bfloat16), _beside(like))


def _is_guarded(tree: Any) -> bool:
    """Whether a guard looks at the uploads of a call; under a trace there are none."""
    if jax.config.jax_transfer_guard_host_to_device in (None, "allow"):
        return False
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _beside(tree: Any) -> Sharding | jax.Device:
    """Where the first JAX array is, whole; the default device if there is none."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            return NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return jax_device_of(tree)
