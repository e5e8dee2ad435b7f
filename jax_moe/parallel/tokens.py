"""Tokens on their way between ranks: rows, scales, experts and weights of each."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int32, UInt

from jax_moe.numerics import to_bits
from jax_moe.types import Routing


class Tokens(NamedTuple):
    """Tokens that know their experts.

    Attributes:
        hidden_states: e4m3[T,H]; 16-bit rows travel as well.
        hidden_states_scale: f32[H/128,T], None for rows that carry no scale.
        routing: Physical expert ids i32[T,k], -1 for no expert, and weights f32[T,k].
    """

    hidden_states: Float[Array, "T H"]
    hidden_states_scale: Float32[Array, "H//128 T"] | None
    routing: Routing

    def piece(self, start: int, size: int) -> "Tokens":
        """Tokens `start` to `start + size`."""
        scale = self.hidden_states_scale
        rows = slice(start, start + size)
        return Tokens(
            self.hidden_states[rows],
            None if scale is None else scale[:, rows],
            Routing(*(array[rows] for array in self.routing)),
        )


class Packed(NamedTuple):
    """The same as bits, a row per token: what a gather along the first axis can send.

    Attributes:
        rows: `hidden_states` as integers of its width.
        small: i32[T,H/128+2k], the bits of scales, ids and weights. Integers, because an id of -1
            would be a NaN among floats.
    """

    rows: UInt[Array, "T H"]
    small: Int32[Array, "T n"]


def pack(tokens: Tokens) -> Packed:
    """Tokens to bits."""
    ids, weights = tokens.routing
    parts = [ids, lax.bitcast_convert_type(weights, jnp.int32)]
    if tokens.hidden_states_scale is not None:
        parts.append(lax.bitcast_convert_type(tokens.hidden_states_scale.T, jnp.int32))
    return Packed(to_bits(tokens.hidden_states), jnp.concatenate(parts, axis=1))


def unpack(packed: Packed, like: Tokens) -> Tokens:
    """Bits to tokens, of the dtype and the k of `like`."""
    top_k = like.routing.topk_ids.shape[1]
    ids, weights, scales = jnp.split(packed.small, (top_k, 2 * top_k), axis=1)
    has_scale = like.hidden_states_scale is not None
    return Tokens(
        lax.bitcast_convert_type(packed.rows, like.hidden_states.dtype),
        lax.bitcast_convert_type(scales, jnp.float32).T if has_scale else None,
        Routing(ids, lax.bitcast_convert_type(weights, jnp.float32)),
    )
