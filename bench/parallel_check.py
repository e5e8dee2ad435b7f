"""Whether an exchange is right on these devices, and gives the same bits in every run."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bench import steps
from bench.parallel import MOST_ERROR, Oracle, exchanged, once
from bench.parallel_inputs import gathered, input_maker, input_specs, mesh_of
from bench.workloads import Sizes

RUNS = 100


def check(
    ranks: int, tokens: Sequence[int], exchange: str, sizes: Sizes
) -> Iterator[dict[str, Any]]:
    """Few and many tokens by one exchange.

    Args:
        ranks: N.
        tokens: T of each rank, several.
        exchange: Its name.
        sizes: E, H and I.

    Yields:
        exchange, tokens, error against the ranks' local work, whether all of `RUNS` runs had the
        same bits, and whether all is well.
    """
    mesh = mesh_of(ranks)
    prepared = []
    for num_tokens in tokens:
        specs = input_specs(mesh, num_tokens, sizes)
        layer = once(exchanged(mesh, exchange, num_tokens), specs)
        make = input_maker(mesh, num_tokens, sizes)
        prepared.append((num_tokens, make, Oracle(mesh, specs), layer))
    same_bits = jax.jit(_same_bits)
    steps.wait_for_turn()
    for num_tokens, make, oracle, layer in prepared:
        inputs = make()
        wanted = oracle.total(gathered(mesh, inputs))
        outs = [layer(inputs) for _ in range(RUNS)]
        same = all(bool(same_bits(out, outs[0])) for out in outs)
        error = oracle.error(outs[0], wanted)
        yield {
            "exchange": exchange,
            "tokens": num_tokens,
            "runs": RUNS,
            "error": error,
            "same_bits": same,
            "right": same and error <= MOST_ERROR,
        }


def _same_bits(one: Any, other: Any) -> Any:
    as_bits = [lax.bitcast_convert_type(out, jnp.uint16) for out in (one, other)]
    return (as_bits[0] == as_bits[1]).all()
