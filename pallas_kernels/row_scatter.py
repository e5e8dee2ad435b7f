"""Weighted rows of expert tiles added into their tokens' rows, in a fixed order.

The pairs of a token lie in different tiles. Its pair of the lowest local expert overwrites the
token's row, each further one, in the order of the experts, is added by the copy engine (bulk
reduction, bf16, at L2), once the tile of the pair before it has told that it is done. So nobody
reads the row, and bits do not depend on who comes when:

    producer warps 1..3, halfway through a tile:    row -> token, weight, tile of the pair before
    consumer warpgroup, after the last step:        sums * weight -> bf16 -> shared memory
      each thread, for its row:                     wait done[tile before], then store or add
    the same, a few steps into its next tile:       stores complete -> done[tile, column] += 1

Tiles are computed in the order of the experts, so the tile before is almost always done. It never
waits for this one: waits lead from higher to lower experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref, scf
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ptx import (
    asm,
    constant,
    flat,
    global_address,
    i32,
    load_i32,
    shared_address,
    thread_of_warpgroup,
)

ZERO_BYTES = 1024
_WARP = 32
_STORE_HALVES = (
    "{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; "
    "st.shared.b16 [$0+{first}], l; st.shared.b16 [$0+{second}], h; }}"
)
_FULL = 2  # consumer warpgroups that complete a tile
_STORE = "cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], {bytes};"
_ADD = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [$0], [$1], {bytes};"


class Rows(NamedTuple):
    """Shared memory `i32`, `i32`, `f32 [block_m]`: of each row of a tile its token (-1: none), the
    tile of the token's pair before (-1: none), and its weight."""

    token: Any
    before: Any
    weight: Any


def describe_rows(row_token, pair_row, topk_weights, tile, block_m: int, rows: Rows) -> None:
    """Producer: fills `rows` for a tile; warp 0, which feeds the ring, leaves it to the others.

    Args:
        row_token: `i32[M]`.
        pair_row: `i32[T, k]`.
        topk_weights: `f32[T, k]`.
        tile: The tile.
        block_m: Rows of a tile.
        rows: Where to.
    """
    top_k = pair_row.shape[1]
    refs, splat = (plgpu.RefType(),) * 6, plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(*refs, splat, splat))
    def describe(_, row_token, pair_row, weights, token_smem, before_smem, weight_smem, first, live):
        (first,), (live,) = first.registers.flat, live.registers.flat
        thread = thread_of_warpgroup()
        worker = arith.subi(thread, constant(_WARP))

        def describe_row(inside):
            row = arith.addi(first, inside)
            is_live = arith.cmpi(arith.CmpIPredicate.slt, inside, live)
            token = load_i32(row_token, row)
            start = arith.muli(arith.maxsi(token, constant(0)), constant(top_k))
            weight, before = constant(0), constant(-1)
            for k in range(top_k):
                other = load_i32(pair_row, start, k)
                mine = arith.cmpi(arith.CmpIPredicate.eq, other, row)
                weight = arith.select(mine, load_i32(weights, start, k), weight)
                earlier = arith.cmpi(arith.CmpIPredicate.slt, other, row)
                before = arith.maxsi(before, arith.select(earlier, other, constant(-1)))
            tile_before = arith.divsi(before, constant(block_m))
            has_before = arith.cmpi(arith.CmpIPredicate.sge, before, constant(0))
            tile_before = arith.select(has_before, tile_before, constant(-1))
            at = [arith.index_cast(ir.IndexType.get(), inside)]
            memref.store(arith.select(is_live, token, constant(-1)), token_smem, at)
            memref.store(tile_before, before_smem, at)
            memref.store(arith.bitcast(ir.F32Type.get(), weight), weight_smem, at)

        workers = 128 - _WARP
        for start in range(0, block_m, workers):
            inside = arith.addi(worker, constant(start))
            works = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sge, worker, constant(0)),
                arith.cmpi(arith.CmpIPredicate.slt, inside, constant(block_m)),
            )
            with mgpu.utils.when(works):
                describe_row(inside)

    describe(row_token, pair_row, topk_weights, *rows, tile.row, tile.live)


