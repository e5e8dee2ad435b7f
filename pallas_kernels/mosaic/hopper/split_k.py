"""Sums of tiles that several CTAs compute a part of (`stream_k`).

    CTA c, which finishes the tile            CTA c + 1, whose run begins inside the tile
    ------------------------------            -------------------------------------------
    ... earlier tiles                         ... earlier tiles
    segments 0, 1                             segments 2, 3 -> partials[c + 1, 2..3], flag[c + 1]
    wait flag[c + 1], add partials 2, 3       ... tiles that it finishes
    epilogue

Every segment has a sum of its own and sums are added in the order of the segments, so bits do not
depend on the split. Flags are zeros before and after (`counted_in`). A CTA waits for the next few
only, which publish before they wait for anything, and CTAs start in order: beside another kernel,
too, the first ones that are on the GPU can end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import layouts
from pallas_kernels.mosaic.hopper.matmul_config import CONSUMER_ROWS, NUM_CONSUMERS, MatmulShape
from pallas_kernels.mosaic.hopper.stream_k import Partition


def num_flags(sms: int) -> int:
    """One for each consumer warpgroup of a CTA."""
    return sms * NUM_CONSUMERS


def partial_sums_type(shape: MatmulShape) -> jax.ShapeDtypeStruct | None:
    """Where partial sums go, None where no tile is split."""
    if not shape.is_split:
        return None
    sums = (shape.segments, NUM_CONSUMERS, shape.num_blocks, CONSUMER_ROWS, shape.block_m)
    return jax.ShapeDtypeStruct((shape.sms, *sums), jnp.float32)


class PartialSums(NamedTuple):
    """`f32[CTA, segment, warpgroup, block, 64, block_m]` in global memory, and their flags."""

    memory: Any
    flags: Any
    partition: Partition

    def store_partial(self, tile, width: int, segment, sums) -> None:
        """Stores the sums of a segment whose tile another CTA finishes."""
        place = lax.axis_index("sm"), segment, lax.axis_index("warpgroup")

        @pl.when(tile.begin > 0)
        def _store():
            for i, sum_ in enumerate(sums):
                layouts.store(self.memory, (*place, i, slice(None), pl.ds(0, width)), sum_)

    def publish(self, tile) -> None:
        """Tells the CTA that finishes the tile that all sums stored for it are in memory."""

        @pl.when(tile.begin > 0)
        def _signal():
            plgpu.commit_smem()  # all threads have stored
            _raise(self._flag(lax.axis_index("sm")))

    def reduce_partials(self, tile, width: int, sums):
        """The sums of the CTA that finishes a tile plus those of the segments that it lacks."""
        is_split = tile.end < self.partition.segments
        return lax.cond(is_split, lambda sums: self._reduce(tile, width, sums), tuple, sums)

    def _reduce(self, tile, width: int, sums):
        warpgroup = lax.axis_index("warpgroup")
        # The split tile that a CTA finishes is its last piece: its run ends with `tile.end`.
        first = self.partition.first_segment(lax.axis_index("sm") + 1) - tile.end
        segments = range(1, self.partition.segments)
        places = []
        for segment in segments:
            # In place of its own segments it loads, and drops, the first one that it lacks.
            lacking = lax.max(jnp.int32(segment), tile.end)
            owner = self.partition.owner_of(first + lacking)
            begins = first + segment == self.partition.first_segment(owner)

            @pl.when((segment >= tile.end) & begins)
            def _wait(owner=owner):
                _take(self._flag(owner))

            places.append((owner, lacking, warpgroup))

        partials = [  # all loads before the first addition: one latency instead of many
            [
                plgpu.load(
                    self.memory.at[(*place, i, slice(None), pl.ds(0, width))],
                    layout=plgpu.Layout.WGMMA,
                    optimized=False,
                )
                for i in range(len(sums))
            ]
            for place in places
        ]
        for segment, partial in zip(segments, partials, strict=True):
            missing = jnp.broadcast_to(segment >= tile.end, partial[0].shape)
            sums = tuple(lax.select(missing, a + b, a) for a, b in zip(sums, partial, strict=True))
        return sums

    def _flag(self, cta):
        return self.flags.at[cta * NUM_CONSUMERS + lax.axis_index("warpgroup")]


def _raise(flag_gmem) -> None:
    """Sets a flag; what this thread has seen stored is seen by who takes it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(_, flag):
        mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(flag)).signal(1, memory_scope="gpu")

    signal(flag_gmem)


def _take(flag_gmem) -> None:
    """Waits for a flag and lowers it again."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(_, flag):
        mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(flag)).wait(1, memory_scope="gpu")

    wait(flag_gmem)
