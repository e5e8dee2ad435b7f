"""What the kernels must know of the GPU that they are compiled for."""

from __future__ import annotations

import jax

SMEM_BYTES = 232448
"""Shared memory per block on Hopper, at most."""

_H100_SMS = 132


def local_gpu() -> jax.Device | None:
    """This process's first GPU, if that is what is compiled for."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return None
    device = jax.local_devices()[0]
    return device if device.platform == "gpu" else None


def num_sms() -> int:
    """Multiprocessors of the target: an abstract device's, the first GPU's, else an H100's."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.num_cores:
        return abstract.num_cores
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else _H100_SMS
