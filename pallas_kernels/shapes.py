"""Sizes that every kernel and every backend must agree on. Python integers only, no arrays."""

QUANT_BLOCK = 128
"""Edge of a quantization block: 1x128 for activations, 128x128 for weights."""

F16_EXPONENT = 14
"""Of the largest magnitude of a row's 128 columns in f16, once its power of two is taken off."""

LARGEST_F16 = 2 ** (F16_EXPONENT + 1) - 16
"""The largest f16 of that exponent: rounded up to the next power, the largest f32 would overflow
once it is dequantized."""


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `a`."""
    return cdiv(a, multiple) * multiple


def even_rows(num_tokens: int, top_k: int, num_experts: int) -> float:
    """Rows that each expert gets if routing is even.

    Args:
        num_tokens: T.
        top_k: Experts per token.
        num_experts: E.
    """
    return num_tokens * top_k / num_experts


def max_rows(num_tokens: int, top_k: int, num_local_experts: int, block_m: int) -> int:
    """Rows that hold every routing there can be, each expert padded to a multiple of `block_m`.

    A token picks distinct experts, so at most `min(top_k, num_local_experts)` of its pairs are
    local and at most `num_tokens` pairs meet in one expert. Padding is worst when as many experts
    as possible are hit, each by one row more than a multiple of `block_m`.

    Args:
        num_tokens: T, may be 0.
        top_k: Experts per token, among all experts.
        num_local_experts: E_local.
        block_m: Rows of a tile.

    Returns:
        M, a multiple of `block_m`; 0 for no tokens.
    """
    pairs = num_tokens * min(top_k, num_local_experts)
    hit = min(num_local_experts, pairs)
    by_pairs = (pairs + hit * (block_m - 1)) // block_m
    by_expert = num_local_experts * cdiv(num_tokens, block_m)
    return block_m * min(by_pairs, by_expert)
