"""Tokens on their way between ranks: rows, scales, experts and weights of each; the live ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32

from jax_moe import validate
from jax_moe.parallel import placement
from jax_moe.scalars import got
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


def live_of_each_rank(num_tokens: Any, count: int, most: int) -> Any:
    """`num_tokens` as i32[N]; None stays None.

    Args:
        num_tokens: Of all ranks, or i32[N]; 0..`most`, where that is known.
        count: N.
        most: T of each rank.

    Raises:
        TypeError: Neither an integer nor an int32 array.
        ValueError: Of another shape, or out of range.
    """
    if num_tokens is None:
        return None
    if getattr(num_tokens, "ndim", 0) == 0:
        try:
            number = validate.integer("num_tokens", num_tokens, 0, most)
        except TypeError:
            raise TypeError(
                f"num_tokens: expected an integer or int32 [N] = [{count}], got {got(num_tokens)}"
            ) from None
        if isinstance(number, Array):
            return jnp.broadcast_to(number, (count,))
        return np.full(count, number)
    sizes: validate.Sizes = {"N": (count, "mesh")}
    validate.array("num_tokens", num_tokens, "N", validate.I32, sizes)
    if placement.is_known(num_tokens):
        for number in jax.device_get(num_tokens):
            validate.integer("num_tokens", number, 0, most)
    return num_tokens
