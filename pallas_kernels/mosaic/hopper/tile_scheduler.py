"""Which CTA computes which tile, and how a CTA's warpgroups agree on it.

Tiles are ordered expert by expert; inside one, rows fastest, so that an expert's weights are read
from HBM once and from L2 after that. The first tile of a CTA is its index, every further one is
`sms` tiles on. Few long tiles are cut along K: see `Cut`.

    producer warpgroup                    consumer warpgroups
    ------------------                    -------------------
    wait empty[i % 2]
    tile i -> slot[i % 2], full[i % 2]    -->    wait full[i % 2], read the slot
    look the next tile up                 <--    arrive empty[i % 2]
    fill the pipeline for tile i                 compute tile i

With a counter a CTA takes the next tile that no CTA has instead, so that nobody idles while another
has two tiles left. Taking a number and looking the tile up takes longer than the pipeline lasts, so
a warp of its own does it. It takes the number late: CTAs should do so in the order in which they
will be done.

    producer warp 1                  producer warp 0                  consumer warpgroups
    ---------------                  ---------------                  -------------------
    wait empty
    take a tile number, look it up
    tile -> slot, full          -->  wait full, read the slot         wait full, read the slot
                                     fill the pipeline for the tile    arrive empty
                                <--  arrive empty, a few steps        compute the tile
                                     before the last one

A tile without live rows ends the queue.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import warp
from pallas_kernels.mosaic.hopper import work_counter
from pallas_kernels.mosaic.hopper.tile_queue import Tile, TileQueue

LOOKAHEAD_STEPS = 8  # left of a tile when the next number is taken: twice what a look-up takes
_BUSY_SHARE = 4  # a quarter of an H100's SMs can draw more than half of its memory bandwidth


class Cut(NamedTuple):
    """Deals out the last tiles in equal numbers of K segments where they are few.

    Tiles go round whole. Those that are left, if so few that their CTAs could not use the whole
    memory bandwidth, are laid out segment by segment and every CTA takes an equal run of them. It
    owns the tiles that begin in its run. The segments of a tile that began earlier, always the
    first of its run, it hands over to the owner.
    """

    segments: int
    sms: int

    def rounds(self, total):
        """Whole tiles of each CTA, the last round aside."""
        return lax.div(total, jnp.int32(self.sms))

    def cut_tiles(self, total):
        """How many of the last tiles are cut."""
        left = lax.rem(total, jnp.int32(self.sms))
        return lax.select(left * _BUSY_SHARE < self.sms, left, jnp.int32(0))

    def first_unit(self, total, cta):
        """Where the run of a CTA begins, in segments of cut tiles."""
        return lax.div(cta * (self.cut_tiles(total) * self.segments), jnp.int32(self.sms))

    def holder(self, total, unit):
        """The CTA in whose run a segment lies."""
        units = lax.max(self.cut_tiles(total) * self.segments, 1)
        return lax.div((unit + 1) * self.sms - 1, units)

    def whole(self, total, cta, index):
        """The `index`-th tile that goes to a CTA whole, and whether there are so many."""
        linear = cta + index * self.sms
        return linear, linear < total - self.cut_tiles(total)

    def part(self, total, cta, index):
        """The `index`-th piece of a CTA, after its whole tiles: tile, `begin` and `end`.

        After its last one `end <= begin`.
        """
        rounds = self.rounds(total)
        first, last = self.first_unit(total, cta), self.first_unit(total, cta + 1)
        tile = lax.div(first, jnp.int32(self.segments)) + index - rounds
        inside = lax.rem(first, jnp.int32(self.segments))
        begin = lax.select(index == rounds, inside, jnp.int32(0))
        end = lax.min(last - tile * self.segments, jnp.int32(self.segments))
        return rounds * self.sms + tile, begin, end


class Walk(NamedTuple):
    """The order of tiles, and this CTA's place in it.

    `counter` is None for a fixed deal, `cut` is None where tiles stay whole.
    """

    block_m: int
    num_columns: int
    sms: int
    sizes: Any
    offsets: Any
    tile_expert: Any
    total: Any
    counter: Any
    cut: Cut | None
    segments: int

    def tile(self, linear, load=operator.getitem) -> Tile:
        """The `linear`-th tile, whole; past the last one, a tile without live rows.

        Args:
            linear: Its number.
            load: How to read a number.
        """
        # Dead tiles name expert 0, so the look-up need not wait until `total` has been read.
        row_tile = lax.div(linear, jnp.int32(self.num_columns))
        last = jnp.int32(self.tile_expert.shape[0] - 1)
        expert = load(self.tile_expert, lax.min(row_tile, last))
        size, offset = load(self.sizes, expert), load(self.offsets, expert)
        row_tiles = lax.max(lax.div(size + (self.block_m - 1), jnp.int32(self.block_m)), 1)
        inside = linear - lax.div(offset, jnp.int32(self.block_m)) * self.num_columns
        first = lax.rem(inside, row_tiles) * self.block_m
        live = lax.min(size - first, jnp.int32(self.block_m))
        live = lax.select(linear < self.total, live, jnp.int32(0))
        column = lax.div(inside, row_tiles)
        return Tile(expert, offset + first, live, column, jnp.int32(0), jnp.int32(self.segments))

    def produce(self, queue: TileQueue, fill, finish) -> Any:
        """Queues every tile of this CTA and fills the pipeline for it; without a counter.

        Args:
            queue: Where the tiles go.
            fill: `fill(done, tile, look_ahead)`, `done` segments after the CTA's first one; it
                calls `look_ahead()` once, when the pipeline is ahead of the consumers, since
                finding the next tile takes longer than a step.
            finish: `finish(done)`, called once all tiles are filled.

        Returns:
            How many segments there were.
        """
        queue.put(jnp.int32(0), self._tile_of(jnp.int32(0)))

        def step(carry):
            index, done = carry
            tile = self._aligned(self._known(queue.read(index)))
            fill(done, tile, lambda: queue.put(index + 1, self._tile_of(index + 1)))
            return index + 1, done + (tile.end - tile.begin)

        count, done = lax.while_loop(
            lambda carry: queue.read(carry[0]).live > 0, step, (jnp.int32(0), jnp.int32(0))
        )
        finish(done)
        queue.drain(count)
        return done

    def schedule(self, queue: TileQueue) -> None:
        """A warp: queues every tile of this CTA, each when `fill` is almost done with the last."""
        first = self.tile(lax.axis_index("sm"), warp.load)
        queue.put_by_warp(first)

        def step(_):
            queue.wait_empty_by_warp()
            number = work_counter.next_tile(self.counter)
            tile = self.tile(self.sms + number, warp.load)
            queue.put_by_warp(tile)
            return tile.live

        warp.while_loop(self.total, lambda live: live > 0, step, first.live)
        work_counter.finish(self.counter, self.sms)
        # Every completed phase must be observed before the barriers go away.
        queue.wait_empty_by_warp()

    def fill(self, queue: TileQueue, fill) -> Any:
        """Another warp: fills the pipeline for every tile that `schedule` puts.

        Args:
            queue: Where the tiles go.
            fill: As for `produce`; what it calls lets the next number be taken.

        Returns:
            How many segments there were.
        """

        def step(carry):
            index, tile = carry
            tile = self._known(tile)
            # What `_aligned` says, for a warp: TMA wants to know that rows come in whole tiles.
            tile = tile._replace(row=lax.div(tile.row, jnp.int32(self.block_m)) * self.block_m)
            fill(index * self.segments, tile, queue.release_by_warp)
            return index + 1, queue.read_by_warp()

        initial = (jnp.int32(0), queue.read_by_warp())
        count, _ = warp.while_loop(self.total, lambda carry: carry[1].live > 0, step, initial)
        queue.release_by_warp()  # of the tile that ends the queue
        return count * self.segments

    def look_ahead_at(self, groups):
        """Before which of a tile's groups of steps to see about the next tile."""
        if self.counter is None:
            return lax.div(groups, jnp.int32(2))
        return lax.max(groups - LOOKAHEAD_STEPS, 0)

    def consume(self, queue: TileQueue, body) -> None:
        """Calls `body(done, tile)` for every tile from the queue, `done` as in `fill`."""

        def step(carry):
            index, done, fields = carry
            tile = self._aligned(self._known(fields))
            # Where tiles are whole, `done` is a multiple of `index`: a register less to carry.
            body(done if self.cut is not None else index * self.segments, tile)
            return index + 1, done + (tile.end - tile.begin), tuple(queue.take(index + 1))

        initial = (jnp.int32(0), jnp.int32(0), tuple(queue.take(jnp.int32(0))))
        lax.while_loop(lambda carry: Tile(*carry[2]).live > 0, step, initial)

    def _tile_of(self, index) -> Tile:
        """The `index`-th tile of this CTA."""
        cta = lax.axis_index("sm")
        if self.cut is not None:
            return self._piece_of(self.cut, index, cta)
        return self.tile(cta + index * self.sms)

    def _piece_of(self, cut: Cut, index, cta) -> Tile:
        # Almost all tiles are whole: their look-up does not wait until `total` has been read.
        linear, is_whole = cut.whole(self.total, cta, index)
        whole = self.tile(linear)

        def part():
            linear, begin, end = cut.part(self.total, cta, index)
            tile = self.tile(linear)
            live = lax.select(end > begin, tile.live, jnp.int32(0))
            return tuple(tile._replace(live=live, begin=begin, end=end))

        return Tile(*lax.cond(is_whole, lambda: tuple(whole), part))

    def _known(self, fields) -> Tile:
        """The tile with what is known without reading it."""
        tile = Tile(*fields)
        if self.cut is None:
            tile = tile._replace(begin=jnp.int32(0), end=jnp.int32(self.segments))
        return tile

    def _aligned(self, tile: Tile) -> Tile:
        return tile._replace(row=pl.multiple_of(tile.row, self.block_m))
