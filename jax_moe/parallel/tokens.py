"""Tokens on their way between ranks: rows, scales, experts and weights of each."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Float32

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
