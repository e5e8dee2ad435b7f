"""Checks of where arrays lie: what JAX would refuse, or the stages do not say how to split."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from jax_moe.device import is_committed
from jax_moe.scalars import got


def whole(**values: Any) -> None:
    """Refuses arrays on different devices, and those that are split over Explicit axes.

    The stages do not say how to split them. Inside of `jax.shard_map` these axes are Manual; over
    Auto axes XLA splits the work.

    Args:
        **values: Checked arrays, NamedTuples of them, or None, by name.

    Raises:
        ValueError: An array is split, or elsewhere than the first; names it.
    """
    arrays = dict(_flat(values))
    for name, value in arrays.items():
        _whole(name, value)
    _together(arrays)


def together(**values: Any) -> None:
    """Refuses arrays of an eager call that were put on different devices: JAX moves none of them.

    Args:
        **values: As for `whole`.

    Raises:
        ValueError: An array is elsewhere than the first; names both.
    """
    _together(dict(_flat(values)))


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """All arrays of JAX, by name."""
    for name, value in values.items():
        if isinstance(value, tuple):
            fields = value._asdict()  # type: ignore[attr-defined]
            yield from _flat({f"{name}.{field}": leaf for field, leaf in fields.items()})
        elif value is not None and not isinstance(value, np.ndarray):
            yield name, value


def _whole(name: str, value: Array) -> None:
    is_traced = isinstance(value, jax.core.Tracer)
    if not is_traced and isinstance(value.sharding, SingleDeviceSharding):
        return  # the usual case, and it is quick
    spec = jax.typeof(value).sharding.spec
    if any(axes is not None for axes in spec) or spec.unreduced:
        raise ValueError(
            f"{name}: expected an array that is whole on every device, got {got(value)} split as "
            f"{spec} over Explicit mesh axes; call jax_moe inside of jax.shard_map, which gives "
            "each device its part"
        )


def _together(arrays: dict[str, Array]) -> None:
    if any(isinstance(value, jax.core.Tracer) for value in arrays.values()):
        return  # the others are constants of the program, wherever they are
    first: tuple[str, set[jax.Device]] | None = None
    for name, value in arrays.items():
        if not is_committed(value):  # JAX moves it
            continue
        there = value.sharding.device_set
        if first is None:
            first = name, there
        elif there != first[1]:
            raise ValueError(
                f"{name}: expected an array on {_in_words(first[1])}, as {first[0]} is, got one on "
                f"{_in_words(there)}"
            )


def _in_words(devices: set[jax.Device]) -> str:
    names = sorted(map(str, devices))
    return names[0] if len(names) == 1 else f"{len(names)} devices ({names[0]}, ...)"
