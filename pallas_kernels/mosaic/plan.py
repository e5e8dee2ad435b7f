"""Group plan: which row of the expert-major order each (token, choice) pair gets.

Two kernels of one warpgroup per block of tokens. Both keep a bit per token and local expert in
shared memory, a word for each 32 tokens, so their code does not depend on how many experts there
are:

    count   one OR per pair            -> members[word, expert]
            ones of an expert's words  -> histogram[block, expert]
    place   one OR per pair            -> members[word, expert]
            sum of all histograms      -> group sizes
            sum of earlier blocks'     -> how many earlier tokens chose the expert
            running sum over experts   -> group_offsets (padded to block_m)
            a thread per pair          -> pair_row = offset + earlier tokens' + ones below its bit,
                                          row_token[pair_row] = token
            a thread per padding row   -> row_token = -1
            a thread per tile          -> tile_expert, by bisection of the experts' ends
            the first block            -> zeros that the matmuls count in

Of few pairs there is no `count`: every block sets the bits of all tokens. Rows of an expert ascend
with the token, so the plan, and all that follows from it, is deterministic. A token that names an
expert twice sets one bit, so both pairs get one row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.mosaic import lanes, launch, layouts, membership
from pallas_kernels.mosaic.indexed_memory import add_at, load_at, store_at
from pallas_kernels.mosaic.membership import THREADS, WORD, TopkIds, flat, threads
from pallas_kernels.shapes import cdiv, max_rows, round_up
from pallas_kernels.types import GroupPlan

_COUNTED_BY_ALL = 4096  # pairs that each block counts itself: that saves a launch
_MAX_WORDS = 8192  # of members in shared memory
_MAX_BLOCKS = 64  # the place kernel reads the histogram of all of them
_MAX_BLOCK_WORDS = 16
_HISTOGRAM_STEP = 4 * THREADS  # counts read at once


def plan_groups(
    topk_ids: Int32[Array, "T k"],
    local_expert_offset: Int32[Array, ""],
    *,
    num_local_experts: int,
    num_experts: int,
    block_m: int,
    interpret=None,
) -> GroupPlan:
    """The plan of `plan_with_zeros`, whose arguments these are."""
    plan, _ = plan_with_zeros(
        topk_ids,
        local_expert_offset,
        num_local_experts=num_local_experts,
        num_experts=num_experts,
        block_m=block_m,
        interpret=interpret,
    )
    return plan


def plan_with_zeros(
    topk_ids: Int32[Array, "T k"],
    local_expert_offset: Int32[Array, ""],
    *,
    num_local_experts: int,
    num_experts: int,
    block_m: int,
    zeros: Sequence[int] = (),
    interpret=None,
) -> tuple[GroupPlan, tuple[Int32[Array, " n"], ...]]:
    """Assigns expert-major rows to the local pairs, and clears some memory.

    Args:
        topk_ids: `i32[T, k]` global expert ids; ids outside the local range are skipped. Pairs of
            one token with the same id share a row.
        local_expert_offset: `i32[]` global id of local expert 0.
        num_local_experts: E_local.
        num_experts: E; ids from E up are skipped even where the local range covers them.
        block_m: Rows every expert is padded to.
        zeros: Lengths of arrays to clear on the way, which saves a launch.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        The plan, whose `row_token` is unwritten past the last live tile, and arrays of zeros.
    """
    num_tokens, top_k = topk_ids.shape
    rows = round_up(max_rows(num_tokens, top_k, num_local_experts, block_m), 32)
    shapes = (
        *((num_local_experts,),) * 2, (rows,), topk_ids.shape, (cdiv(rows, block_m),), (1,),
        *((length,) for length in zeros),
    )  # fmt: skip
    if num_tokens == 0:
        return _split([jnp.zeros(shape, jnp.int32) for shape in shapes])
    offset = jnp.reshape(local_expert_offset, (1,)).astype(jnp.int32)
    sizes = _sizes(num_tokens, top_k, num_local_experts)
    experts = {"num_experts": num_experts, "num_local_experts": num_local_experts}
    kernel = functools.partial(
        launch.kernel,
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    histogram = []
    if sizes.counted_rows:
        count = kernel(
            functools.partial(_count, sizes=sizes, **experts, interpret=interpret),
            out_type=jax.ShapeDtypeStruct((sizes.counted_rows * sizes.columns,), jnp.int32),
            scratch_types=[plgpu.SMEM((sizes.words * sizes.width,), jnp.int32)],
            grid=(sizes.counted_rows,),
            kernel_name="moe_plan_count",
        )
        histogram = [count(topk_ids, offset)]
    place = kernel(
        functools.partial(_place, sizes=sizes, **experts, block_m=block_m, interpret=interpret),
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes),
        scratch_types={
            "members": plgpu.SMEM((sizes.words * sizes.width,), jnp.int32),
            "first_rows": plgpu.SMEM((sizes.block_words * sizes.width,), jnp.int32),
            **{
                name: plgpu.SMEM((sizes.width,), jnp.int32)
                for name in ("counts", "earlier", "starts", "tile_ends")
            },
            "warp_rows": plgpu.SMEM((layouts.ROWS_PER_WARPGROUP,), jnp.int32),
        },
        grid=(sizes.num_blocks,),
        kernel_name="moe_plan_place",
    )
    return _split(place(topk_ids, offset, *histogram))


def _split(arrays) -> tuple[GroupPlan, Any]:
    end = len(GroupPlan._fields)
    return GroupPlan(*arrays[:end]), tuple(arrays[end:])


class _Sizes(NamedTuple):
    """How tokens and experts are dealt to blocks and to shared memory.

    Attributes:
        num_blocks: Blocks of the place kernel.
        block_words: Words of 32 tokens that a block gives rows to.
        words: Rows of `members`: the words of all tokens, or of one block where there is `count`.
        width: Columns of `members`: experts, rounded up so that every thread has one.
        columns: Columns of the histogram.
        counted_rows: Its rows; 0 where every block counts all tokens.
    """

    num_blocks: int
    block_words: int
    words: int
    width: int
    columns: int
    counted_rows: int


def _sizes(num_tokens: int, top_k: int, num_local_experts: int) -> _Sizes:
    experts = _power_of_two(num_local_experts)
    width, columns = max(experts, THREADS), max(experts, WORD)
    words = cdiv(num_tokens, WORD)
    if num_tokens * top_k <= _COUNTED_BY_ALL and words * width <= _MAX_WORDS:
        return _Sizes(words, 1, membership.unrollable(words), width, columns, 0)
    block_words = min(cdiv(words, _MAX_BLOCKS), _MAX_BLOCK_WORDS, max(_MAX_WORDS // width, 1))
    block_words = membership.unrollable(block_words)
    num_blocks = cdiv(words, block_words)
    step = max(columns, _HISTOGRAM_STEP)
    steps = membership.unrollable(cdiv(num_blocks * columns, step))
    return _Sizes(num_blocks, block_words, block_words, width, columns, steps * step // columns)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _count(ids_gmem, offset_gmem, histogram_gmem, members, *, sizes, interpret, **experts):
    block = lax.axis_index("block")
    topk_ids = TopkIds(ids_gmem, offset_gmem[0], **experts, interpret=interpret)
    first_word = block * sizes.block_words
    membership.clear(members)
    loaded = membership.load_first(topk_ids, first_word, sizes.words)
    lanes.sync(interpret)
    membership.mark(members, topk_ids, loaded, first_word, sizes.words, sizes.width)
    lanes.sync(interpret)

    @pl.loop(0, sizes.width // THREADS)
    def _experts(step):
        expert = threads(THREADS) + step * THREADS
        how = {"layout": flat(expert), "interpret": interpret}

        def add(word, total):
            return total + membership.ones(members, word * sizes.width + expert, **how)

        total = membership.fold(sizes.words, add, expert * 0)
        place = block * sizes.columns + expert
        store_at(histogram_gmem, place, total, expert < sizes.columns, **how)


def _place(
    ids_gmem, offset_gmem, *refs, sizes, block_m, interpret,
    members, first_rows, counts, earlier, starts, tile_ends, warp_rows, **experts,
):  # fmt: skip
    inputs = 1 if sizes.counted_rows else 0
    histogram, (plan, zeros) = refs[:inputs], _split(refs[inputs:])
    sizes_gmem, offsets_gmem, row_token_gmem, pair_row_gmem, tiles_gmem, num_tiles_gmem = plan
    block = lax.axis_index("block")
    topk_ids = TopkIds(ids_gmem, offset_gmem[0], **experts, interpret=interpret)
    _clear(zeros, block, interpret)
    block_word = block * sizes.block_words
    first_word = block_word if histogram else jnp.int32(0)
    for ref in (members, counts, earlier) if histogram else (members,):
        membership.clear(ref)
    loaded = membership.load_first(topk_ids, first_word, sizes.words)
    lanes.sync(interpret)
    if histogram:
        _sum_histogram(histogram[0], counts, earlier, block, sizes, interpret)
    membership.mark(members, topk_ids, loaded, first_word, sizes.words, sizes.width)
    lanes.sync(interpret)

    # A thread per expert from here on, neighbours to the lanes of a warp.
    num_local_experts = topk_ids.num_local_experts
    shape, layout = (layouts.ROWS_PER_WARPGROUP, WORD), layouts.row_per_warp(WORD)
    how = {"layout": layout, "interpret": interpret}
    warp, lane = layouts.iota(shape, 0, layout), layouts.iota(shape, 1, layout)
    per_warp = sizes.width // THREADS  # experts of a lane

    def expert_of(step):
        return (warp * per_warp + step) * WORD + lane

    def count_all(expert):
        def add(word, carry):
            found = membership.ones(members, word * sizes.width + expert, **how)
            is_earlier = lax.broadcast(word, shape) < block_word
            return carry[0] + found, carry[1] + jnp.where(is_earlier, found, 0)

        for ref, count in zip(
            (counts, earlier), membership.fold(sizes.words, add, (lane * 0,) * 2), strict=True
        ):
            store_at(ref, expert, count, **how)

    def add_rows(step, rows):
        """Where an expert starts among the warp's, and where the next one does."""
        expert = expert_of(step)
        if not histogram:
            count_all(expert)
        padded = _round_up(load_at(counts, expert, **how), block_m)
        through = lanes.running_sum(padded, interpret=interpret)
        store_at(starts, expert, rows + through - padded, **how)
        return rows + lax.broadcast_in_dim(jnp.max(through, axis=1), shape, [0])

    rows = lax.fori_loop(0, per_warp, add_rows, lane * 0)
    store_at(warp_rows, warp, rows, lane == 0, **how)
    lanes.sync(interpret)
    before = lane * 0
    for other in range(shape[0] - 1):
        before += jnp.where(warp > other, load_at(warp_rows, lax.min(warp, other), **how), 0)

    @pl.loop(0, per_warp)
    def _experts(step):
        expert = expert_of(step)
        count = load_at(counts, expert, **how)
        start = load_at(starts, expert, **how) + before
        end = lax.div(start + _round_up(count, block_m), jnp.int32(block_m))
        store_at(starts, expert, start, **how)
        store_at(tile_ends, expert, end, **how)

        def place_word(word, row):
            store_at(first_rows, word * sizes.width + expert, row, **how)
            place = (block_word - first_word + word) * sizes.width + expert
            return row + membership.ones(members, place, **how)

        row = start + load_at(earlier, expert, **how)
        membership.fold(sizes.block_words, place_word, row)
        is_told = (expert < num_local_experts) & (lax.broadcast(block, shape) == 0)
        store_at(sizes_gmem, expert, count, is_told, **how)
        store_at(offsets_gmem, expert, start, is_told, **how)
        last = expert - (num_local_experts - 1)  # num_tiles[0] is where the last expert ends
        store_at(num_tiles_gmem, last, end, is_told & (last == 0), **how)

    lanes.sync(interpret)
    own = (block_word - first_word) * sizes.width
    _place_pairs(topk_ids, members, own, first_rows, row_token_gmem, pair_row_gmem, block, sizes)
    deal = {"block": block, "num_blocks": sizes.num_blocks, "interpret": interpret}
    _mark_padding(row_token_gmem, counts, starts, num_local_experts, block_m, **deal)
    _store_tiles(tiles_gmem, tile_ends, num_local_experts, **deal)


