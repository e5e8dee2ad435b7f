"""Group-limited top-k (arXiv:2412.19437, section 2.1.2), one program per token.

Other scores than the sigmoid with a bias are those of `pallas_kernels.scores`, to the last bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton import scores as formulas
from pallas_kernels.triton.launch import Launch

_LOWEST = tl.constexpr(-(2**31))  # the rank of what cannot be chosen
_NAN_RANK = tl.constexpr(-(2**31) + 1)  # below -inf
_LOG2_E = tl.constexpr(1.44269502162933349609375)  # as f32
_LOG2_E_REST = tl.constexpr(1.925963033500995e-8)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sigmoid(x):
    """`1 / (1 + exp(-x))`, with what `t` loses in rounding: `2^t` in hardware costs 2 ulp alone."""
    t = -x * _LOG2_E
    rest = tl.fma(-x, _LOG2_E, -t) - x * _LOG2_E_REST
    power = tl.exp2(t)
    power += tl.where(tl.abs(t) < 126, power * (rest * _LN_2), 0.0)
    return tl.div_rn(1.0, 1.0 + power)


@triton.jit
def _flip(bits):
    """Bits of f32 to integers in the order of the numbers, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _rank(scores):
    """Integers in the order of the scores, NaN below -inf."""
    return tl.where(scores != scores, _NAN_RANK, _flip(scores.to(tl.int32, bitcast=True)))


@triton.jit
def _best_of_groups(ranks, members, WIDTH: tl.constexpr):
    """Rank and position of the best member of each group, the lowest position of equals."""
    best = tl.max(ranks, axis=1)
    position = tl.min(tl.where(ranks == best[:, None], members, WIDTH), axis=1)
    return best, position


@triton.jit
def routing_kernel(
    logits,
    bias,
    factor,
    topk_ids,
    topk_weights,
    N_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LOG_BLOCK_E: tl.constexpr,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """One token; experts as a tile [groups, members], both rounded up to powers of two."""
    token = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK_G)
    members = tl.arange(0, BLOCK_S)[None, :]
    exists = (groups[:, None] < N_GROUP) & (members < GROUP_SIZE)
    experts = tl.where(exists, groups[:, None] * GROUP_SIZE + members, N_GROUP * GROUP_SIZE)
    x = tl.load(logits + token * (N_GROUP * GROUP_SIZE) + experts, mask=exists, other=0.0)
    best_logit, sum_of_all = 0.0, 1.0
    if SCORING == "softmax":
        every = tl.arange(0, BLOCK_E)
        row = tl.load(
            logits + token * (N_GROUP * GROUP_SIZE) + every,
            mask=every < N_GROUP * GROUP_SIZE,
            other=float("nan"),
        )
        best_logit = formulas.largest(row)
        sum_of_all = formulas.total(row, best_logit, BLOCK_E, LOG_BLOCK_E)
    if SCORING == "sigmoid" and HAS_BIAS:
        scores = _sigmoid(x)
    else:
        scores = formulas.score(x, best_logit, sum_of_all, SCORING)
    if HAS_BIAS:
        biased = scores + tl.load(bias + experts, mask=exists, other=0.0).to(tl.float32)
        if SCORING != "sigmoid":
            biased = formulas.without_denormals(biased)
    else:  # every score rises with its logit, which is not rounded
        biased = formulas.without_denormals(x)
    ranks = tl.where(exists, _rank(biased), _LOWEST)

    first, position = _best_of_groups(ranks, members, BLOCK_S)
    others = tl.where(members == position[:, None], _LOWEST, ranks)
    second = tl.max(others, axis=1)
    first_value = _flip(first).to(tl.float32, bitcast=True)
    second_value = _flip(second).to(tl.float32, bitcast=True)
    if not HAS_BIAS:  # these are logits
        first_value = formulas.score(first_value, best_logit, sum_of_all, SCORING)
        second_value = formulas.score(second_value, best_logit, sum_of_all, SCORING)
    total = first_value + second_value
    if SCORING != "sigmoid" or not HAS_BIAS:
        total = formulas.without_denormals(total)
    group_ranks = tl.where(groups < N_GROUP, _rank(total), _LOWEST)
    kept = groups < 0
    for _ in tl.static_range(TOPK_GROUP):
        best = tl.max(group_ranks, axis=0)
        chosen_group = tl.min(tl.where(group_ranks == best, groups, BLOCK_G), axis=0)
        kept = kept | (groups == chosen_group)
        group_ranks = tl.where(groups == chosen_group, _LOWEST, group_ranks)

    ranks = tl.where(kept[:, None], ranks, _LOWEST)
    choices = tl.arange(0, BLOCK_K)
    ids = tl.zeros((BLOCK_K,), tl.int32)
    chosen = tl.zeros((BLOCK_K,), tl.float32)
    for choice in tl.static_range(TOP_K):
        best = tl.max(tl.max(ranks, axis=1), axis=0)
        equals = tl.where(ranks == best, experts, N_GROUP * GROUP_SIZE)
        expert = tl.min(tl.min(equals, axis=1), axis=0)
        score = tl.sum(tl.sum(tl.where(experts == expert, scores, 0.0), axis=1), axis=0)
        ids = tl.where(choices == choice, expert, ids)
        chosen = tl.where(choices == choice, score, chosen)
        ranks = tl.where(experts == expert, _LOWEST, ranks)

    if RENORMALIZE:
        chosen = tl.div_rn(chosen, tl.sum(chosen, axis=0) + 1e-20)
    weights = chosen * tl.load(factor)
    pairs = token * TOP_K + choices
    tl.store(topk_ids + pairs, ids, mask=choices < TOP_K)
    tl.store(topk_weights + pairs, weights, mask=choices < TOP_K)


