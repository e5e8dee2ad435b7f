"""Group plan: a counting sort of the local (token, expert) pairs by expert.

Tokens are split into blocks of one program each. A first kernel counts each block's pairs per
expert; in the second every program adds those counts up and so knows where its pairs go. With one
block the second kernel counts for itself. Nothing is atomic: the order is that of the tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.shapes import cdiv, max_rows
from pallas_kernels.triton.launch import Launch

_MAX_TILE = 8192  # tokens of a block times experts: 64 registers of each of 128 threads
_WANTED_BLOCKS = 256
_MIN_BLOCK_T = 32


@triton.jit
def _local_id(topk_ids, tokens, choice, offset, num_tokens, TOP_K: tl.constexpr, E: tl.constexpr,
              E_LOCAL: tl.constexpr):  # fmt: skip
    """Local expert of one choice of each token, -1 where there is none."""
    ids = tl.load(topk_ids + tokens * TOP_K + choice, mask=tokens < num_tokens, other=-1)
    local = ids - offset
    return tl.where((ids >= 0) & (ids < E) & (local >= 0) & (local < E_LOCAL), local, -1)


@triton.jit
def _hits(topk_ids, tokens, experts, offset, num_tokens, TOP_K: tl.constexpr, E: tl.constexpr,
          E_LOCAL: tl.constexpr):  # fmt: skip
    """1 where a token of the block chose a local expert: i32[tokens, experts]."""
    hits = tl.zeros((tokens.shape[0], experts.shape[0]), tl.int32)
    for choice in tl.static_range(TOP_K):
        local = _local_id(topk_ids, tokens, choice, offset, num_tokens, TOP_K, E, E_LOCAL)
        hits = hits | (local[:, None] == experts[None, :]).to(tl.int32)
    return hits


@triton.jit(do_not_specialize=["num_tokens"])
def count_kernel(
    topk_ids,
    local_expert_offset,
    num_tokens,
    counts,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    E_LOCAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Pairs per expert of one block of tokens; `counts` is i32[blocks, BLOCK_E]."""
    block = tl.program_id(0)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    offset = tl.load(local_expert_offset)
    hits = _hits(topk_ids, tokens, experts, offset, num_tokens, TOP_K, E, E_LOCAL)
    tl.store(counts + block * BLOCK_E + experts, tl.sum(hits, axis=0))


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def plan_kernel(
    topk_ids,
    local_expert_offset,
    counts,
    num_tokens,
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
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """Rows of one block of tokens, and an even share of the padding rows and tiles."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    chunk = tl.arange(0, CHUNK)
    offset = tl.load(local_expert_offset)
    hits = _hits(topk_ids, tokens, experts, offset, num_tokens, TOP_K, E, E_LOCAL)

    before = tl.zeros((BLOCK_E,), tl.int32)
    sizes = tl.zeros((BLOCK_E,), tl.int32)
    if ONE_BLOCK:
        sizes += tl.sum(hits, axis=0)
    else:
        for first in range(0, blocks, CHUNK):
            others = first + chunk
            pairs = tl.load(
                counts + others[:, None] * BLOCK_E + experts[None, :],
                mask=(others < blocks)[:, None],
                other=0,
            )
            sizes += tl.sum(pairs, axis=0)
            before += tl.sum(tl.where((others < block)[:, None], pairs, 0), axis=0)
    tiles = (sizes + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, axis=0)
    offsets = (tile_ends - tiles) * BLOCK_M
    live_tiles = tl.sum(tiles, axis=0)

    rows = (offsets + before)[None, :] + tl.cumsum(hits, axis=0) - hits
    for choice in tl.static_range(TOP_K):
        local = _local_id(topk_ids, tokens, choice, offset, num_tokens, TOP_K, E, E_LOCAL)
        row = tl.sum(tl.where(local[:, None] == experts[None, :], rows, 0), axis=1)
        row = tl.where(local >= 0, row, -1)
        tl.store(pair_row + tokens * TOP_K + choice, row, mask=tokens < num_tokens)
        tl.store(row_token + row, tokens, mask=local >= 0)

    for first in range(block * CHUNK, num_rows, blocks * CHUNK):
        some_rows = first + chunk
        inside = some_rows[:, None] >= offsets[None, :]
        inside = inside & (some_rows[:, None] < (offsets + sizes)[None, :])
        padding = (tl.sum(inside.to(tl.int32), axis=1) == 0) & (some_rows < num_rows)
        tl.store(row_token + some_rows, tl.full((CHUNK,), -1, tl.int32), mask=padding)
    for first in range(block * CHUNK, num_rows // BLOCK_M, blocks * CHUNK):
        some_tiles = first + chunk
        expert = tl.sum((some_tiles[:, None] >= tile_ends[None, :]).to(tl.int32), axis=1)
        expert = tl.where(some_tiles < live_tiles, expert, 0)
        tl.store(tile_expert + some_tiles, expert, mask=some_tiles < num_rows // BLOCK_M)
    if block == 0:
        tl.store(group_sizes + experts, sizes, mask=experts < E_LOCAL)
        tl.store(group_offsets + experts, offsets, mask=experts < E_LOCAL)
        tl.store(num_tiles, live_tiles)


def count_launch(
    topk_ids: Any, local_expert_offset: Any, *, num_local_experts: int, num_experts: int
) -> Launch:
    """The launch that counts the pairs of each block of tokens: i32[blocks, experts padded].

    Args:
        topk_ids: i32[T,k].
        local_expert_offset: i32[], in device memory.
        num_local_experts: E_local.
        num_experts: E.
    """
    num_tokens, top_k = topk_ids.shape
    constants = _constants(num_tokens, top_k, num_local_experts, num_experts)
    blocks = cdiv(num_tokens, constants["BLOCK_T"])
    return Launch(
        kernel=count_kernel,
        inputs=(topk_ids, local_expert_offset),
        scalars=(num_tokens,),
        outputs=(jax.ShapeDtypeStruct((blocks, constants["BLOCK_E"]), jnp.int32),),
        grid=(blocks,),
        constants=constants,
    )


def is_one_block(num_tokens: int, num_local_experts: int) -> bool:
    """Whether the plan needs no counts, being made by one program."""
    return num_tokens <= _MAX_TILE // triton.next_power_of_2(num_local_experts)


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
        counts: From `count_launch`; None where `is_one_block`.
        num_local_experts: E_local.
        num_experts: E.
        block_m: Rows of a tile, a power of two.
    """
    num_tokens, top_k = topk_ids.shape
    constants = _constants(num_tokens, top_k, num_local_experts, num_experts)
    rows = max_rows(num_tokens, top_k, num_local_experts, block_m)
    shapes = ((num_local_experts,),) * 2 + ((rows,), topk_ids.shape, (rows // block_m,), (1,))
    return Launch(
        kernel=plan_kernel,
        inputs=(topk_ids, local_expert_offset, topk_ids if counts is None else counts),
        scalars=(num_tokens, rows),
        outputs=tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes),
        grid=(cdiv(num_tokens, constants["BLOCK_T"]),),
        constants=constants
        | {
            "BLOCK_M": block_m,
            "CHUNK": max(16, _MAX_TILE // 2 // constants["BLOCK_E"]),
            "ONE_BLOCK": counts is None,
        },
    )


def _constants(
    num_tokens: int, top_k: int, num_local_experts: int, num_experts: int
) -> dict[str, Any]:
    block_e = triton.next_power_of_2(num_local_experts)
    max_block_t = max(1, _MAX_TILE // block_e)
    block_t = triton.next_power_of_2(cdiv(num_tokens, _WANTED_BLOCKS))
    if is_one_block(num_tokens, num_local_experts):
        block_t = triton.next_power_of_2(num_tokens)
    block_t = min(max(block_t, _MIN_BLOCK_T), max_block_t)
    return {
        "TOP_K": top_k,
        "E": num_experts,
        "E_LOCAL": num_local_experts,
        "BLOCK_E": block_e,
        "BLOCK_T": block_t,
    }
