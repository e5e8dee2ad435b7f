"""Down-projection that adds every row, weighted, into its token's row: no `combine` after it.

epilogue of tokens x weights    f32[64 tokens, 128] a block, times the rows' weights -> bf16
                                -> shared memory -> a row a thread is stored or added (`row_scatter`)
         of weights x tokens    the same from f32[64 columns, tokens] a block
producer, beside the ring       zeros to tokens without a local pair; rows' tokens and weights
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Int32

from pallas_kernels import row_scatter
from pallas_kernels.block_scaled_matmul import (
    CONSUMER_ROWS,
    NUM_CONSUMERS,
    Companion,
    GroupedRows,
    MatmulConfig,
    grouped_matmul,
)
from pallas_kernels.device import num_sms
from pallas_kernels.shapes import QUANT_BLOCK

_PITCH = QUANT_BLOCK + 8  # elements; rows 16 bytes apart modulo 128 share no bank


def combining_down_projection(
    rows: GroupedRows,
    gemm2_weights: Float8e4m3fn[Array, "E H I"],
    gemm2_weights_scale: Float[Array, "E H/128 I/128"],
    row_token: Int32[Array, "M"],
    pair_row: Int32[Array, "T k"],
    topk_weights: Float[Array, "T k"],
    *,
    config: MatmulConfig,
) -> BFloat16[Array, "T H"]:
    """`out[t] = sum over local k of topk_weights[t, k] * (rows @ gemm2_weights[expert].T)[row]`.

    Products are summed in f32; each weighted row is rounded to bf16, and so is every sum, in the
    order of the experts. GPU only: the interpreter has neither bulk reductions nor flags.

    Args:
        rows: Activations `[M, I]` with their plan.
        gemm2_weights: `e4m3[E, H, I]`.
        gemm2_weights_scale: `f32[E, H/128, I/128]`.
        row_token: `i32[M]`, the token of each row.
        pair_row: `i32[T, k]`, the row of each pair, -1 for none.
        topk_weights: `f32[T, k]`.
        config: Tile and ring.

    Returns:
        `bf16[T, H]`, zeros for tokens without a local pair.

    Raises:
        ValueError: The configuration needs more shared memory than there is.
    """
    hidden_size, block_m = gemm2_weights.shape[1], config.block_m
    blocks = 1 if hidden_size // QUANT_BLOCK % 2 else 2
    num_columns = hidden_size // (blocks * QUANT_BLOCK)
    staged = (NUM_CONSUMERS, max(block_m, blocks * CONSUMER_ROWS), _PITCH)
    config.check_smem(
        blocks, math.prod(staged) * 2 + 3 * max(4 * block_m, 1024) + 2048 + row_scatter.ZERO_BYTES
    )
    # Zeros that depend on data: XLA may not keep them as a constant, which the kernel would change.
    zero = lax.min(jnp.abs(rows.num_tiles[0]), 0)
    done = jnp.full((rows.num_rows // block_m, num_columns), zero, jnp.int32)
    return grouped_matmul(
        rows,
        gemm2_weights,
        gemm2_weights_scale,
        config=config,
        num_columns=num_columns,
        weight_blocks=lambda column: tuple(column * blocks + i for i in range(blocks)),
        epilogue=_add_columns,
        row_epilogue=_add_rows,
        out_type=jax.ShapeDtypeStruct((pair_row.shape[0], hidden_size), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM(staged, jnp.bfloat16),
            plgpu.SMEM((block_m,), jnp.int32),
            plgpu.SMEM((block_m,), jnp.int32),
            plgpu.SMEM((block_m,), jnp.float32),
            plgpu.SMEM((row_scatter.ZERO_BYTES // 4,), jnp.int32),
            plgpu.SMEM((NUM_CONSUMERS,), jnp.int32),
        ],
        name="moe_combining_down_projection",
        companion=Companion(
            inputs=(row_token, pair_row, topk_weights, done),
            halfway=_halfway(block_m, config.sms or num_sms()),
            start_consumer=lambda refs: _set_place(refs, jnp.int32(-1)),
            early=_announce,
            finish_producer=_finish_producer(config.sms or num_sms()),
            finish_consumer=_announce,
        ),
    )


def _halfway(block_m: int, sms: int):
    def describe(refs, tile, is_first):
        row_token, pair_row, topk_weights, _ = refs.inputs

        @pl.when(is_first)
        def _zeros():
            _zero_rows(refs, sms)

        @pl.when(jnp.logical_not(is_first))
        def _reuse():
            plgpu.barrier_wait(refs.heard)

        row_scatter.describe_rows(
            row_token, pair_row, topk_weights, tile, block_m, _rows(refs.scratch)
        )
        plgpu.barrier_arrive(refs.told)

    return describe


def _finish_producer(sms: int):
    def finish(refs, any_tile):
        @pl.when(any_tile)
        def _drain():
            plgpu.barrier_wait(refs.heard)

        @pl.when(jnp.logical_not(any_tile))
        def _zeros():
            _zero_rows(refs, sms)

        row_scatter.wait_sent()

    return finish


def _zero_rows(refs, sms: int) -> None:
    (out,), zeros = refs.results, refs.scratch[4]
    row_scatter.zero_rows(out, refs.inputs[1], zeros, sms, lax.axis_index("sm"))


def _rows(scratch) -> row_scatter.Rows:
    return row_scatter.Rows(*scratch[1:4])


def _announce(refs) -> None:
    done, places = refs.inputs[3], refs.scratch[5]
    row_scatter.announce(done, places.at[pl.ds(lax.axis_index("warpgroup"), 1)])


def _set_place(refs, place) -> None:
    """Notes which tile the warpgroup's copies under way belong to."""
    refs.scratch[5][lax.axis_index("warpgroup")] = place


