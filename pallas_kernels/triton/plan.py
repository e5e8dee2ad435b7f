"""Group plan: a counting sort of the local (token, expert) pairs by expert.

Tokens are dealt to programs. A first kernel counts each program's pairs per expert; in the second
every program adds those counts up and so knows where its pairs go. A pair's place among the 128
that are placed together is found by comparing it with all of them, which takes the same code and
time for any number of experts. Of few pairs every program counts all, which saves a launch. Nothing
is atomic across programs: the order is that of the tokens. Pairs of a token with the same expert
count once and share a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.shapes import cdiv, max_rows
from pallas_kernels.triton.launch import Launch

_PLACED = 128  # pairs at a time: one per thread
_COUNTED = 512  # pairs at a time
_COUNTED_BY_ALL = 2048  # pairs that every program counts itself
_COMPARED = tl.constexpr(32)  # pairs that all are compared with at once
_SLOTS = tl.constexpr(128)  # padding rows or tiles at a time
_MAX_TILE = 4096  # counts read at once: 32 registers of each of 128 threads
_MIN_PROGRAMS, _MAX_PROGRAMS = 64, 256  # at most, of many or few experts


@triton.jit
def _read_pairs(topk_ids, first_token, end_token, offset, TOP_K: tl.constexpr, E: tl.constexpr,
                E_LOCAL: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Pairs of whole tokens, and of each its token, whether there is one, its local expert (or -1).

    Also whether the token has an earlier pair with the same expert.
    """
    inside = tl.arange(0, PAIRS)
    pairs = first_token * TOP_K + inside
    tokens = pairs // TOP_K
    live = (inside < PAIRS // TOP_K * TOP_K) & (tokens < end_token)
    ids = tl.load(topk_ids + pairs, mask=live, other=-1)
    local = ids - offset
    local = tl.where((ids >= 0) & (ids < E) & (local >= 0) & (local < E_LOCAL), local, -1)
    repeated = inside < 0
    for back in tl.range(1, TOP_K, loop_unroll_factor=4):  # so that loads overlap
        same_token = live & (inside % TOP_K >= back)
        repeated |= same_token & (tl.load(topk_ids + pairs - back, mask=same_token) == ids)
    return pairs, tokens, live, local, repeated


@triton.jit
def _count(local, counted, BLOCK_E: tl.constexpr):
    """i32[BLOCK_E], how many of the `counted` pairs chose each local expert."""
    return tl.histogram(tl.maximum(local, 0), BLOCK_E, mask=counted & (local >= 0))


@triton.jit
def _rank(tokens, local, repeated, PAIRS: tl.constexpr):
    """How many earlier tokens of these pairs chose the same expert."""
    compared = tl.arange(0, _COMPARED)
    firsts = tl.where(repeated, -1, local)
    ranks = tl.zeros((PAIRS, _COMPARED), tl.int32)
    for start in range(0, PAIRS, _COMPARED):
        others = tl.gather(firsts, start + compared, 0)[None, :]
        other_tokens = tl.gather(tokens, start + compared, 0)[None, :]
        ranks += ((others == local[:, None]) & (other_tokens < tokens[:, None])).to(tl.int32)
    return tl.sum(ranks, axis=1)


@triton.jit(do_not_specialize=["num_tokens", "program_tokens"])
def count_kernel(
    topk_ids,
    local_expert_offset,
    num_tokens,
    program_tokens,
    counts,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    E_LOCAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Pairs per expert of one program's tokens; `counts` is i32[programs, BLOCK_E]."""
    program = tl.program_id(0)
    offset = tl.load(local_expert_offset)
    end = tl.minimum((program + 1) * program_tokens, num_tokens)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(program * program_tokens, end, PAIRS // TOP_K):
        _, _, _, local, repeated = _read_pairs(
            topk_ids, first, end, offset, TOP_K, E, E_LOCAL, PAIRS
        )
        total += _count(local, repeated == 0, BLOCK_E)
    tl.store(counts + program * BLOCK_E + tl.arange(0, BLOCK_E), total)


@triton.jit(do_not_specialize=["num_tokens", "program_tokens", "num_rows"])
def plan_kernel(
    topk_ids,
    local_expert_offset,
    counts,
    num_tokens,
    program_tokens,
    num_rows,
    group_sizes,
    group_offsets,
    row_token,
    pair_row,
    tile_expert,
    num_tiles,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    E_LOCAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PAIRS: tl.constexpr,
    COUNTED_PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_COUNTED: tl.constexpr,
):
    """Rows of one program's tokens, and an even share of the padding rows and tiles."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    experts = tl.arange(0, BLOCK_E)
    slots = tl.arange(0, _SLOTS)
    nobody = tl.full((_SLOTS,), -1, tl.int32)
    offset = tl.load(local_expert_offset)
    start = program * program_tokens
    end = tl.minimum(start + program_tokens, num_tokens)

    before = tl.zeros((BLOCK_E,), tl.int32)
    sizes = tl.zeros((BLOCK_E,), tl.int32)
    if IS_COUNTED:
        total = tl.zeros((CHUNK, BLOCK_E), tl.int32)
        earlier = tl.zeros((CHUNK, BLOCK_E), tl.int32)
        for first in range(0, programs, CHUNK):
            others = (first + tl.arange(0, CHUNK))[:, None]
            places = counts + others * BLOCK_E + experts[None, :]
            found = tl.load(places, mask=others < programs, other=0)
            total += found
            earlier += tl.where(others < program, found, 0)
        sizes += tl.sum(total, axis=0)
        before += tl.sum(earlier, axis=0)
    else:
        for first in range(0, num_tokens, COUNTED_PAIRS // TOP_K):
            _, tokens, _, local, repeated = _read_pairs(
                topk_ids, first, num_tokens, offset, TOP_K, E, E_LOCAL, COUNTED_PAIRS
            )
            sizes += _count(local, repeated == 0, BLOCK_E)
            before += _count(local, (repeated == 0) & (tokens < start), BLOCK_E)
    tiles = (sizes + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, axis=0)
    offsets = (tile_ends - tiles) * BLOCK_M
    live_tiles = tl.sum(tiles, axis=0)

    next_rows = offsets + before
    for first in range(start, end, PAIRS // TOP_K):
        pairs, tokens, live, local, repeated = _read_pairs(
            topk_ids, first, end, offset, TOP_K, E, E_LOCAL, PAIRS
        )
        row = tl.gather(next_rows, tl.maximum(local, 0), 0) + _rank(tokens, local, repeated, PAIRS)
        tl.store(pair_row + pairs, tl.where(local >= 0, row, -1), mask=live)
        tl.store(row_token + row, tokens, mask=local >= 0)
        next_rows += _count(local, repeated == 0, BLOCK_E)

    for first in range(program * _SLOTS, E_LOCAL * BLOCK_M, programs * _SLOTS):
        expert = tl.minimum((first + slots) // BLOCK_M, E_LOCAL - 1)
        inside = (first + slots) % BLOCK_M
        size = tl.gather(sizes, expert, 0)
        row = tl.gather(offsets, expert, 0) + size + inside
        padding = (size + BLOCK_M - 1) // BLOCK_M * BLOCK_M - size
        is_padding = (inside < padding) & (first + slots < E_LOCAL * BLOCK_M)
        tl.store(row_token + row, nobody, mask=is_padding)
    for first in range(live_tiles * BLOCK_M + program * _SLOTS, num_rows, programs * _SLOTS):
        tl.store(row_token + first + slots, nobody, mask=first + slots < num_rows)
    for first in range(program * _SLOTS, num_rows // BLOCK_M, programs * _SLOTS):
        some_tiles = first + slots
        expert = tl.zeros((_SLOTS,), tl.int32)
        half = BLOCK_E // 2
        while half > 0:
            ends_before = tl.gather(tile_ends, expert + half - 1, 0) <= some_tiles
            expert += tl.where(ends_before, half, 0)
            half = half // 2
        expert = tl.where(some_tiles < live_tiles, expert, 0)
        tl.store(tile_expert + some_tiles, expert, mask=some_tiles < num_rows // BLOCK_M)
    if program == 0:
        tl.store(group_sizes + experts, sizes, mask=experts < E_LOCAL)
        tl.store(group_offsets + experts, offsets, mask=experts < E_LOCAL)
        tl.store(num_tiles, live_tiles)


def count_launch(
    topk_ids: Any, local_expert_offset: Any, *, num_local_experts: int, num_experts: int
) -> Launch:
    """The launch that counts the pairs of each program's tokens: i32[programs, experts padded].

    Args:
        topk_ids: i32[T,k].
        local_expert_offset: i32[], in device memory.
        num_local_experts: E_local.
        num_experts: E.
    """
    num_tokens, top_k = topk_ids.shape
    programs, program_tokens = _deal(num_tokens, top_k, num_local_experts)
    constants = _constants(top_k, num_local_experts, num_experts, _COUNTED)
    return Launch(
        kernel=count_kernel,
        inputs=(topk_ids, local_expert_offset),
        scalars=(num_tokens, program_tokens),
        outputs=(jax.ShapeDtypeStruct((programs, constants["BLOCK_E"]), jnp.int32),),
        grid=(programs,),
        constants=constants,
    )


def is_counted_by_all(num_tokens: int, top_k: int) -> bool:
    """Whether the plan needs no counts, because each of its programs counts all pairs."""
    return num_tokens * top_k <= _COUNTED_BY_ALL


def plan_launch(
    topk_ids: Any,
    local_expert_offset: Any,
    counts: Any | None,
    *,
    num_local_experts: int,
    num_experts: int,
    block_m: int,
) -> Launch:
    """The launch that makes the plan; its outputs are the fields of `GroupPlan`, in order.

    Args:
        topk_ids: i32[T,k].
        local_expert_offset: i32[], in device memory.
        counts: From `count_launch`; None where `is_counted_by_all`.
        num_local_experts: E_local.
        num_experts: E.
        block_m: Rows of a tile, a power of two.
    """
    num_tokens, top_k = topk_ids.shape
    programs, program_tokens = _deal(num_tokens, top_k, num_local_experts)
    constants = _constants(top_k, num_local_experts, num_experts, _PLACED)
    rows = max_rows(num_tokens, top_k, num_local_experts, block_m)
    shapes = ((num_local_experts,),) * 2 + ((rows,), topk_ids.shape, (rows // block_m,), (1,))
    return Launch(
        kernel=plan_kernel,
        inputs=(topk_ids, local_expert_offset, topk_ids if counts is None else counts),
        scalars=(num_tokens, program_tokens, rows),
        outputs=tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes),
        grid=(programs,),
        constants=constants
        | {
            "COUNTED_PAIRS": _pairs(top_k, _COUNTED),
            "BLOCK_M": block_m,
            "CHUNK": max(1, _MAX_TILE // constants["BLOCK_E"]),
            "IS_COUNTED": counts is not None,
        },
    )


def _deal(num_tokens: int, top_k: int, num_local_experts: int) -> tuple[int, int]:
    """How many programs place pairs, and how many tokens each of them has."""
    step = _pairs(top_k, _PLACED) // top_k
    most = _MAX_TILE * 4 // triton.next_power_of_2(num_local_experts)
    steps = cdiv(cdiv(num_tokens, step), min(max(most, _MIN_PROGRAMS), _MAX_PROGRAMS))
    tokens = max(steps, 1) * step
    return cdiv(num_tokens, tokens), tokens


def _pairs(top_k: int, at_once: int) -> int:
    """Pairs that are read together, those of one token at least."""
    return max(triton.next_power_of_2(top_k), at_once)


def _constants(
    top_k: int, num_local_experts: int, num_experts: int, at_once: int
) -> dict[str, Any]:
    return {
        "TOP_K": top_k,
        "E": num_experts,
        "E_LOCAL": num_local_experts,
        "BLOCK_E": max(triton.next_power_of_2(num_local_experts), 32),
        "PAIRS": _pairs(top_k, at_once),
    }
