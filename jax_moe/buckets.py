"""Few shapes for many token counts: eager calls are padded, so that few programs are compiled.

T is raised to a power of two up to 256 and to a multiple of an eighth of the power of two below it
from there: at most nine shapes for 1..256, eight an octave after, at most 12.5 % of padding after.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_POWERS_UP_TO = 256
_STEPS_PER_OCTAVE = 8


def bucket(num_tokens: int) -> int:
    """The padded token count, not below `num_tokens`."""
    if num_tokens <= 1:
        return num_tokens
    power = 1 << (num_tokens - 1).bit_length()
    step = power if power <= _POWERS_UP_TO else power // (2 * _STEPS_PER_OCTAVE)
    return -(-num_tokens // step) * step


def is_eager(arrays: Any) -> bool:
    """Whether all arrays are concrete and on one device, so that padding them is ours to do."""
    return not any(
        isinstance(leaf, jax.core.Tracer)
        or (isinstance(leaf, jax.Array) and leaf.sharding.num_devices > 1)
        for leaf in jax.tree.leaves(arrays)
    )


def pad(array: Any, axis: int, size: int) -> Any:
    """Appends zeros along an axis. On a CPU nothing is compiled for it."""
    if array.shape[axis] == size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    if not _is_on_host(array):
        return _pad_on_device(array, widths=tuple(widths))
    padded = np.pad(np.asarray(array), widths)
    return _put_like(array, padded) if isinstance(array, jax.Array) else padded


def take_rows(array: Array, size: int) -> Array:
    """The first rows of an array. On a CPU nothing is compiled for it."""
    if array.shape[0] == size:
        return array
    if _is_on_host(array):
        return _put_like(array, np.asarray(array)[:size])
    return _take_rows_on_device(array, size=size)


def _put_like(array: Array, values: np.ndarray) -> Array:
    """Where the array is, and committed to that device only if the array is."""
    return jax.device_put(values, array.sharding if array.committed else None)


def _is_on_host(array: Any) -> bool:
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or next(iter(array.devices())).platform == "cpu"


_pad_on_device = jax.jit(lambda array, widths: jnp.pad(array, widths), static_argnames="widths")
_take_rows_on_device = jax.jit(lambda array, size: array[:size], static_argnames="size")