def send_rows(out, done, rows: Rows, staging, tile, width: int, blocks: int, warpgroup) -> None:
    """Consumer: starts storing or adding the warpgroup's staged rows, a row a thread.

    Args:
        out: `bf16[T, H]`.
        done: `i32[row tiles, columns of tiles]`.
        rows: Of the tile.
        staging: `bf16[128, pitch]`, this warpgroup's: of a full tile `[block, 64 tokens]` rows of
            128 columns, else `[tokens]` rows of 64 columns a block.
        tile: The tile.
        width: Its tokens.
        blocks: Weight blocks of the tile, 128 columns of `out` each.
        warpgroup: Index of the consumer.
    """
    refs, splat = (plgpu.RefType(),) * 5, plgpu.Layout.WG_SPLAT
    num_columns, hidden_size, pitch = done.shape[1], out.shape[1], staging.shape[1]
    full = width == 128

    @plgpu.inline_mgpu(arg_types=(*refs, splat, splat))
    def send(_, out, done, token_smem, before_smem, staging, tile_column, warpgroup):
        (tile_column,), (warpgroup,) = tile_column.registers.flat, warpgroup.registers.flat
        thread = thread_of_warpgroup()
        own = arith.muli(warpgroup, constant(64))
        column = arith.muli(tile_column, constant(128 * blocks))
        if full:
            inside, block = arith.remui(thread, constant(64)), arith.divui(thread, constant(64))
            takes = arith.cmpi(arith.CmpIPredicate.ult, block, constant(blocks))
            row = arith.addi(own, inside)
            target = arith.addi(column, arith.muli(block, constant(128)))
            copies = [(arith.muli(thread, constant(pitch)), target, 128)]
        else:
            row = thread
            takes = arith.cmpi(arith.CmpIPredicate.ult, thread, constant(width))
            start = arith.muli(thread, constant(pitch))
            copies = [
                (
                    arith.addi(start, constant(64 * i)),
                    arith.addi(arith.addi(column, own), constant(128 * i)),
                    64,
                )
                for i in range(blocks)
            ]
        with mgpu.utils.when(takes):
            at = [arith.index_cast(ir.IndexType.get(), row)]
            token, before = memref.load(token_smem, at), memref.load(before_smem, at)
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.sge, token, constant(0))):
                adds = arith.cmpi(arith.CmpIPredicate.sge, before, constant(0))
                with mgpu.utils.when(adds):
                    place = arith.addi(arith.muli(before, constant(num_columns)), tile_column)
                    _wait_done(done, place)
                for source, target, size in copies:
                    source = _element(staging, source)
                    target = global_address(out, flat(token, hidden_size, target), 2)
                    branch = scf.IfOp(adds, has_else=True)
                    for block, code in ((branch.then_block, _ADD), (branch.else_block, _STORE)):
                        with ir.InsertionPoint(block):
                            asm(code.format(bytes=2 * size), [target, source], "l,r")
                            scf.yield_([])
        asm("cp.async.bulk.commit_group;", [], "")

    send(out, done, rows.token, rows.before, staging, tile.column, warpgroup)


def stage_rows(values, staging, first_row: int) -> None:
    """`staging[first_row:first_row + 64, :n] = values` for `bf16[64, n]` in registers."""
    pitch = staging.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def stage(_, values, staging):
        row, column = _wgmma_place()
        base = _element(staging, arith.addi(arith.muli(row, constant(pitch)), column))
        for pair, down, right in _wgmma_pairs(values):
            offset = 2 * ((first_row + down) * pitch + right)
            asm(f"st.shared.b32 [$0+{offset}], $1;", [base, pair], "r,r")

    stage(values, staging)


def stage_transposed(values, staging, first_column: int) -> None:
    """`staging[:n, first_column:first_column + 64] = values.T` for `bf16[64, n]` in registers."""
    pitch = staging.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def stage(_, values, staging):
        row, column = _wgmma_place()
        base = _element(staging, arith.addi(arith.muli(column, constant(pitch)), row))
        for pair, down, right in _wgmma_pairs(values):
            offset = 2 * (right * pitch + first_column + down)
            asm(_STORE_HALVES.format(first=offset, second=offset + 2 * pitch), [base, pair], "r,r")

    stage(values, staging)


def _wgmma_place():
    """Row and column of the thread's first element of a matrix in the layout of `wgmma`."""
    thread = thread_of_warpgroup()
    lane = arith.remui(thread, constant(_WARP))
    warp_row = arith.muli(arith.divui(thread, constant(_WARP)), constant(16))
    row = arith.addi(warp_row, arith.divui(lane, constant(4)))
    return row, arith.muli(arith.remui(lane, constant(4)), constant(2))


