"""The ranks: the devices of one or two axes of a mesh, as seen from inside `jax.shard_map`."""

import dataclasses
import math
from typing import Any

import jax
from jax import Array, lax
from jaxtyping import Int32

from jax_moe.device import Device, device_of, has_context
from jax_moe.scalars import quoted

type AxisName = str | tuple[str, ...]
"""A mesh axis, or (host axis, device axis)."""

_MOST_AXES = 2


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The devices that share the experts; rank r holds the r-th part of them.

    Attributes:
        axes: One axis, or (host axis, device axis); ranks of one host are neighbours.
        sizes: Devices along each.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Ranks in all."""
        return math.prod(self.sizes)

    def index(self) -> Int32[Array, ""]:
        """Which rank this is; only inside of `jax.shard_map`."""
        return lax.axis_index(self.axes)


def axis_names(axis_name: Any) -> tuple[str, ...]:
    """Checks `axis_name`; returns it as a tuple.

    Raises:
        TypeError: It is neither a string nor a tuple of strings.
        ValueError: It names no axis, more than two, or one twice.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"axis_name: expected a mesh axis or (host axis, device axis), got {quoted(axis_name)}"
        )
    if not 1 <= len(set(names)) == len(names) <= _MOST_AXES:
        raise ValueError(
            f"axis_name: expected one axis or two different ones, got {quoted(axis_name)}"
        )
    return names


def surrounding(axis_name: Any) -> Ranks:
    """The ranks of the `jax.shard_map` around the caller.

    Raises:
        TypeError: `axis_name` is no name.
        ValueError: There is no `shard_map` around, or it does not split over that axis.
    """
    names = axis_names(axis_name)
    mesh = jax.sharding.get_abstract_mesh()
    split = tuple(mesh.manual_axes)
    missing = [name for name in names if name not in split]
    if missing and not split:
        raise ValueError(
            f"axis_name: expected a call inside of jax.shard_map over {quoted(axis_name)}, got one "
            "outside of any (jax_moe.expert_parallel makes the shard_map itself)"
        )
    if missing:
        known = ", ".join(map(repr, split))
        raise ValueError(
            f"axis_name: expected axes that the surrounding jax.shard_map splits over ({known}), "
            f"got {quoted(missing[0])}"
        )
    return Ranks(names, tuple(mesh.shape[name] for name in names))


def of_mesh(mesh: Any, axis_name: Any) -> Ranks:
    """The ranks of a mesh, which is checked.

    Raises:
        TypeError: `mesh` is no `jax.sharding.Mesh`, or `axis_name` no name.
        ValueError: It has no such axis, or devices of several kinds.
    """
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__qualname__}")
    names = axis_names(axis_name)
    for name in names:
        if name not in mesh.axis_names:
            known = ", ".join(map(repr, mesh.axis_names))
            raise ValueError(f"axis_name: expected axes of the mesh ({known}), got {quoted(name)}")
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    if len(kinds) > 1:
        raise ValueError(f"mesh: expected devices of one kind, got {', '.join(kinds)}")
    return Ranks(names, tuple(mesh.shape[name] for name in names))


def device() -> Device:
    """What the mesh around the caller is made of, as far as that is known.

    A described mesh names no compute capability, so on a GPU it is JAX's default device that counts
    (or the one of `jax_moe.assume_device`).
    """
    found = device_of()
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and described.platform == "cpu" and not has_context():
        return Device("cpu")
    return found