def launch(
    routing_logits: Any,
    routing_bias: Any,
    routed_scaling_factor: Any,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    scoring: str = "sigmoid",
    renormalize: bool = True,
) -> Launch:
    """The launch that makes `topk_ids` i32[T,k] and `topk_weights` f32[T,k].

    Args:
        routing_logits: f32[T,E].
        routing_bias: bf16 or f32[E], or None.
        routed_scaling_factor: f32[], in device memory.
        top_k: Experts of a token.
        n_group: Groups of experts, evenly dividing E.
        topk_group: Groups kept.
        scoring: "sigmoid", "softmax" or "sqrtsoftplus".
        renormalize: Whether the weights of a token are divided by their sum.
    """
    num_tokens, num_experts = routing_logits.shape
    group_size = num_experts // n_group
    has_bias = routing_bias is not None
    block = triton.next_power_of_2(num_experts)
    return Launch(
        kernel=routing_kernel,
        # Without a bias anything stands in its place, unread.
        inputs=(
            routing_logits,
            routing_bias if has_bias else routing_logits,
            routed_scaling_factor,
        ),
        scalars=(),
        outputs=(
            jax.ShapeDtypeStruct((num_tokens, top_k), jnp.int32),
            jax.ShapeDtypeStruct((num_tokens, top_k), jnp.float32),
        ),
        grid=(num_tokens,),
        constants={
            "N_GROUP": n_group,
            "GROUP_SIZE": group_size,
            "TOPK_GROUP": topk_group,
            "TOP_K": top_k,
            "BLOCK_G": triton.next_power_of_2(n_group),
            "BLOCK_S": triton.next_power_of_2(group_size),
            "BLOCK_K": triton.next_power_of_2(top_k),
            "BLOCK_E": block,
            "LOG_BLOCK_E": block.bit_length() - 1,
            "SCORING": scoring,
            "HAS_BIAS": has_bias,
            "RENORMALIZE": renormalize,
        },
        num_warps=1 if num_experts <= 512 else 4,
        fuse_products=scoring == "sigmoid" and has_bias,
    )