def _add_columns(accumulators, tile, width, refs):
    """Weights x tokens: consumer w holds 64 columns of H of every block for all tokens."""
    weight = _begin(refs, pl.ds(0, width), plgpu.Layout.WGMMA.reduce(0))
    staging = refs.scratch[0].at[lax.axis_index("warpgroup")]
    for i, accumulator in enumerate(accumulators):
        weighted = accumulator * lax.broadcast_in_dim(weight, accumulator.shape, [1])
        row_scatter.stage_transposed(weighted.astype(jnp.bfloat16), staging, i * CONSUMER_ROWS)
    _send(tile, width, len(accumulators), staging, refs)


def _add_rows(accumulators, tile, width, refs):
    """Tokens x weights: consumer w holds 64 tokens, 128 columns of H a block."""
    warpgroup = lax.axis_index("warpgroup")
    mine = pl.ds(warpgroup * CONSUMER_ROWS, CONSUMER_ROWS)
    weight = _begin(refs, mine, plgpu.Layout.WGMMA.reduce(1))
    staging = refs.scratch[0].at[warpgroup]
    for i, accumulator in enumerate(accumulators):
        weighted = accumulator * lax.broadcast_in_dim(weight, accumulator.shape, [0])
        row_scatter.stage_rows(weighted.astype(jnp.bfloat16), staging, i * CONSUMER_ROWS)
    _send(tile, width, len(accumulators), staging, refs)


def _begin(refs, tokens, layout):
    """Waits until the rows are described and staging is free; the rows' weights."""
    plgpu.barrier_wait(refs.told)
    row_scatter.wait_staged()
    return plgpu.load(_rows(refs.scratch).weight.at[tokens], layout=layout)


def _send(tile, width: int, blocks: int, staging, refs) -> None:
    (out,), done = refs.results, refs.inputs[3]
    warpgroup = lax.axis_index("warpgroup")
    plgpu.commit_smem()
    row_scatter.send_rows(out, done, _rows(refs.scratch), staging, tile, width, blocks, warpgroup)
    row_tile = lax.div(tile.row, jnp.int32(out_block(refs)))
    _set_place(refs, row_tile * done.shape[1] + tile.column)
    plgpu.barrier_arrive(refs.heard)


def out_block(refs) -> int:
    """Rows of a tile."""
    return refs.scratch[1].shape[0]
