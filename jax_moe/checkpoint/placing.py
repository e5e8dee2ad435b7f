"""Where arrays with an axis of experts go: one device, or the devices of a mesh."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jax_moe.checkpoint.reading import E4M3, Stack
from jax_moe.checkpoint.transfer import Advance, Share, put_stacks

_AXES = 3  # of every array with an axis of experts


class Placement:
    """Where arrays with an axis of experts go.

    Args:
        sharding: None for the default device; a mesh, whose axis "expert", or only axis, splits
            the experts; or a sharding that splits nothing but the first axis.
        num_experts: Length of that axis.

    Raises:
        TypeError: It is none of these.
        ValueError: It splits another axis, its spec has more axes than the arrays, or the experts
            do not split evenly.

    Attributes:
        shares: What this process holds.
    """

    def __init__(self, sharding: Mesh | Sharding | None, num_experts: int) -> None:
        self._sharding = _as_sharding(sharding)
        self._num_experts = num_experts
        self.shares = self._shares()

    @property
    def local_experts(self) -> list[int]:
        """The experts that this process holds, ascending."""
        return sorted({expert for share in self.shares for expert in share.experts})

    def put_stacks(
        self, stacks: Sequence[Stack], pool: ThreadPoolExecutor, advance: Advance
    ) -> list[Array]:
        """Reads the stacks and puts them where they belong.

        Args:
            stacks: The stacks, all of as many experts.
            pool: Threads to read with.
            advance: Told how many bytes have been read.

        Returns:
            The arrays, e4m3[E_local,rows,columns].

        Raises:
            ValueError: A file ended or cannot be read; names file and tensor.
        """
        per_device: list[list[Array]] = [[] for _ in stacks]
        for share in self.shares:
            filled = put_stacks(stacks, share, pool, advance)
            for arrays, more in zip(per_device, filled, strict=True):
                arrays += more
        return [
            self._joined(stack.shape, self._sharding, arrays)
            for stack, arrays in zip(stacks, per_device, strict=True)
        ]

    def put_small(
        self, shape: tuple[int, ...], dtype: Any, read: Callable[[range], np.ndarray]
    ) -> Array:
        """Puts a small array with an axis of experts.

        Args:
            shape: Of the whole array.
            dtype: Of its values.
            read: Gives the values of some of the experts.

        Returns:
            The array.
        """
        placed = []
        for share in self.shares:
            values = read(share.experts)
            placed += [jax.device_put(values, sharding) for sharding in share.shardings]
        return self._joined(shape, self._sharding, placed, dtype)

    def put_replicated(self, array: np.ndarray) -> Array:
        """Puts an array whole on each device."""
        shardings = [sharding for share in self.shares for sharding in share.shardings]
        placed = [jax.device_put(array, sharding) for sharding in shardings]
        return self._joined(array.shape, self.replicated, placed, array.dtype)

    @staticmethod
    def _joined(
        shape: tuple[int, ...], sharding: Sharding | None, placed: list[Array], dtype: Any = E4M3
    ) -> Array:
        """One array of those on each device of this process.

        `jax.make_array_from_callback` would upload them itself, which `jax.transfer_guard` may
        forbid: to it only `jax.device_put` is explicit.
        """
        if sharding is None or isinstance(sharding, SingleDeviceSharding):
            (alone,) = placed
            return alone
        return jax.make_array_from_single_device_arrays(shape, sharding, placed, dtype=dtype)

    @property
    def replicated(self) -> Sharding | None:
        """The sharding of arrays that every device holds whole."""
        if isinstance(self._sharding, NamedSharding):
            return self._sharding.update(spec=PartitionSpec())
        return self._sharding

    def _shares(self) -> list[Share]:
        everything = range(self._num_experts)
        if self._sharding is None:
            return [Share(everything, (None,))]
        if isinstance(self._sharding, NamedSharding):
            _check_even(self._sharding, self._num_experts)
        indices = self._sharding.addressable_devices_indices_map((self._num_experts, 1, 1))
        devices: dict[range, list[jax.Device]] = {}
        for device, index in indices.items():
            assert index is not None
            devices.setdefault(everything[index[0]], []).append(device)
        kind = self._sharding.memory_kind
        return [Share(experts, tuple(found), kind) for experts, found in devices.items()]


def _as_sharding(sharding: Any) -> Sharding | None:
    if isinstance(sharding, Mesh):
        names = sharding.axis_names
        axis = names[0] if len(names) == 1 else "expert"
        if axis not in names:
            raise ValueError(
                f"sharding: expected a mesh with an axis 'expert', or with one axis, got {names}; "
                "a NamedSharding says which axis"
            )
        return NamedSharding(sharding, PartitionSpec(axis))
    if isinstance(sharding, NamedSharding) and any(sharding.spec[1:]):
        raise ValueError(f"sharding: expected only axis 0 (experts) split, got {sharding.spec}")
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > _AXES:
        raise ValueError(f"sharding: expected a spec of at most {_AXES} axes, got {sharding.spec}")
    if sharding is None or isinstance(sharding, NamedSharding | SingleDeviceSharding):
        return sharding
    raise TypeError(
        "sharding: expected a jax.sharding.Mesh, NamedSharding or SingleDeviceSharding, or None, "
        f"got {type(sharding).__name__}"
    )


def _check_even(sharding: NamedSharding, num_experts: int) -> None:
    axes = sharding.spec[0] if sharding.spec else None
    names = axes if isinstance(axes, tuple) else (axes,)
    size = math.prod(sharding.mesh.shape.get(name, 1) for name in names)
    if num_experts % size:
        raise ValueError(
            f"sharding: expected mesh axes that split {num_experts} experts evenly, got "
            f"{axes!r} of size {size}"
        )
