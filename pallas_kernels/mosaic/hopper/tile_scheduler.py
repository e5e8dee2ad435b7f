"""Which CTA computes which tile, and how its producer and its consumers go through them.

Tiles are numbered expert by expert; inside one, rows fastest, so that an expert's weights are read
from HBM once and from L2 after that. Schedulers differ in how a CTA gets its tiles:

`StaticScheduler`: CTA c computes tiles c, c + sms, c + 2 sms, ... The producer queues a tile while
the one before it is under way.

    producer warpgroup                    consumer warpgroups
    ------------------                    -------------------
    queue tile i + 1, half way       -->  take tile i
    through tile i
    fill the pipeline for tile i          compute tile i

`DynamicScheduler`: a CTA computes the next tile that no CTA has, so that no CTA idles while another
has two tiles left. Taking a number and looking the tile up takes longer than the pipeline lasts, so
a warp of its own does it. It takes the number late: CTAs should do so in the order in which they
will be done.

    producer warp 1                  producer warp 0                   consumer warpgroups
    ---------------                  ---------------                   -------------------
    wait until the slot is empty
    take a number, look it up
    queue the tile              -->  read the tile                     take the tile
                                     fill the pipeline for it          compute it
                                <--  release the slot, a few steps
                                     before the last one

`stream_k.StreamK` is static and splits the last tiles along K.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import warp
from pallas_kernels.mosaic.hopper import work_counter
from pallas_kernels.mosaic.hopper.matmul_config import NUM_CONSUMERS, MatmulShape
from pallas_kernels.mosaic.hopper.tile_queue import Tile, TileQueue, queue_types
from pallas_kernels.types import GroupPlan

LOOKAHEAD_STEPS = 8  # left of a tile when the next number is taken: twice what a look-up takes


class TileOrder(NamedTuple):
    """All tiles by number.

    Attributes:
        block_m: Rows of a tile.
        num_columns: Columns of tiles.
        segments: Pieces that K is divided into, see `stream_k`.
        plan: References to the plan's fields.
        total: How many tiles there are.
    """

    block_m: int
    num_columns: int
    segments: int
    plan: GroupPlan
    total: Any

    def tile(self, number, load=operator.getitem) -> Tile:
        """A tile, whole; past the last one, a tile without live rows.

        Args:
            number: Which one.
            load: How to read a number from an array.
        """
        # Dead tiles name expert 0, so the look-up need not wait until `total` has been read.
        row_tile = lax.div(number, jnp.int32(self.num_columns))
        last = jnp.int32(self.plan.tile_expert.shape[0] - 1)
        expert = load(self.plan.tile_expert, lax.min(row_tile, last))
        size, offset = load(self.plan.group_sizes, expert), load(self.plan.group_offsets, expert)
        row_tiles = lax.max(lax.div(size + (self.block_m - 1), jnp.int32(self.block_m)), 1)
        inside = number - lax.div(offset, jnp.int32(self.block_m)) * self.num_columns
        first = lax.rem(inside, row_tiles) * self.block_m
        live = lax.min(size - first, jnp.int32(self.block_m))
        live = lax.select(number < self.total, live, jnp.int32(0))
        column = lax.div(inside, row_tiles)
        return Tile(expert, offset + first, live, column, jnp.int32(0), jnp.int32(self.segments))

    def aligned(self, tile: Tile) -> Tile:
        """The tile; TMA wants to know that its rows begin at a multiple of `block_m`."""
        return tile._replace(row=pl.multiple_of(tile.row, self.block_m))

    def whole(self, tile: Tile) -> Tile:
        """A tile that is not split: its segments are known without reading them."""
        return tile._replace(begin=jnp.int32(0), end=jnp.int32(self.segments))


class TileProducer(Protocol):
    """The producer's side of the pipeline, as a scheduler drives it.

    `done` counts the segments of the tiles before, over all tiles of the CTA.
    """

    def produce(self, done, tile: Tile, look_ahead: Callable[[Any, Any], None]) -> None:
        """Fills the pipeline for a tile; calls `look_ahead(i, n)` before each i of its n fills."""

    def commit_last(self, done) -> None:
        """Commits what is still under way; `done` is the total. Not called where one warp fills."""

    def drain(self, done) -> None:
        """Waits until the consumers have released all stages; `done` is the total."""


class TileScheduler(Protocol):
    """How a CTA goes through its tiles, each queued by the producer before it is computed."""

    @staticmethod
    def queue_types(shape: MatmulShape) -> TileQueue:
        """Scratch types of the queue that it needs."""

    def produce_tiles(
        self, queue: TileQueue, producer: TileProducer, side_job: Callable[[], None] | None = None
    ) -> None:
        """The producer warpgroup: queues every tile of this CTA and fills the pipeline for it.

        Args:
            queue: Where the tiles go.
            producer: What to do for a tile.
            side_job: What a spare warp does meanwhile, where there is one.
        """

    def consume_tiles(self, queue: TileQueue, compute: Callable[[Any, Tile], None]) -> None:
        """A consumer warpgroup: `compute(done, tile)` for every tile, `done` as in the producer."""


@dataclasses.dataclass(frozen=True)
class StaticScheduler:
    """Every `sms`-th tile."""

    order: TileOrder
    sms: int

    @staticmethod
    def queue_types(shape: MatmulShape) -> TileQueue:
        """Slots for tiles that the consumers have not taken yet."""
        return queue_types(num_slots=shape.queue_slots, num_readers=NUM_CONSUMERS)

    def produce_tiles(
        self, queue: TileQueue, producer: TileProducer, side_job: Callable[[], None] | None = None
    ) -> None:
        """See `TileScheduler`; no warp is spare, since all of them fill the pipeline."""
        assert side_job is None
        queue.put(jnp.int32(0), self.tile_at(jnp.int32(0)))

        def step(carry):
            index, done = carry
            tile = self.known(queue.read(index))

            def look_ahead(i, count):
                @pl.when(i == lax.div(count, jnp.int32(2)))
                def _next():  # finding the tile takes longer than a step
                    queue.put(index + 1, self.tile_at(index + 1))

            producer.produce(done, tile, look_ahead)
            return index + 1, done + (tile.end - tile.begin)

        count, done = lax.while_loop(
            lambda carry: queue.read(carry[0]).live > 0, step, (jnp.int32(0), jnp.int32(0))
        )
        producer.commit_last(done)
        queue.drain(count)
        producer.drain(done)

    def consume_tiles(self, queue: TileQueue, compute: Callable[[Any, Tile], None]) -> None:
        """See `TileScheduler`."""
        _consume_whole_tiles(self.order, queue, compute)

    def tile_at(self, index) -> Tile:
        """The `index`-th tile of this CTA."""
        return self.order.tile(lax.axis_index("sm") + index * self.sms)

    def known(self, tile: Tile) -> Tile:
        """A tile of the queue, with what is known of it without reading."""
        return self.order.aligned(self.order.whole(tile))


@dataclasses.dataclass(frozen=True)
class DynamicScheduler:
    """The next tile that no CTA has, by a counter in global memory."""

    order: TileOrder
    sms: int
    counter: Any

    @staticmethod
    def queue_types(shape: MatmulShape) -> TileQueue:
        """One slot, which the warp that fills the pipeline reads, too."""
        return queue_types(num_slots=1, num_readers=NUM_CONSUMERS + 1)

    def produce_tiles(
        self, queue: TileQueue, producer: TileProducer, side_job: Callable[[], None] | None = None
    ) -> None:
        """See `TileScheduler`."""
        warps = [lambda: self._fill(queue, producer), lambda: self._schedule(queue)]
        warp.run(*warps, *([side_job] if side_job else []))

    def consume_tiles(self, queue: TileQueue, compute: Callable[[Any, Tile], None]) -> None:
        """See `TileScheduler`."""
        _consume_whole_tiles(self.order, queue, compute)

    def _schedule(self, queue: TileQueue) -> None:
        """A warp: queues every tile, each when `_fill` is almost done with the one before it."""
        first = self.order.tile(lax.axis_index("sm"), warp.load)
        queue.put_by_warp(first)

        def step(_):
            queue.wait_empty_by_warp()
            number = work_counter.next_tile(self.counter)
            tile = self.order.tile(self.sms + number, warp.load)
            queue.put_by_warp(tile)
            return tile.live

        warp.while_loop(self.order.total, lambda live: live > 0, step, first.live)
        work_counter.finish(self.counter, self.sms)
        # Every completed phase must be observed before the barriers go away.
        queue.wait_empty_by_warp()

    def _fill(self, queue: TileQueue, producer: TileProducer) -> None:
        """Another warp: fills the pipeline for every tile that `_schedule` queues."""
        order = self.order

        def look_ahead(i, count):
            pl.when(i == lax.max(count - LOOKAHEAD_STEPS, 0))(queue.release_by_warp)

        def step(carry):
            index, tile = carry
            tile = order.whole(tile)
            # What `aligned` says, for a warp, which cannot say it.
            tile = tile._replace(row=lax.div(tile.row, jnp.int32(order.block_m)) * order.block_m)
            producer.produce(index * order.segments, tile, look_ahead)
            return index + 1, queue.read_by_warp()

        initial = (jnp.int32(0), queue.read_by_warp())
        count, _ = warp.while_loop(order.total, lambda carry: carry[1].live > 0, step, initial)
        queue.release_by_warp()  # of the tile that ends the queue
        producer.drain(count * order.segments)


def _consume_whole_tiles(
    order: TileOrder, queue: TileQueue, compute: Callable[[Any, Tile], None]
) -> None:
    """Consumes tiles that are not split, so that the segments done follow from their number."""

    def step(carry):
        index, tile = carry
        compute(index * order.segments, order.aligned(order.whole(tile)))
        return index + 1, queue.take(index + 1)

    initial = (jnp.int32(0), queue.take(jnp.int32(0)))
    lax.while_loop(lambda carry: carry[1].live > 0, step, initial)
