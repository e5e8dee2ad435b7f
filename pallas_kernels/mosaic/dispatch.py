"""Dispatch over NVLink: each rank writes its tokens into the memory of the ranks they go to.

Every rank has a slot for every token of every rank, so nobody counts, nothing depends on what the
others send, and none is dropped. Rows, scales and weights go only where an expert of their token
is; the expert ids, by which a rank knows what is for it, go everywhere.

    one warpgroup per block, tokens dealt out to the blocks

    load a token: row, scales, ids, weights, to registers
    for each rank, from this one on:    ids; the rest, if it has an expert of the token
    at the end of the block:            signal every rank

    block 0:                            wait for the blocks of all ranks

Ranks are visited from each rank's own number on, so that they do not all write to one of them at
once. Only block 0 waits: a block that waits occupies no place that another one needs to begin, so
the grid may be larger than the GPU.

XLA lets the ranks wait for each other before the kernel starts: then their slots are free, and
their semaphores zero.
"""

from __future__ import annotations

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int32, Shaped

from pallas_kernels.mosaic import launch, peers

_BLOCKS = 264  # two per SM of an H100: while one waits for its row, the other sends


def dispatch(
    rows: Shaped[Array, "T H"],
    scales: Float32[Array, "S T"] | None,
    topk_ids: Int32[Array, "T k"],
    topk_weights: Float32[Array, "T k"],
    *,
    axis_name: str,
    num_local_experts: int,
) -> tuple[Array, Array | None, Array, Array]:
    """Tokens to the ranks that need them; inside of `jax.shard_map`.

    Args:
        rows: Of any dtype, H a multiple of 128.
        scales: f32[S,T], or None.
        topk_ids: i32[T,k], physical expert ids; expert e is on rank e div `num_local_experts`, and
            a negative one on none.
        topk_weights: f32[T,k].
        axis_name: Mesh axis of the N ranks, whose devices are peers of one process.
        num_local_experts: E_local.

    Returns:
        The same of all ranks, [N*T,H], [N*T,S] (token by token here), [N*T,k] and [N*T,k]; slot
        r*T + t is for token t of rank r. Its ids are always there, the rest where one of its
        experts is on this rank; elsewhere it may be anything.
    """
    num_ranks, num_tokens = lax.axis_size(axis_name), rows.shape[0]
    blocks = min(num_tokens, _BLOCKS)
    inputs = [array for array in (rows, topk_ids, topk_weights, scales) if array is not None]

    def body(*refs):
        given, slots = refs[: len(inputs)], refs[len(inputs) :]
        row_gmem, ids_gmem, weights_gmem, *scales_gmem = given
        done = pl.get_global(plgpu.SemaphoreType.REGULAR)
        rank, block = lax.axis_index(axis_name), lax.axis_index("block")

        @pl.loop(0, lax.div(num_tokens - 1 - block, blocks) + 1)
        def _token(i):
            token = block + i * blocks
            slot = rank * num_tokens + token
            row = peers.load_bytes(row_gmem.at[token])
            ids = peers.load_words(ids_gmem.at[token])
            words = [peers.load_words(weights_gmem.at[token])]
            words += [peers.load_words(ref.at[:, token]) for ref in scales_gmem]
            for step in range(num_ranks):
                to = lax.rem(rank + step, num_ranks)
                row_slots, ids_slots, *word_slots = (
                    plgpu.remote_ref(ref, {axis_name: to}) for ref in slots
                )
                peers.store_words(ids_slots.at[slot], ids)

                @pl.when(peers.is_needed(ids_gmem, token, to, num_local_experts))
                def _send(row_slots=row_slots, word_slots=word_slots):
                    peers.store_bytes(row_slots.at[slot], row)
                    for ref, values in zip(word_slots, words, strict=True):
                        peers.store_words(ref.at[slot], values)

        peers.finish(done, axis_name, num_ranks, blocks)

    top_k, slots = topk_ids.shape[1], num_ranks * num_tokens
    widths = [(rows.shape[1], rows.dtype), (top_k, "int32"), (top_k, "float32")]
    if scales is not None:
        widths.append((scales.shape[0], "float32"))
    kernel = launch.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((slots, width), dtype) for width, dtype in widths),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="moe_dispatch",
    )
    all_rows, all_ids, all_weights, *all_scales = kernel(*inputs)
    return all_rows, all_scales[0] if all_scales else None, all_ids, all_weights
