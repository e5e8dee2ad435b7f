"""The exchange by XLA's collectives: any fabric, several hosts, CPUs; the oracle of the others."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int32

from jax_moe.numerics import to_bits
from jax_moe.parallel.ranks import Ranks
from jax_moe.parallel.tokens import Tokens
from jax_moe.types import Routing


def add_in_order(parts: Float[Array, "N T H"]) -> Float[Array, "T H"]:
    """The sum over the first axis, in float32 and in its order, cast once.

    Additions one by one: XLA may do the sum of a reduction in any order.
    """
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(parts.dtype)


def gather(tokens: Tokens, *levels: tuple[str, ...]) -> Tokens:
    """The tokens of all devices along mesh axes, in their order.

    XLA makes one launch of the four gathers as long as they are small. Nothing is packed for it,
    and only the scales, whose tokens are not their first axis, have to be put in order afterwards.

    Args:
        tokens: Of this device.
        *levels: Mesh axes, gathered over one after the other; the last is the slowest.
    """

    def all_devices(array: Array) -> Array:
        for axes in levels:
            array = lax.all_gather(array, axes, axis=0, tiled=True)
        return array

    dtype = tokens.hidden_states.dtype  # XLA would convert FP8 rows on a CPU
    rows = lax.bitcast_convert_type(all_devices(to_bits(tokens.hidden_states)), dtype)
    scale = tokens.hidden_states_scale
    if scale is not None:
        by_device = all_devices(scale).reshape(-1, *scale.shape)  # [N, H/128, T]
        scale = by_device.transpose(1, 0, 2).reshape(scale.shape[0], -1)
    return Tokens(rows, scale, Routing(*map(all_devices, tokens.routing)))


def send_home(partial_sums: Float[Array, "N*T H"], axes: tuple[str, ...], count: int) -> Array:
    """What `count` devices along mesh axes made of this device's tokens: [count,T,H], in order."""
    by_home = partial_sums.reshape(count, -1, partial_sums.shape[1])
    return lax.all_to_all(by_home, axes, split_axis=0, concat_axis=0)


@dataclasses.dataclass(frozen=True)
class Nothing:
    """The exchange of one rank with itself."""

    def dispatch(self, tokens: Tokens) -> Tokens:
        """All tokens are here."""
        return tokens

    def combine(
        self, partial_sums: Float[Array, "T H"], sent: Int32[Array, "T k"], received: Array
    ) -> Float[Array, "T H"]:
        """The partial sums are the sums."""
        return partial_sums


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Every row to every rank by all-gather, partial sums home by all-to-all.

    An all-to-all moves the bytes of a reduce-scatter, but lets the sum be made at home: in float32,
    in the order of the ranks, rounded once.
    """

    ranks: Ranks

    def dispatch(self, tokens: Tokens) -> Tokens:
        """Slot r*T + t holds token t of rank r."""
        return gather(tokens, self.ranks.axes)

    def combine(
        self,
        partial_sums: Float[Array, "N*T H"],
        sent: Int32[Array, "T k"],
        received: Int32[Array, "N*T k"],
    ) -> Float[Array, "T H"]:
        """The sums of this rank's tokens."""
        return add_in_order(send_home(partial_sums, self.ranks.axes, self.ranks.count))
