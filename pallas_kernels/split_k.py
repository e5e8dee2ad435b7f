"""Sums of tiles that several CTAs compute a part of (`tile_walk.Cut`).

    CTA c, owner of the tile                  CTA c + 1, whose run begins inside the tile
    ------------------------                  -------------------------------------------
    ... earlier tiles                         ... earlier tiles
    segments 0, 1                             segments 2, 3 -> parts[c + 1, 2..3], flag[c + 1]
    wait flag[c + 1], add parts 2, 3          ... tiles that it owns
    epilogue

Every segment has a sum of its own and sums are added in the order of the segments, so bits do not
depend on the cut. A flag is zero before and after. All CTAs must be on the GPU at once, as those of
a persistent kernel are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.promotion import NUM_CONSUMERS
from pallas_kernels.tile_walk import Cut


def num_flags(sms: int) -> int:
    """Flags that a kernel of `sms` CTAs needs: one for each consumer warpgroup."""
    return sms * NUM_CONSUMERS


class Parts(NamedTuple):
    """`f32[CTA, segment, warpgroup, block, 64, block_m]` in global memory, and `i32` flags."""

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
            _signal_flag(self._flag(lax.axis_index("sm")))

    def add_rest(self, tile, width: int, sums):
        """The owner's sums plus those of the segments that it did not compute."""
        is_cut = tile.end < self.cut.segments
        return lax.cond(is_cut, lambda sums: self._sum_of_parts(tile, width, sums), tuple, sums)

    def _sum_of_parts(self, tile, width: int, sums):
        cta, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
        # The owner's cut tile is its last piece: its run ends after segment `tile.end - 1`.
        first = self.cut.first_unit(self.total, cta + 1) - tile.end
        rest = range(1, self.cut.segments)
        holders = [self.cut.holder(self.total, first + segment) for segment in rest]
        for segment, holder in zip(rest, holders, strict=True):
            begins = first + segment == self.cut.first_unit(self.total, holder)

            @pl.when((segment >= tile.end) & begins)
            def _wait(holder=holder):
                _wait_for_flag(self._flag(holder))

        parts = [  # all loads before the first addition: one latency instead of many
            [
                plgpu.load(
                    self.memory.at[
                        lax.select(segment >= tile.end, holder, cta),
                        segment, warpgroup, i, :, pl.ds(0, width),
                    ],
                    layout=plgpu.Layout.WGMMA,
                    optimized=False,
                )
                for i in range(len(sums))
            ]
            for segment, holder in zip(rest, holders, strict=True)
        ]  # fmt: skip
        for segment, part in zip(rest, parts, strict=True):
            missing = jnp.broadcast_to(segment >= tile.end, part[0].shape)
            sums = tuple(lax.select(missing, a + b, a) for a, b in zip(sums, part, strict=True))
        return sums

    def _flag(self, cta):
        return self.flags.at[pl.ds(cta * NUM_CONSUMERS + lax.axis_index("warpgroup"), 1)]


def _signal_flag(flag) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(_, flag):
        semaphore = mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(flag))
        semaphore.signal(1, memory_scope="gpu")

    signal(flag)


def _wait_for_flag(flag) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(_, flag):
        mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(flag)).wait(1, memory_scope="gpu")

    wait(flag)