def _wgmma_pairs(values):
    """The thread's elements, two neighbours of a row each, and their distance from the first."""
    # One address and constant offsets: addresses of all elements would be kept, and spill.
    pairs = list(values.registers.flat)
    assert len(pairs) == values.shape[1] // 4
    for i, pair in enumerate(pairs):
        yield mgpu.utils.bitcast(pair, i32()), 8 * (i % 2), 8 * (i // 2)


def _element(ref, index):
    return arith.addi(shared_address(ref), arith.muli(index, constant(2)))


def wait_staged() -> None:
    """Consumer: the warpgroup's copies have read shared memory, which may be written again."""

    @plgpu.inline_mgpu(arg_types=())
    def wait(_):
        asm("cp.async.bulk.wait_group.read 0;", [], "")
        mgpu.utils.warpgroup_barrier()

    wait()


def announce(done, place_smem) -> None:
    """Consumer: waits for the warpgroup's copies and tells that its part of their tile is done.

    Args:
        done: As in `send_rows`.
        place_smem: `i32[1]`, the tile's place in `done`; -1 for no tile.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def tell(_, done, place):
        asm("cp.async.bulk.wait_group 0;", [], "")
        asm("fence.proxy.async;", [], "")
        mgpu.utils.warpgroup_barrier()
        index = memref.load(place, [mgpu.utils.c(0, ir.IndexType.get())])
        any_tile = arith.cmpi(arith.CmpIPredicate.sge, index, constant(0))
        with mgpu.utils.when(arith.andi(any_tile, _one_thread())):
            address = global_address(done, arith.extsi(ir.IntegerType.get_signless(64), index), 4)
            asm("red.release.gpu.global.add.u32 [$0], 1;", [address], "l")

    tell(done, place_smem)


def zero_rows(out, pair_row, zeros_smem, num_ctas: int, cta) -> None:
    """Producer: starts writing zeros to the rows of tokens that have no local pair.

    Args:
        out: `bf16[T, H]`.
        pair_row: `i32[T, k]`.
        zeros_smem: `i32[ZERO_BYTES / 4]`, filled here.
        num_ctas: CTAs that share the tokens.
        cta: This one.
    """
    num_tokens, top_k = pair_row.shape
    hidden_bytes = 2 * out.shape[1]
    refs = (plgpu.RefType(),) * 3

    @plgpu.inline_mgpu(arg_types=(*refs, plgpu.Layout.WG_SPLAT))
    def fill(_, out, pair_row, zeros, cta):
        (cta,) = cta.registers.flat
        thread = thread_of_warpgroup()
        for first in range(0, ZERO_BYTES // 4, 128):
            at = arith.index_cast(ir.IndexType.get(), arith.addi(thread, constant(first)))
            memref.store(constant(0), zeros, [at])
        mgpu.commit_shared()
        stride = constant(num_ctas * 128)
        start = arith.addi(arith.muli(cta, constant(128)), thread)
        loop = scf.ForOp(start, constant(num_tokens), stride)
        with ir.InsertionPoint(loop.body):
            token = loop.induction_variable
            base = arith.muli(token, constant(top_k))
            highest = constant(-1)
            for k in range(top_k):
                highest = arith.maxsi(highest, load_i32(pair_row, base, k))
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.slt, highest, constant(0))):
                for offset in range(0, hidden_bytes, ZERO_BYTES):
                    size = min(ZERO_BYTES, hidden_bytes - offset)
                    target = global_address(
                        out, flat(token, hidden_bytes // 2, constant(offset // 2)), 2
                    )
                    asm(_STORE.format(bytes=size), [target, shared_address(zeros)], "l,r")
            scf.yield_([])
        asm("cp.async.bulk.commit_group;", [], "")

    fill(out, pair_row, zeros_smem, jnp.int32(cta))


def wait_sent() -> None:
    """All copies of the calling threads have been made."""

    @plgpu.inline_mgpu(arg_types=())
    def wait(_):
        asm("cp.async.bulk.wait_group 0;", [], "")

    wait()


def _wait_done(done, index) -> None:
    address = global_address(done, arith.extsi(ir.IntegerType.get_signless(64), index), 4)
    loop = scf.WhileOp([], [])
    before = loop.before.blocks.append()
    with ir.InsertionPoint.at_block_begin(before):
        found = llvm.inline_asm(
            i32(), [address], "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", has_side_effects=True
        )
        scf.condition(arith.cmpi(arith.CmpIPredicate.slt, found, constant(_FULL)), [])
    after = loop.after.blocks.append()
    with ir.InsertionPoint.at_block_begin(after):
        scf.yield_([])
    asm("fence.proxy.async;", [], "")


def _one_thread():
    return mgpu.utils.single_thread_predicate(scope=mgpu.utils.ThreadSubset.WARPGROUP)
