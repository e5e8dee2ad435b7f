"""Which CTA computes which tile, and how a CTA's warpgroups agree on it.

Tiles are ordered expert by expert; inside one, rows fastest, so that an expert's weights are read
from HBM once and from L2 after that. The first tile of a CTA is its index, every further one is
`sms` tiles on. Few long tiles are cut along K: see `Cut`.

    producer warpgroup                    consumer warpgroups
    ------------------                    -------------------
    wait taken[i % 2]
    tile i -> record[i % 2], posted[i % 2]  -->  wait posted[i % 2], read the record
    look the next tile up                 <--    arrive taken[i % 2]
    fill the ring for tile i                     compute tile i

With a counter a CTA takes the next tile that no CTA has instead, so that nobody idles while another
has two tiles left. Taking a number and looking the tile up takes longer than the ring lasts, so a
warp of its own does it. It takes the number late: CTAs should do so in the order in which they will
be done.

    producer warp 1                  producer warp 0                  consumer warpgroups
    ---------------                  ---------------                  -------------------
    wait taken
    take a tile number, look it up
    tile -> record, posted      -->  wait posted, read the record     wait posted, read the record
                                     fill the ring for the tile       arrive taken
                                <--  arrive taken, a few steps        compute the tile
                                     before the last one

A record with no live rows ends the walk.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import warp
from pallas_kernels.mosaic.hopper import work_counter

_RECORDS = 2
_LATE = 8  # steps that are left when the next number is taken: twice what a look-up takes
_BUSY_SHARE = 4  # a quarter of an H100's SMs can draw more than half of its memory bandwidth
MAILBOX_BYTES = 1024  # every piece of shared memory takes a multiple of that


class Tile(NamedTuple):
    """One unit of work: `live` rows from `row` on times one column of weight blocks.

    Only the segments `begin` to `end` (exclusive) of K; all of them unless the deal cuts tiles.
    """

    expert: Any
    row: Any
    live: Any
    column: Any
    begin: Any
    end: Any


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


class Mailbox(NamedTuple):
    """Shared memory through which the producer tells the consumers their next tile.

    One record with a counter, two without.
    """

    records: Any
    posted: Any
    taken: Any

    def place(self, index):
        """The record of the `index`-th tile."""
        count = self.records.shape[0]
        return jnp.int32(0) if count == 1 else lax.rem(index, jnp.int32(count))


def mailbox_types(num_consumers: int, dynamic: bool) -> list[Any]:
    """Scratch types of a `Mailbox`."""
    records, readers = (1, num_consumers + 1) if dynamic else (_RECORDS, num_consumers)
    return [
        plgpu.SMEM((records, len(Tile._fields)), jnp.int32),
        plgpu.Barrier(num_arrivals=1, num_barriers=records),
        plgpu.Barrier(num_arrivals=readers, num_barriers=records),
    ]


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

    def produce(self, mailbox: Mailbox, fill, finish) -> Any:
        """Posts every tile of this CTA and fills the ring for it; without a counter.

        Args:
            mailbox: Where the tiles are posted.
            fill: `fill(done, tile, look_ahead)`, `done` segments after the CTA's first one; it
                calls `look_ahead()` once, when the ring is ahead of the consumers, since finding
                the next tile takes longer than a step.
            finish: `finish(done)`, called once all tiles are filled.

        Returns:
            How many segments there were.
        """
        post(mailbox, jnp.int32(0), self._tile_of(jnp.int32(0)))

        def step(carry):
            index, done = carry
            tile = self._aligned(self._known(read(mailbox, index)))
            fill(done, tile, lambda: post(mailbox, index + 1, self._tile_of(index + 1)))
            return index + 1, done + (tile.end - tile.begin)

        count, done = lax.while_loop(
            lambda carry: read(mailbox, carry[0]).live > 0, step, (jnp.int32(0), jnp.int32(0))
        )
        finish(done)

        # Every completed phase must be observed before the barriers go away.
        @pl.loop(lax.max(count - (_RECORDS - 1), 0), count + 1)
        def _drain(record):
            plgpu.barrier_wait(mailbox.taken.at[lax.rem(record, jnp.int32(_RECORDS))])

        return done

    def schedule(self, mailbox: Mailbox) -> None:
        """A warp: posts every tile of this CTA, taken when `fill` is almost done with the last."""
        first = self.tile(lax.axis_index("sm"), warp.load)
        _post_by_warp(mailbox, first)

        def step(_):
            plgpu.barrier_wait(mailbox.taken.at[0])
            number = work_counter.next_tile(self.counter)
            tile = self.tile(self.sms + number, warp.load)
            _post_by_warp(mailbox, tile)
            return tile.live

        warp.while_loop(self.total, lambda live: live > 0, step, first.live)
        work_counter.finish(self.counter, self.sms)
        # Every completed phase must be observed before the barriers go away.
        plgpu.barrier_wait(mailbox.taken.at[0])

    def fill(self, mailbox: Mailbox, fill) -> Any:
        """Another warp: fills the ring for every tile that `schedule` posts.

        Args:
            mailbox: Where the tiles are posted.
            fill: As for `produce`; what it calls lets the next number be taken.

        Returns:
            How many segments there were.
        """

        def step(carry):
            index, tile = carry
            tile = self._known(tile)
            # What `_aligned` says, for a warp: TMA wants to know that rows come in whole tiles.
            tile = tile._replace(row=lax.div(tile.row, jnp.int32(self.block_m)) * self.block_m)
            fill(index * self.segments, tile, lambda: plgpu.barrier_arrive(mailbox.taken.at[0]))
            return index + 1, _take_by_warp(mailbox)

        initial = (jnp.int32(0), _take_by_warp(mailbox))
        count, _ = warp.while_loop(self.total, lambda carry: carry[1].live > 0, step, initial)
        plgpu.barrier_arrive(mailbox.taken.at[0])  # of the record that ended the walk
        return count * self.segments

    def look_ahead_at(self, groups):
        """Before which of a tile's groups of steps to see about the next tile."""
        if self.counter is None:
            return lax.div(groups, jnp.int32(2))
        return lax.max(groups - _LATE, 0)

    def consume(self, mailbox: Mailbox, body) -> None:
        """Calls `body(done, tile)` for every tile that the producer posts, `done` as in `fill`."""

        def step(carry):
            index, done, fields = carry
            tile = self._aligned(self._known(fields))
            # Where tiles are whole, `done` is a multiple of `index`: a register less to carry.
            body(done if self.cut is not None else index * self.segments, tile)
            return index + 1, done + (tile.end - tile.begin), tuple(take(mailbox, index + 1))

        initial = (jnp.int32(0), jnp.int32(0), tuple(take(mailbox, jnp.int32(0))))
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