def _clear(refs, block, interpret):
    """The first block writes zeros."""
    for ref in refs:
        for first in range(0, ref.shape[0], THREADS):
            place = threads(THREADS) + first
            is_mine = (place < ref.shape[0]) & (lax.broadcast(block, place.shape) == 0)
            nothing = lax.min(place, 0)  # a bare 0 has no layout
            store_at(ref, place, nothing, is_mine, layout=flat(place), interpret=interpret)


def _round_up(counts, multiple):
    return lax.div(counts + (multiple - 1), jnp.int32(multiple)) * multiple


def _sum_histogram(histogram_gmem, counts, earlier, block, sizes, interpret):
    """Adds up the block histograms: all of them, and those before `block`."""
    shape = (_HISTOGRAM_STEP,)
    layout = plgpu.Layout.WG_STRIDED(shape, _HISTOGRAM_STEP // THREADS)
    how = {"layout": layout, "interpret": interpret}
    stride = max(sizes.columns, shape[0])
    rows_per_step = stride // sizes.columns
    place = layouts.iota(shape, 0, layout)
    column = place & (sizes.columns - 1)
    row_in_step = lax.div(place, jnp.int32(sizes.columns))

    @pl.loop(0, stride // shape[0])
    def _piece(piece):
        def add(step, carry):
            here = histogram_gmem.at[pl.ds(step * stride + piece * shape[0], shape[0])]
            found = plgpu.load(here, layout=layout, optimized=False)
            is_earlier = row_in_step + step * rows_per_step < block
            return carry[0] + found, carry[1] + jnp.where(is_earlier, found, 0)

        steps = sizes.counted_rows // rows_per_step
        total, before = membership.fold(steps, add, (place * 0,) * 2)
        add_at(counts, column + piece * shape[0], total, **how)
        add_at(earlier, column + piece * shape[0], before, **how)


def _place_pairs(topk_ids, members, own, first_rows, row_token_gmem, pair_row_gmem, block, sizes):
    """Rows of the block's pairs; its words start at the element `own` of `members`."""
    steps, size = topk_ids.steps(sizes.block_words)
    first, end = (topk_ids.first_pair((block + i) * sizes.block_words) for i in range(2))
    end = lax.min(end, jnp.int32(topk_ids.num_pairs))

    @pl.loop(0, steps)
    def _pairs(step):
        pair = threads(size) + (first + step * size)
        how = {"layout": flat(pair), "interpret": topk_ids.interpret}
        local, token = topk_ids.local(pair, topk_ids.load(pair)), topk_ids.token(pair)
        is_local = (pair < end) & (local >= 0)
        word = membership.word_of(token) - block * sizes.block_words
        place = jnp.where(is_local, word * sizes.width + local, 0)
        below = membership.bit_of(token) - 1
        row = load_at(first_rows, place, **how)
        row += membership.ones(members, own + place, mask=below, **how)
        store_at(pair_row_gmem, pair, jnp.where(is_local, row, -1), pair < end, **how)
        store_at(row_token_gmem, row, token, is_local, **how)


def _mark_padding(
    row_token_gmem, counts, starts, num_local_experts, block_m, *, block, num_blocks, interpret
):
    """Writes -1 to the rows between an expert's last token and its last tile's end."""
    num_slots = num_local_experts * block_m
    size = THREADS * (4 if num_slots > num_blocks * THREADS else 1)

    @pl.loop(0, cdiv(num_slots, num_blocks * size))
    def _slots(step):
        slot = threads(size) + (step * num_blocks + block) * size
        how = {"layout": flat(slot), "interpret": interpret}
        expert = lax.min(lax.div(slot, jnp.int32(block_m)), jnp.int32(num_local_experts - 1))
        inside = lax.rem(slot, jnp.int32(block_m))
        count = load_at(counts, expert, **how)
        row = load_at(starts, expert, **how) + count + inside
        is_padding = (inside < _round_up(count, block_m) - count) & (slot < num_slots)
        nobody = lax.min(inside, -1)  # a bare -1 has no layout
        store_at(row_token_gmem, row, nobody, is_padding, **how)


def _store_tiles(tiles_gmem, tile_ends, num_local_experts, *, block, num_blocks, interpret):
    """`tile_expert[i]`: the number of experts that end at or before tile i; 0 when i is dead."""
    (num_tiles,) = tiles_gmem.shape

    @pl.loop(0, cdiv(num_tiles, num_blocks * THREADS))
    def _tiles(step):
        tile = threads(THREADS) + (step * num_blocks + block) * THREADS
        how = {"layout": flat(tile), "interpret": interpret}
        passed = lax.min(tile, 0)  # Mosaic cannot lower loads from a constant place
        live = tile < load_at(tile_ends, passed + (num_local_experts - 1), **how)
        half = _power_of_two(num_local_experts) // 2
        while half:
            passed += jnp.where(load_at(tile_ends, passed + (half - 1), **how) <= tile, half, 0)
            half //= 2
        store_at(tiles_gmem, tile, jnp.where(live, passed, 0), tile < num_tiles, **how)
