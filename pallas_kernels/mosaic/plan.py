"""Group plan: which row of the expert-major order each (token, choice) pair gets.

Two kernels, both one warpgroup a block of 64 tokens:

    count   membership [64 tokens, E_local] from topk_ids        -> histogram[block, E_local]
    place   sum of all histograms      -> group_sizes, group_offsets (padded to block_m)
            sum of earlier blocks'     -> first rank of this block in every expert
            strictly-lower-triangle @ membership (wgmma, exact)  -> rank inside the block
            pair_row = offset + ranks; row_token[pair_row] = token; tile_expert

Up to 512 tokens (of 32 experts) there is no `count`: every block counts all of them itself. Rows
of an expert ascend with the token, so the plan, and all that follows from it, is deterministic.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.mosaic import launch, layouts
from pallas_kernels.mosaic.indexed_memory import load_at, store_at
from pallas_kernels.shapes import cdiv, max_rows, round_up

_BLOCK = 64
_MATRIX = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_EXPERT_CHUNK = 32  # columns worked on at once; more would spill
_COUNTED_BY_ALL = 8  # blocks times chunks that each block counts itself: that saves a launch


def plan_groups(
    topk_ids: Int32[Array, "T k"],
    local_expert_offset: Int32[Array, ""],
    *,
    num_local_experts: int,
    num_experts: int,
    block_m: int,
    interpret=None,
) -> tuple[
    Int32[Array, "E_local"],
    Int32[Array, "E_local"],
    Int32[Array, "M"],
    Int32[Array, "T k"],
    Int32[Array, "M/block_m"],
    Int32[Array, "1"],
]:
    """Assigns expert-major rows to the local pairs.

    Args:
        topk_ids: `i32[T, k]` distinct global expert ids; ids outside the local range are skipped.
        local_expert_offset: `i32[]` global id of local expert 0.
        num_local_experts: E_local.
        num_experts: E; ids from E up are skipped even where the local range covers them.
        block_m: Rows every expert is padded to.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `group_sizes`, `group_offsets`, `row_token`, `pair_row`, `tile_expert`, `num_tiles`.
        `row_token` holds -1 in padding rows; past the last live tile it is unwritten.
    """
    num_tokens, top_k = topk_ids.shape
    rows = round_up(max_rows(num_tokens, top_k, num_local_experts, block_m), 32)
    num_blocks = cdiv(num_tokens, _BLOCK)
    padded_experts = round_up(num_local_experts, _BLOCK)
    offset = jnp.reshape(local_expert_offset, (1,)).astype(jnp.int32)
    extent = {"num_experts": num_experts, "num_local_experts": num_local_experts}
    make = functools.partial(
        launch.kernel,
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=16384),
        interpret=interpret,
    )
    histogram = []
    if num_blocks > max(1, _COUNTED_BY_ALL // cdiv(num_local_experts, _EXPERT_CHUNK)):
        count = make(
            functools.partial(_count, **extent, interpret=interpret),
            out_type=jax.ShapeDtypeStruct(
                (round_up(num_blocks, _BLOCK), padded_experts), jnp.int32
            ),
            grid=(round_up(num_blocks, _BLOCK),),
            kernel_name="moe_plan_count",
        )
        histogram = [count(topk_ids, offset)]
    tiles = (plgpu.TilingTransform((8, _EXPERT_CHUNK)), plgpu.SwizzleTransform(64))
    place = make(
        functools.partial(_place, **extent, block_m=block_m, interpret=interpret),
        out_type=(
            jax.ShapeDtypeStruct((num_local_experts,), jnp.int32),
            jax.ShapeDtypeStruct((num_local_experts,), jnp.int32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
            jax.ShapeDtypeStruct((num_tokens, top_k), jnp.int32),
            jax.ShapeDtypeStruct((cdiv(rows, block_m),), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ),
        scratch_types=[
            plgpu.SMEM((_BLOCK, padded_experts), jnp.bfloat16, transforms=tiles),
            plgpu.SMEM((_BLOCK, _BLOCK), jnp.bfloat16, transforms=tiles),
            plgpu.SMEM((padded_experts,), jnp.int32),
        ],
        grid=(num_blocks,),
        kernel_name="moe_plan_place",
    )
    return place(topk_ids, offset, *histogram)


def _count(ids_gmem, offset_gmem, histogram_gmem, *, num_experts, num_local_experts, interpret):
    block = lax.axis_index("block")
    choices = _local_choices(
        ids_gmem, offset_gmem[0], block, num_experts, num_local_experts, interpret
    )
    for chunk in range(histogram_gmem.shape[1] // _EXPERT_CHUNK):
        counts = jnp.sum(_membership(choices, chunk), axis=0)
        histogram_gmem[block, pl.ds(chunk * _EXPERT_CHUNK, _EXPERT_CHUNK)] = counts


def _place(ids_gmem, offset_gmem, *refs, num_experts, num_local_experts, block_m, interpret):
    *histogram, sizes_gmem, offsets_gmem, row_token_gmem, pair_row_gmem, tiles_gmem, \
        num_tiles_gmem, member_smem, earlier_smem, padded_smem = refs  # fmt: skip
    num_tokens, top_k = ids_gmem.shape
    block = lax.axis_index("block")
    chunks = range(cdiv(num_local_experts, _EXPERT_CHUNK))
    local_choices = functools.partial(
        _local_choices, ids_gmem, offset_gmem[0],
        num_experts=num_experts, num_local_experts=num_local_experts, interpret=interpret,
    )  # fmt: skip
    choices = local_choices(block)
    members = [_membership(choices, chunk) for chunk in chunks]

    sizes, before = [], []
    for chunk in chunks:
        if histogram:
            total, earlier = _sum_histogram(histogram[0], chunk, block)
        elif num_tokens > _BLOCK:
            total, earlier = _sum_blocks(local_choices, cdiv(num_tokens, _BLOCK), chunk, block)
        else:
            total = jnp.sum(members[chunk], axis=0)
            earlier = total * 0
        sizes.append(total)
        before.append(earlier)
        padded_smem[_expert_slice(chunk)] = _round_up(total, block_m)
        member_smem[:, _expert_slice(chunk)] = members[chunk].astype(jnp.bfloat16)
    for chunk in range(len(chunks), padded_smem.shape[0] // _EXPERT_CHUNK):
        nobody = layouts.iota((_EXPERT_CHUNK,), 0, _COLUMNS) < 0  # a bare zero cannot be stored
        padded_smem[_expert_slice(chunk)] = layouts.as_int(nobody)
    matrix = (_BLOCK, _BLOCK)
    earlier = layouts.iota(matrix, 1, _MATRIX) < layouts.iota(matrix, 0, _MATRIX)
    earlier_smem[...] = jnp.where(earlier, 1.0, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()
    offsets = [_exclusive_sum(padded_smem, chunk) for chunk in chunks]

    rows = [jnp.zeros((_BLOCK,), jnp.int32)] * top_k
    for chunk in chunks:
        rank = _rank_in_block(earlier_smem, member_smem, chunk)
        position = lax.broadcast_in_dim(offsets[chunk] + before[chunk], rank.shape, [1]) + rank
        expert = _expert_ids(chunk)
        for k in range(top_k):
            mine = expert == lax.broadcast_in_dim(choices[k], rank.shape, [0])
            rows[k] += jnp.sum(jnp.where(mine, position, 0), axis=1)

    token = layouts.iota((_BLOCK,), 0, _ROWS) + block * _BLOCK
    store = functools.partial(store_at, layout=_ROWS, interpret=interpret)
    for k in range(top_k):
        live = token < num_tokens
        local = live & (choices[k] >= 0)
        store(pair_row_gmem, token * top_k + k, jnp.where(local, rows[k], -1), live)
        store(row_token_gmem, rows[k], token, local)
    ends = [
        lax.div(o + _round_up(s, block_m), jnp.int32(block_m))
        for o, s in zip(offsets, sizes, strict=True)
    ]
    _store_tiles(tiles_gmem, ends, num_local_experts, block, ids_gmem, interpret)

    @pl.when(block == 0)
    def _groups():
        for chunk in chunks:
            expert = layouts.iota((_EXPERT_CHUNK,), 0, _COLUMNS) + chunk * _EXPERT_CHUNK
            put = functools.partial(store_at, layout=_COLUMNS, interpret=interpret)
            put(sizes_gmem, expert, sizes[chunk], expert < num_local_experts)
            put(offsets_gmem, expert, offsets[chunk], expert < num_local_experts)
            last = expert - (num_local_experts - 1)  # num_tiles[0] is where the last expert ends
            put(num_tiles_gmem, last, ends[chunk], last == 0)
            _mark_padding(row_token_gmem, sizes[chunk], offsets[chunk], block_m, interpret)


def _local_choices(ids_gmem, offset, block, num_experts, num_local_experts, interpret):
    """`top_k` vectors `i32[64]`: the local expert of each token's k-th choice, or -1."""
    num_tokens, top_k = ids_gmem.shape
    token = layouts.iota((_BLOCK,), 0, _ROWS) + block * _BLOCK
    start = lax.min(token, jnp.int32(num_tokens - 1)) * top_k
    choices = []
    for k in range(top_k):
        expert = load_at(ids_gmem, start + k, layout=_ROWS, interpret=interpret)
        local = expert - offset
        known = (expert >= 0) & (expert < num_experts) & (token < num_tokens)
        choices.append(jnp.where(known & (local >= 0) & (local < num_local_experts), local, -1))
    return choices


