"""The layer in pieces: bounded memory, and an exchange that runs beside the matmuls.

A piece is the same tokens of every rank. In step i, three things may run at once:

    dispatch(i+1)   |   the local layer of piece i   |   combine(i-1)

Barriers separate the steps. Without them XLA would combine the collectives of all pieces into one
again, and nothing would bound how many pieces wait in memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int32

from jax_moe.parallel.exchange import Exchange
from jax_moe.parallel.tokens import Tokens


def split(num_tokens: int, most: int) -> list[tuple[int, int]]:
    """(start, size) of the fewest pieces of at most `most` tokens, as even as they can be."""
    count = -(-num_tokens // most)
    size = -(-num_tokens // count)
    return [(start, min(size, num_tokens - start)) for start in range(0, num_tokens, size)]


class _Leaving(NamedTuple):
    """The arguments of `combine` for one piece."""

    partial_sums: Float[Array, "N*T H"]
    sent: Int32[Array, "T k"]
    received: Int32[Array, "N*T k"]


def run(
    tokens: Tokens,
    most: int,
    exchange: Exchange,
    local_layer: Callable[[Tokens], Float[Array, "N*T H"]],
) -> Float[Array, "T H"]:
    """Dispatch, local layer, combine.

    Args:
        tokens: Of this rank.
        most: Tokens of this rank per piece.
        exchange: Between the ranks.
        local_layer: From received tokens to the partial sums of this rank's experts.

    Returns:
        The sums of this rank's tokens.
    """
    bounds = split(tokens.hidden_states.shape[0], most)
    pieces = [tokens.piece(*bound) for bound in bounds] if len(bounds) > 1 else [tokens]
    received: Any = exchange.dispatch(pieces[0])
    leaving: Any = None  # the arguments of `combine` for the piece before
    sums: list[Array] = []
    for i, piece in enumerate(pieces):
        coming = pieces[i + 1] if i + 1 < len(pieces) else None
        if len(pieces) > 1:
            coming, received, leaving, sums[-1:] = lax.optimization_barrier(
                (coming, received, leaving, sums[-1:])
            )
        following = None if coming is None else exchange.dispatch(coming)
        partial_sums = local_layer(received)
        if leaving is not None:
            sums.append(exchange.combine(*leaving))
        leaving = _Leaving(partial_sums, piece.routing.topk_ids, received.routing.topk_ids)
        received = following
    if len(pieces) > 1:
        leaving, sums[-1:] = lax.optimization_barrier((leaving, sums[-1:]))
    sums.append(exchange.combine(*leaving))
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums)
