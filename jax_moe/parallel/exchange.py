"""The exchange between ranks: its interface, its implementations by name, the choice among them.

    dispatch   tokens of this rank  ->  tokens of all ranks (or of those that need this rank)
    combine    partial sums of all ranks' tokens  ->  the sums of this rank's tokens

All give the same sums: in float32, in the order of the ranks, cast once (`two_level` says where it
differs). No shape depends on the routing, nothing is dropped, no host is asked.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
from jax import Array
from jaxtyping import Float, Int32

from jax_moe.config import Precision
from jax_moe.device import has_context, interpret_params
from jax_moe.parallel.collectives import Collectives, Nothing
from jax_moe.parallel.nvlink import NVLink
from jax_moe.parallel.ranks import Ranks
from jax_moe.parallel.tokens import Tokens
from jax_moe.parallel.two_level import TwoLevel

AUTO = "auto"


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


class _Place(NamedTuple):
    """Where an exchange is to run: what its choice depends on."""

    ranks: Ranks
    backend: str
    mesh: jax.sharding.Mesh | None


def _collectives_reason(place: _Place) -> str | None:
    return None


def _two_level_reason(place: _Place) -> str | None:
    if len(place.ranks.axes) == 1:
        return f"needs axis_name=(host axis, device axis), got {place.ranks.axes[0]!r}"
    return None


def _nvlink_reason(place: _Place) -> str | None:
    if len(place.ranks.axes) > 1:
        return f"needs one axis of ranks, got {place.ranks.axes}"
    if place.backend != "mosaic":
        return f"needs backend 'mosaic', got {place.backend!r}"
    if interpret_params() is not None:
        return "needs GPUs: the interpreter knows no other device's memory"
    if place.mesh is None:
        processes = 1 if has_context() else jax.process_count()
    else:
        processes = len({device.process_index for device in place.mesh.devices.flat})
        ids = [device.id for device in place.mesh.devices.flat]
        if ids != sorted(ids):
            return f"needs the mesh's devices in the order of their ids, got {ids}"
    if processes > 1:
        return f"needs all devices in one process, got {processes} processes"
    return None


class _Kind(NamedTuple):
    make: Callable[[Ranks, int], Exchange]
    reason: Callable[[_Place], str | None]
    not_chosen: str


_KINDS = {
    "two_level": _Kind(lambda ranks, _: TwoLevel(ranks), _two_level_reason, "available"),
    "collectives": _Kind(lambda ranks, _: Collectives(ranks), _collectives_reason, "available"),
    "nvlink": _Kind(NVLink, _nvlink_reason, "available; like collectives on two GPUs"),
}
"""By name; "auto" takes the first that can run, which is never the last."""

NAMES = (AUTO, *_KINDS)


def unsupported_reason(
    name: str, ranks: Ranks, backend: str, mesh: jax.sharding.Mesh | None = None
) -> str | None:
    """Why an exchange cannot run there; None if it can."""
    return _KINDS[name].reason(_Place(ranks, backend, mesh))


def select(name: str, ranks: Ranks, backend: str, mesh: jax.sharding.Mesh | None = None) -> str:
    """The exchange that `exchange=name` means.

    Args:
        name: One of `NAMES`.
        ranks: The ranks.
        backend: What computes on them.
        mesh: Their mesh where it is known.

    Returns:
        A name other than "auto".

    Raises:
        ValueError: There is no such exchange.
        NotImplementedError: It cannot run there; says why.
    """
    if name == AUTO:
        kinds = (kind for kind in _KINDS if not unsupported_reason(kind, ranks, backend, mesh))
        return next(kinds)
    if name not in _KINDS:
        raise ValueError(f"exchange: expected one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if reason := unsupported_reason(name, ranks, backend, mesh):
        raise NotImplementedError(f"exchange={name!r}: {reason}")
    return name


def require_fast(name: str, precision: Precision) -> None:
    """Refuses what the kernels of an exchange do not have.

    Raises:
        NotImplementedError: It moves FP8 rows and bf16 sums only.
    """
    if precision != "fast" and name == "nvlink":
        raise NotImplementedError(
            f"exchange={name!r}: precision={precision!r} is not supported, only 'fast'"
        )


def make(name: str, ranks: Ranks, num_local_experts: int) -> Exchange:
    """The exchange itself; with one rank there is nothing to exchange."""
    return Nothing() if ranks.count == 1 else _KINDS[name].make(ranks, num_local_experts)


def available(name: str) -> str:
    """Why "auto" takes another exchange, although this one could run."""
    return _KINDS[name].not_chosen
