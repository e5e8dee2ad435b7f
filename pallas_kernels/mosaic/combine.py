"""Combine over NVLink: each rank adds up what the ranks have made of its tokens, where it lies.

    one warpgroup per block; (token, columns) dealt out to the blocks

    load these columns from every rank that had the token's experts, all of them at once
    add in float32, in the order of the ranks, cast once, store
    at the end of the block:    signal every rank
    block 0:                    wait for the blocks of all ranks

Partial sums are read from the memory of the rank that made them, so there is no buffer for what N
ranks would write, and no second pass over it. XLA lets the ranks wait for each other before the
kernel starts: then all partial sums are there. They wait at its end, because whoever leaves may
overwrite his.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic import launch, peers

_BLOCKS = 528  # four per SM of an H100: what hides the way to another GPU and back
_BYTES = 16  # that a thread loads at once, at most


def combine(
    partial_sums: Float[Array, "N*T H"],
    topk_ids: Int32[Array, "T k"],
    *,
    axis_name: str,
    num_local_experts: int,
) -> Float[Array, "T H"]:
    """The sums of this rank's tokens; inside of `jax.shard_map`.

    Args:
        partial_sums: Of this rank's experts, in slot r*T + t for token t of rank r; H a multiple of
            128. Slots whose token has no expert here are not read.
        topk_ids: i32[T,k] of this rank's tokens, as for `dispatch`.
        axis_name: Mesh axis of the N ranks, whose devices are peers of one process.
        num_local_experts: E_local.

    Returns:
        `[T,H]` of the dtype of `partial_sums`, zeros for tokens without an expert.
    """
    num_ranks, (slots, hidden_size) = lax.axis_size(axis_name), partial_sums.shape
    num_tokens = slots // num_ranks
    vector = math.gcd(hidden_size // peers.THREADS, _BYTES // partial_sums.dtype.itemsize)
    columns = peers.THREADS * vector
    parts = hidden_size // columns
    blocks = min(num_tokens * parts, _BLOCKS)
    layout = peers.columns_layout(columns, vector)

    def body(sums_gmem, ids_gmem, out_gmem):
        done = pl.get_global(plgpu.SemaphoreType.REGULAR)
        rank, block = lax.axis_index(axis_name), lax.axis_index("block")

        @pl.loop(0, lax.div(num_tokens * parts - 1 - block, blocks) + 1)
        def _part(i):
            item = block + i * blocks
            token = lax.div(item, parts)
            where = pl.ds(lax.rem(item, parts) * columns, columns)
            slot = rank * num_tokens + token

            def load(maker):
                there = plgpu.remote_ref(sums_gmem, {axis_name: jnp.int32(maker)})
                return peers.load_columns(there.at[slot, where], columns=columns, vector=vector)

            def zeros():
                return plgpu.layout_cast(jnp.zeros((columns,), partial_sums.dtype), layout)

            loaded = [
                lax.cond(
                    peers.is_needed(ids_gmem, token, maker, num_local_experts),
                    lambda maker=maker: load(maker),
                    zeros,
                )
                for maker in range(num_ranks)
            ]
            total = loaded[0].astype(jnp.float32)
            for values in loaded[1:]:
                total = total + values.astype(jnp.float32)
            out_gmem[token, where] = total.astype(partial_sums.dtype)

        peers.finish(done, axis_name, num_ranks, blocks)

    kernel = launch.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_tokens, hidden_size), partial_sums.dtype),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="moe_combine",
    )
    return kernel(partial_sums, topk_ids)
