"""Which CTA computes which tile, and how a CTA's warpgroups agree on it.

Tiles are ordered expert by expert; inside one, rows fastest, so that an expert's weights are read
from HBM once and from L2 after that. The first tile of a CTA is its index. Every further one is
`sms` tiles on or, with a counter, the next that no CTA has, drawn as a ticket, so that nobody idles
while another has two tiles left.

    producer warpgroup                    consumer warpgroups
    ------------------                    -------------------
    wait taken[i % 2]
    tile i -> record[i % 2], posted[i % 2]  -->  wait posted[i % 2], read the record
    draw the next ticket, look it up      <--    arrive taken[i % 2]
    fill the ring for tile i                     compute tile i

A record with no live rows ends the walk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tickets

_RECORDS = 2
MAILBOX_BYTES = 1024  # every piece of shared memory takes a multiple of that


class Tile(NamedTuple):
    """One unit of work: `live` rows from `row` on times one column of weight blocks."""

    expert: Any
    row: Any
    live: Any
    column: Any


class Mailbox(NamedTuple):
    """Shared memory through which the producer tells the consumers their next tile."""

    records: Any
    posted: Any
    taken: Any


def mailbox_types(num_consumers: int) -> list[Any]:
    """Scratch types of a `Mailbox`."""
    return [
        plgpu.SMEM((_RECORDS + 1, len(Tile._fields)), jnp.int32),  # the last one is the ticket's
        plgpu.Barrier(num_arrivals=1, num_barriers=_RECORDS),
        plgpu.Barrier(num_arrivals=num_consumers, num_barriers=_RECORDS),
    ]


class Walk(NamedTuple):
    """The order of tiles, and this CTA's place in it; `counter` is None for a fixed deal."""

    block_m: int
    num_columns: int
    sms: int
    sizes: Any
    offsets: Any
    tile_expert: Any
    total: Any
    counter: Any

    def tile(self, linear) -> Tile:
        """The `linear`-th tile; past the last one, a tile without live rows."""
        # Dead tiles name expert 0, so the look-up need not wait until `total` has been read.
        row_tile = lax.div(linear, jnp.int32(self.num_columns))
        expert = self.tile_expert[lax.min(row_tile, jnp.int32(self.tile_expert.shape[0] - 1))]
        size, offset = self.sizes[expert], self.offsets[expert]
        row_tiles = lax.max(lax.div(size + (self.block_m - 1), jnp.int32(self.block_m)), 1)
        inside = linear - lax.div(offset, jnp.int32(self.block_m)) * self.num_columns
        first = lax.rem(inside, row_tiles) * self.block_m
        live = lax.min(size - first, jnp.int32(self.block_m))
        live = lax.select(linear < self.total, live, jnp.int32(0))
        return Tile(expert, offset + first, live, lax.div(inside, row_tiles))

    def produce(self, mailbox: Mailbox, fill) -> Any:
        """Posts every tile of this CTA and fills the ring for it.

        Args:
            mailbox: Where the tiles are posted.
            fill: `fill(index, tile, look_ahead)`; it calls `look_ahead()` once, when the ring is
                ahead of the consumers, since finding the next tile takes longer than a step.

        Returns:
            How many tiles there were.
        """
        post(mailbox, jnp.int32(0), self.tile(lax.axis_index("sm")))

        def step(index):
            tile = self._aligned(read(mailbox, index))
            fill(index, tile, lambda: post(mailbox, index + 1, self._next_tile(index, mailbox)))
            return index + 1

        count = lax.while_loop(lambda index: read(mailbox, index).live > 0, step, jnp.int32(0))
        if self.counter is not None:
            tickets.retire(self.counter, self.sms)

        # Every completed phase must be observed before the barriers go away.
        @pl.loop(lax.max(count - (_RECORDS - 1), 0), count + 1)
        def _drain(record):
            plgpu.barrier_wait(mailbox.taken.at[lax.rem(record, jnp.int32(_RECORDS))])

        return count

    def consume(self, mailbox: Mailbox, body) -> None:
        """Calls `body(index, tile)` for every tile that the producer posts."""

        def step(carry):
            index, fields = carry
            body(index, self._aligned(fields))
            return index + 1, tuple(take(mailbox, index + 1))

        initial = (jnp.int32(0), tuple(take(mailbox, jnp.int32(0))))
        lax.while_loop(lambda carry: carry[1][2] > 0, step, initial)

    def _next_tile(self, index, mailbox) -> Tile:
        if self.counter is None:
            return self.tile(lax.axis_index("sm") + (index + 1) * self.sms)
        ticket = tickets.draw(self.counter, mailbox.records.at[_RECORDS, pl.ds(0, 1)])
        return self.tile(self.sms + ticket)

    def _aligned(self, fields) -> Tile:
        tile = Tile(*fields)
        return tile._replace(row=pl.multiple_of(tile.row, self.block_m))


def post(mailbox: Mailbox, index, tile: Tile) -> None:
    """Producer: makes `tile` the record of `index`."""
    record = lax.rem(index, jnp.int32(_RECORDS))

    @pl.when(index >= _RECORDS)
    def _reuse():
        plgpu.barrier_wait(mailbox.taken.at[record])

    for position, field in enumerate(tile):
        mailbox.records[record, position] = field
    plgpu.barrier_arrive(mailbox.posted.at[record])


def take(mailbox: Mailbox, index) -> Tile:
    """Consumer: waits for the record of `index` and releases it."""
    record = lax.rem(index, jnp.int32(_RECORDS))
    plgpu.barrier_wait(mailbox.posted.at[record])
    tile = read(mailbox, index)
    plgpu.barrier_arrive(mailbox.taken.at[record])
    return tile


def read(mailbox: Mailbox, index) -> Tile:
    """The record of `index`, which must be posted."""
    record = lax.rem(index, jnp.int32(_RECORDS))
    return Tile(*(mailbox.records[record, position] for position in range(len(Tile._fields))))
