"""How much memory a call over several ranks takes, and into how many pieces that divides it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax_moe import api, validate
from jax_moe.config import DEEPSEEK_V3, MoEConfig, Precision
from pallas_kernels.shapes import QUANT_BLOCK, cdiv

LIMIT = 4 * 10**9
"""Bytes that the default size of a piece stays below, down to one token of each rank."""


class Sizes(NamedTuple):
    """What the memory of a call depends on.

    Attributes:
        num_tokens: T, tokens of one rank.
        num_ranks: N.
        top_k: k.
        hidden_size: H.
        precision: Of the activations.
    """

    num_tokens: int
    num_ranks: int
    top_k: int
    hidden_size: int
    precision: Precision = "fast"


def workspace_bytes(
    num_tokens: int,
    *,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    config: MoEConfig = DEEPSEEK_V3,
    top_k: int | None = None,
    backend: str = "auto",
    num_ranks: int = 1,
    max_rows_at_once: int | None = None,
    precision: Precision = "fast",
) -> int:
    """Bound on the temporary memory of one jitted layer on one device, outputs not counted.

    It holds for every routing, also where all tokens go to one rank.

    Args:
        num_tokens: T; over several ranks, the tokens of one.
        num_local_experts: E_local.
        hidden_size: H.
        intermediate_size: I.
        config: How experts are picked.
        top_k: Experts per token where the caller picks them; None takes that of `config`.
        backend: As in `apply`.
        num_ranks: Ranks of `apply_expert_parallel`; 1 is `apply` or `apply_routed`.
        max_rows_at_once: As in `apply_expert_parallel`; counts only if `num_ranks` is not 1.
        precision: As in `apply`.

    Returns:
        Bytes.

    Raises:
        TypeError: A count is no integer, `config` no `MoEConfig`.
        ValueError: There is no such backend or precision, or a count is out of range.
        NotImplementedError: The backend does not run on the default device.
    """
    num_ranks = int(validate.integer("num_ranks", num_ranks, 1, 2**20))
    max_rows_at_once = rows_at_once(max_rows_at_once, num_ranks)

    def local_bytes(rows: int) -> int:
        return api.workspace_bytes(
            rows,
            num_local_experts=num_local_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            config=config,
            top_k=top_k,
            backend=backend,
            precision=precision,
        )

    alone = local_bytes(num_tokens)  # checks the arguments
    if num_ranks == 1:
        return alone
    top_k = config.top_k if top_k is None else top_k
    sizes = Sizes(num_tokens, num_ranks, top_k, hidden_size, precision)
    return total_bytes(sizes, tokens_at_once(sizes, local_bytes, max_rows_at_once), local_bytes)


def rows_at_once(value: Any, num_ranks: int) -> int | None:
    """Checks `max_rows_at_once`: a slot per rank at least."""
    if value is None:
        return None
    return int(validate.integer("max_rows_at_once", value, num_ranks, 2**30))


def tokens_at_once(
    sizes: Sizes, local_bytes: Callable[[int], int], max_rows_at_once: int | None
) -> int:
    """Tokens of one rank per piece.

    Args:
        sizes: Of the call.
        local_bytes: Workspace of the local layer by its number of rows.
        max_rows_at_once: Slots of all ranks together per piece; None takes the fewest pieces that
            stay below `LIMIT`.

    Returns:
        1..T, or 1 for T of 0.
    """
    num_tokens = max(sizes.num_tokens, 1)
    if max_rows_at_once is not None:
        return min(max_rows_at_once // sizes.num_ranks, num_tokens)
    count = 1
    while count < num_tokens and (total_bytes(sizes, cdiv(num_tokens, count), local_bytes) > LIMIT):
        count += 1
    return cdiv(num_tokens, count)


def total_bytes(sizes: Sizes, piece: int, local_bytes: Callable[[int], int]) -> int:
    """Bound on the temporary memory of one rank with `piece` tokens of each rank at once."""
    return local_bytes(sizes.num_ranks * piece) + _exchange_bytes(sizes, piece)


def _exchange_bytes(sizes: Sizes, piece: int) -> int:
    """What dispatch and combine hold besides the local layer's own workspace."""
    small = 4 * (sizes.hidden_size // QUANT_BLOCK + 2 * sizes.top_k)
    wider = 2 if sizes.precision == "high" else 1  # f16 rows, float32 sums
    row = wider * sizes.hidden_size + 2 * small  # received, and in the order of the local layer
    total = wider * 2 * sizes.hidden_size
    home = sizes.num_tokens * (row + 2 * total)
    if sizes.num_ranks == 1:
        return home
    slots = sizes.num_ranks * piece
    if piece >= sizes.num_tokens:
        return home + slots * (row + 2 * total) + 2**20
    # While a piece is computed, the next one arrives and the one before goes home.
    return home + slots * (2 * row + 3 * total) + 2**20
