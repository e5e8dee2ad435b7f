"""The exchange between ranks: its interface, its implementations by name, the choice among them.

    dispatch   tokens of this rank  ->  tokens of all ranks (or of those that need this rank)
    combine    partial sums of all ranks' tokens  ->  the sums of this rank's tokens

All give the same sums: in float32, in the order of the ranks, cast once (`two_level` says where it
differs). No shape depends on the routing, nothing is dropped, no host is asked.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jax import Array
from jaxtyping import Float, Int32

from jax_moe.config import Precision
from jax_moe.device import has_context, interpret_params, jax_device_of
from jax_moe.parallel.collectives import Collectives, Nothing
from jax_moe.parallel.nvlink import NVLink
from jax_moe.parallel.ranks import Ranks
from jax_moe.parallel.tokens import Tokens
from jax_moe.parallel.two_level import TwoLevel
from jax_moe.scalars import quoted

AUTO = "auto"

NVLINK_FROM = {("NVIDIA H200", 2): 128}
"""Tokens of each rank from which `nvlink` was measured to be the faster exchange.

By the kind of the devices and their number, all of them ranks (`results/h200/parallel_2_gpus`)."""


class Exchange(Protocol):
    """What an exchange offers inside of `jax.shard_map`."""

    def dispatch(self, tokens: Tokens) -> Tokens:
        """T tokens of this rank to a slot for each of the N*T tokens of all ranks.

        A slot whose token has no expert on this rank may hold anything, except that its ids say so.
        """

    def combine(
        self,
        partial_sums: Float[Array, "N*T H"],
        sent: Int32[Array, "T k"],
        received: Int32[Array, "N*T k"],
    ) -> Float[Array, "T H"]:
        """Partial sums, by slot, to the sums of this rank's tokens, of the same dtype.

        `sent` and `received` are the physical expert ids on both sides of `dispatch`.
        """


class Place(NamedTuple):
    """Where an exchange is to run.

    Attributes:
        ranks: The ranks.
        backend: What computes on them.
        precision: Of the activations.
        mesh: The ranks' mesh where it is known; None inside of a `jax.shard_map`.
    """

    ranks: Ranks
    backend: str
    precision: Precision = "fast"
    mesh: jax.sharding.Mesh | None = None


def _collectives_reason(place: Place) -> str | None:
    return None


def _two_level_reason(place: Place) -> str | None:
    if len(place.ranks.axes) == 1:
        return f"needs axis_name=(host axis, device axis), got {place.ranks.axes[0]!r}"
    return None


def _nvlink_reason(place: Place) -> str | None:
    if len(place.ranks.axes) > 1:
        return f"needs one axis of ranks, got {place.ranks.axes}"
    if place.backend != "mosaic":
        return f"needs backend 'mosaic', got {place.backend!r}"
    if place.precision != "fast":
        return f"precision={place.precision!r} is not supported, only 'fast'"
    if interpret_params() is not None:
        return "needs GPUs: the interpreter knows no other device's memory"
    if place.mesh is None:
        processes = 1 if has_context() else jax.process_count()
    else:
        processes = len({device.process_index for device in place.mesh.devices.flat})
        ids = [device.id for device in place.mesh.devices.flat]
        if ids != list(range(len(ids))):
            return f"needs a mesh of devices 0..{len(ids) - 1} in this order, got {ids}"
    if processes > 1:
        return f"needs all devices in one process, got {processes} processes"
    return None


class _Kind(NamedTuple):
    make: Callable[[Ranks, int], Exchange]
    reason: Callable[[Place], str | None]
    not_chosen: str


_KINDS = {
    "two_level": _Kind(lambda ranks, _: TwoLevel(ranks), _two_level_reason, "available"),
    "collectives": _Kind(lambda ranks, _: Collectives(ranks), _collectives_reason, "available"),
    "nvlink": _Kind(NVLink, _nvlink_reason, "available; not measured to be faster here"),
}
"""By name; "auto" takes the first that can run, which is never the last, or what was measured."""

NAMES = (AUTO, *_KINDS)


def select(name: str, place: Place, num_tokens: int) -> str:
    """The exchange that `exchange=name` means.

    Args:
        name: One of `NAMES`.
        place: Where it is to run.
        num_tokens: T of each rank.

    Returns:
        A name other than "auto".

    Raises:
        ValueError: There is no such exchange.
        NotImplementedError: It cannot run there; says why.
    """
    if not isinstance(name, str) or name not in NAMES:
        known = ", ".join(map(repr, NAMES))
        raise ValueError(f"exchange: expected one of {known}, got {quoted(name)}")
    if name == AUTO:
        start = nvlink_from(place)
        if start is not None and num_tokens >= start:
            return "nvlink"
        return next(kind for kind in _KINDS if not _KINDS[kind].reason(place))
    if reason := _KINDS[name].reason(place):
        raise NotImplementedError(f"exchange={name!r}: {reason}")
    return name


def nvlink_from(place: Place) -> int | None:
    """Tokens of each rank from which "auto" takes `nvlink`; None where it never does."""
    asked = (place, place._replace(mesh=None))  # inside of `jax.shard_map` it is asked again
    if any(_KINDS["nvlink"].reason(one) for one in asked):
        return None
    if place.mesh is None:  # which devices it has is known only if it has all
        around = jax.sharding.get_abstract_mesh()
        device: Any = around.abstract_device or jax_device_of()
        count = max(around.size, jax.device_count())
    else:
        device, count = place.mesh.devices.flat[0], place.mesh.size
    return NVLINK_FROM.get((device.device_kind, count)) if count == place.ranks.count else None


def state(name: str, place: Place) -> str:
    """Whether "auto" takes an exchange there; why not, or why it cannot run."""
    start = nvlink_from(place)
    if name == select(AUTO, place, 0):
        return "chosen by auto" + (f" below {start} tokens per rank" if start else "")
    if name == "nvlink" and start:
        return f"chosen by auto from {start} tokens per rank on"
    return _KINDS[name].reason(place) or _KINDS[name].not_chosen


def make(name: str, ranks: Ranks, num_local_experts: int) -> Exchange:
    """The exchange itself; with one rank there is nothing to exchange."""
    return Nothing() if ranks.count == 1 else _KINDS[name].make(ranks, num_local_experts)