def post(mailbox: Mailbox, index, tile: Tile) -> None:
    """Producer: makes `tile` the record of `index`."""
    record = mailbox.place(index)

    @pl.when(index >= _RECORDS)
    def _reuse():
        plgpu.barrier_wait(mailbox.taken.at[record])

    for position, field in enumerate(tile):
        mailbox.records[record, position] = field
    # The producer's own warps read it, too, and none may be a record behind when this one goes.
    plgpu.commit_smem()
    plgpu.barrier_arrive(mailbox.posted.at[record])


def take(mailbox: Mailbox, index) -> Tile:
    """Consumer: waits for the record of `index` and releases it."""
    record = mailbox.place(index)
    plgpu.barrier_wait(mailbox.posted.at[record])
    tile = read(mailbox, index)
    plgpu.barrier_arrive(mailbox.taken.at[record])
    return tile


def read(mailbox: Mailbox, index, load=operator.getitem) -> Tile:
    """The record of `index`, which must be posted; `load` as for `Walk.tile`."""
    record = mailbox.place(index)
    places = [(record, position) for position in range(len(Tile._fields))]
    return Tile(*(load(mailbox.records, place) for place in places))


def _post_by_warp(mailbox: Mailbox, tile: Tile) -> None:
    """Makes `tile` the record, which nobody may need any more."""
    for position, field in enumerate(tile):
        warp.store(mailbox.records, (0, position), field)
    plgpu.barrier_arrive(mailbox.posted.at[0])


def _take_by_warp(mailbox: Mailbox) -> Tile:
    """Waits for the record, without releasing it."""
    plgpu.barrier_wait(mailbox.posted.at[0])
    return read(mailbox, 0, warp.load)