def _expert_slice(chunk):
    return pl.ds(chunk * _EXPERT_CHUNK, _EXPERT_CHUNK)


def _expert_ids(chunk):
    return layouts.iota((_BLOCK, _EXPERT_CHUNK), 1, _MATRIX) + chunk * _EXPERT_CHUNK


def _membership(choices, chunk):
    """`i32[64 tokens, 32 experts]`, 1 where the token chose the expert."""
    bits = []  # an expert each: an element then takes two instructions, not two a choice
    for choice in choices:
        expert = choice - chunk * _EXPERT_CHUNK
        inside = (expert >= 0) & (expert < _EXPERT_CHUNK)
        bits.append(lax.shift_left(layouts.as_int(inside), expert & (_EXPERT_CHUNK - 1)))
    chosen = functools.reduce(lax.bitwise_or, bits)
    column = layouts.iota((_BLOCK, _EXPERT_CHUNK), 1, _MATRIX)
    return lax.shift_right_logical(lax.broadcast_in_dim(chosen, column.shape, [0]), column) & 1


def _round_up(counts, multiple):
    return lax.div(counts + (multiple - 1), jnp.int32(multiple)) * multiple


def _sum_histogram(histogram_gmem, chunk, block):
    """Sums the block histograms: all of them, and those before `block`."""
    zero = plgpu.layout_cast(jnp.zeros((_EXPERT_CHUNK,), jnp.int32), _COLUMNS)

    def add(step, carry):
        total, earlier = carry
        counts = plgpu.load(
            histogram_gmem.at[pl.ds(step * _BLOCK, _BLOCK), _expert_slice(chunk)],
            layout=_MATRIX,
            optimized=False,
        )
        index = layouts.iota(counts.shape, 0, _MATRIX) + step * _BLOCK
        before = jnp.where(index < block, counts, 0)
        return total + jnp.sum(counts, axis=0), earlier + jnp.sum(before, axis=0)

    return lax.fori_loop(0, histogram_gmem.shape[0] // _BLOCK, add, (zero, zero))


def _sum_blocks(local_choices, num_blocks, chunk, block):
    """As `_sum_histogram`, from the ids of all blocks."""
    zero = plgpu.layout_cast(jnp.zeros((_BLOCK, _EXPERT_CHUNK), jnp.int32), _MATRIX)

    def add(step, carry):
        choices, members = carry
        following = local_choices(step + 1)  # on their way while these are counted
        return following, members + _membership(choices, chunk)

    choices, earlier = lax.fori_loop(0, block, add, (local_choices(jnp.int32(0)), zero))
    _, later = lax.fori_loop(block, num_blocks, add, (choices, zero))
    earlier = jnp.sum(earlier, axis=0)
    return earlier + jnp.sum(later, axis=0), earlier


def _exclusive_sum(padded_smem, chunk):
    """`i32[32]`: for each expert of the chunk the sum over the experts before it."""
    column = _expert_ids(chunk)
    total = plgpu.layout_cast(jnp.zeros((_EXPERT_CHUNK,), jnp.int32), _COLUMNS)
    for first in range(0, (chunk + 1) * _EXPERT_CHUNK, _BLOCK):
        row = layouts.iota(column.shape, 0, _MATRIX) + first
        size = plgpu.load(padded_smem.at[pl.ds(first, _BLOCK)], layout=_ROWS)
        size = lax.broadcast_in_dim(size, column.shape, [0])
        total += jnp.sum(jnp.where(row < column, size, 0), axis=0)
    return total


def _rank_in_block(earlier_smem, member_smem, chunk):
    """`i32[64 tokens, 32 experts]`: how many earlier tokens of the block chose the expert."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, earlier_smem, member_smem.at[:, _expert_slice(chunk)])
        return accumulator[...]

    ranks = pl.run_scoped(multiply, plgpu.ACC((_BLOCK, _EXPERT_CHUNK), jnp.float32))
    return ranks.astype(jnp.int32)


def _mark_padding(row_token_gmem, sizes, offsets, block_m, interpret):
    """Writes -1 to the rows between an expert's last token and its last tile's end."""
    shape = (_BLOCK, _EXPERT_CHUNK)
    across = functools.partial(lax.broadcast_in_dim, shape=shape, broadcast_dimensions=[1])
    first, padding = across(offsets + sizes), across(_round_up(sizes, block_m) - sizes)
    for start in range(0, block_m, _BLOCK):
        index = layouts.iota(shape, 0, _MATRIX) + start
        nobody = lax.min(index, -1)
        store = functools.partial(store_at, layout=_MATRIX, interpret=interpret)
        store(row_token_gmem, first + index, nobody, index < padding)


def _store_tiles(tiles_gmem, ends, num_local_experts, block, ids_gmem, interpret):
    """`tile_expert[i]`: the number of experts that end at or before tile i; 0 when i is dead."""
    num_tiles = tiles_gmem.shape[0]
    num_blocks = cdiv(ids_gmem.shape[0], _BLOCK)

    @pl.loop(block, cdiv(num_tiles, _BLOCK), step=num_blocks)
    def _tile_block(tile_block):
        tile = layouts.iota((_BLOCK, _EXPERT_CHUNK), 0, _MATRIX) + tile_block * _BLOCK
        passed = plgpu.layout_cast(jnp.zeros((_BLOCK,), jnp.int32), _ROWS)
        for chunk, end in enumerate(ends):
            ended = tile >= lax.broadcast_in_dim(end, tile.shape, [1])
            counted = ended & (_expert_ids(chunk) < num_local_experts)
            passed += jnp.sum(layouts.as_int(counted), axis=1)
        index = layouts.iota((_BLOCK,), 0, _ROWS) + tile_block * _BLOCK
        expert = jnp.where(passed < num_local_experts, passed, 0)
        store_at(tiles_gmem, index, expert, index < num_tiles, layout=_ROWS, interpret=interpret)
