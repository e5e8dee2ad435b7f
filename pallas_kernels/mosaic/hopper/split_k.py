"""Sums of tiles that several CTAs compute a part of (`tile_walk.Cut`).

    CTA c, owner of the tile                  CTA c + 1, whose run begins inside the tile
    ------------------------                  -------------------------------------------
    ... earlier tiles                         ... earlier tiles
    segments 0, 1                             segments 2, 3 -> parts[c + 1, 2..3], flag[c + 1]
    wait flag[c + 1], add parts 2, 3          ... tiles that it owns
    epilogue

Every segment has a sum of its own and sums are added in the order of the segments, so bits do not
depend on the cut. Flags are the call's own semaphores (as in `work_counter`), zeros before and
after: XLA may let two layers share a plan, never these. A CTA waits for the next few only, which
hand over before they wait for anything, and CTAs start in order: beside another kernel, too, the
first ones that are on the GPU can end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.hopper.matmul_config import NUM_CONSUMERS
from pallas_kernels.mosaic.hopper.tile_scheduler import Cut


def new_flags(sms: int):
    """The flags of the kernel that is being traced: one for each consumer warpgroup of a CTA."""
    return pl.get_global(plgpu.SemaphoreType.REGULAR((sms * NUM_CONSUMERS,)))


class Parts(NamedTuple):
    """`f32[CTA, segment, warpgroup, block, 64, block_m]` in global memory, and their flags."""

    memory: Any
    flags: Any
    cut: Cut
    total: Any

    def hand_over(self, tile, width: int, segment, sums) -> None:
        """Stores the sums of a segment whose tile another CTA owns."""
        place = lax.axis_index("sm"), segment, lax.axis_index("warpgroup")

        @pl.when(tile.begin > 0)
        def _store():
            for i, part in enumerate(sums):
                self.memory[(*place, i, slice(None), pl.ds(0, width))] = part

    def announce(self, tile) -> None:
        """Tells the owner that all segments handed over are in memory."""

        @pl.when(tile.begin > 0)
        def _signal():
            plgpu.commit_smem()  # all threads have stored
            plgpu.semaphore_signal(self._flag(lax.axis_index("sm")), memory_scope="gpu")

    def add_rest(self, tile, width: int, sums):
        """The owner's sums plus those of the segments that it did not compute."""
        is_cut = tile.end < self.cut.segments
        return lax.cond(is_cut, lambda sums: self._sum_of_parts(tile, width, sums), tuple, sums)

    def _sum_of_parts(self, tile, width: int, sums):
        warpgroup = lax.axis_index("warpgroup")
        # The owner's cut tile is its last piece: its run ends after segment `tile.end - 1`.
        first = self.cut.first_unit(self.total, lax.axis_index("sm") + 1) - tile.end
        segments = range(1, self.cut.segments)
        places = []
        for segment in segments:
            # In place of its own segments the owner loads, and drops, the first one that it lacks.
            lacking = lax.max(jnp.int32(segment), tile.end)
            holder = self.cut.holder(self.total, first + lacking)
            begins = first + segment == self.cut.first_unit(self.total, holder)

            @pl.when((segment >= tile.end) & begins)
            def _wait(holder=holder):
                plgpu.semaphore_wait(self._flag(holder), memory_scope="gpu")

            places.append((holder, lacking, warpgroup))

        parts = [  # all loads before the first addition: one latency instead of many
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
        for segment, part in zip(segments, parts, strict=True):
            missing = jnp.broadcast_to(segment >= tile.end, part[0].shape)
            sums = tuple(lax.select(missing, a + b, a) for a, b in zip(sums, part, strict=True))
        return sums

    def _flag(self, cta):
        return self.flags.at[cta * NUM_CONSUMERS + lax.axis_index("warpgroup")]
