"""Stream-K: the last tiles are split along K where they are few.

CTAs take whole tiles in turn as long as there is one for each. The tiles left over are laid out
segment by segment (a segment is a fixed number of 128-column steps), and every CTA takes an equal
run of segments, if that makes the last round at least a segment shorter. Where there is no round
before it, the start of the kernel takes longer than a segment, and they are split only if they are
so few that their CTAs could not use the whole memory bandwidth:

    tiles left        |    tile A     |    tile B     |
    their segments    | 0   1   2   3 | 0   1   2   3 |
    computed by CTA   | 0   0   1   1   1   2   2   2 |

The CTA in whose run a tile begins finishes it: it adds the sums of the others (`split_k`) and runs
the epilogue. Osama et al., "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix
Multiplication on the GPU" (arXiv:2301.03598), here with whole tiles first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic.hopper.tile_queue import Tile, TileQueue
from pallas_kernels.mosaic.hopper.tile_scheduler import StaticScheduler

BUSY_SHARE = 4  # a quarter of an H100's SMs can draw more than half of its memory bandwidth
WIDENED_BUSY_SHARE = 2  # a step takes longer where weights are widened


class Partition(NamedTuple):
    """Who computes what.

    Segments are numbered over all split tiles. The segments of a tile that began in the run of
    another CTA, always the first of a run, are computed for that CTA.

    Attributes:
        segments: Segments of a tile.
        sms: CTAs.
        total: How many tiles there are, a traced number.
        busy_share: The tiles of a single round are split if they are fewer than this part of the
            CTAs.
    """

    segments: int
    sms: int
    total: Any
    busy_share: int = BUSY_SHARE

    @property
    def rounds(self):
        """Whole tiles of each CTA, the last round aside."""
        return lax.div(self.total, jnp.int32(self.sms))

    @property
    def split_tiles(self):
        """How many of the last tiles are split."""
        left = lax.rem(self.total, jnp.int32(self.sms))
        saves_a_segment = left * self.segments <= self.sms * (self.segments - 1)
        is_worth_it = saves_a_segment & (self.total >= self.sms)
        return lax.select(is_worth_it | (left * self.busy_share < self.sms), left, jnp.int32(0))

    def first_segment(self, cta):
        """Where the run of a CTA begins."""
        return lax.div(cta * (self.split_tiles * self.segments), jnp.int32(self.sms))

    def owner_of(self, segment):
        """The CTA in whose run a segment lies."""
        count = lax.max(self.split_tiles * self.segments, 1)
        return lax.div((segment + 1) * self.sms - 1, count)

    def whole(self, cta, index):
        """The number of the `index`-th tile of a CTA that is whole, and whether it has so many."""
        number = cta + index * self.sms
        return number, number < self.total - self.split_tiles

    def piece(self, cta, index):
        """The `index`-th piece of a CTA, after its whole tiles: tile, `begin` and `end`.

        After its last one `end <= begin`.
        """
        rounds = self.rounds
        first, last = self.first_segment(cta), self.first_segment(cta + 1)
        tile = lax.div(first, jnp.int32(self.segments)) + index - rounds
        inside = lax.rem(first, jnp.int32(self.segments))
        begin = lax.select(index == rounds, inside, jnp.int32(0))
        end = lax.min(last - tile * self.segments, jnp.int32(self.segments))
        return rounds * self.sms + tile, begin, end


@dataclasses.dataclass(frozen=True)
class StreamK(StaticScheduler):
    """Every `sms`-th tile, and an equal share of the last ones."""

    partition: Partition

    def tile_at(self, index) -> Tile:
        """The `index`-th tile of this CTA, or piece of a tile."""
        cta = lax.axis_index("sm")
        # Almost all tiles are whole: their look-up does not wait until `total` has been read.
        number, is_whole = self.partition.whole(cta, index)
        whole = self.order.tile(number)

        def piece():
            number, begin, end = self.partition.piece(cta, index)
            tile = self.order.tile(number)
            live = lax.select(end > begin, tile.live, jnp.int32(0))
            return tile._replace(live=live, begin=begin, end=end)

        return lax.cond(is_whole, lambda: whole, piece)

    def known(self, tile: Tile) -> Tile:
        """A tile of the queue, with what is known of it without reading."""
        return self.order.aligned(tile)

    def consume_tiles(self, queue: TileQueue, compute: Callable[[Any, Tile], None]) -> None:
        """See `TileScheduler`."""

        def step(carry):
            index, done, tile = carry
            tile = self.known(tile)
            compute(done, tile)
            return index + 1, done + (tile.end - tile.begin), queue.take(index + 1)

        initial = (jnp.int32(0), jnp.int32(0), queue.take(jnp.int32(0)))
        lax.while_loop(lambda carry: carry[2].live > 0, step, initial)
