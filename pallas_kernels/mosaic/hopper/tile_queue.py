"""The queue in shared memory through which a CTA's producer hands tiles to its consumers.

    producer                                 each reader
    --------                                 -----------
    wait empty[i]                            wait full[i]
    tile -> slot[i], arrive full[i]   -->    read slot[i]
    the tile after it                 <--    arrive empty[i]

Either the four warps of the producer put tiles in together and only the consumers read, or one warp
puts them in and another one reads, too: then code of a single warp does it, see `mosaic.warp`. A
tile without live rows ends the queue.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import warp

QUEUE_BYTES = 1024  # every piece of shared memory takes a multiple of that


class Tile(NamedTuple):
    """One unit of work: `live` rows from `row` on times one column of weight blocks.

    Only the segments `begin` to `end` (exclusive) of K; all of them unless tiles are split.
    """

    expert: Any
    row: Any
    live: Any
    column: Any
    begin: Any
    end: Any


def at_width(tile: Tile, widths: Sequence[int], body: Callable[[int], None]) -> None:
    """Calls `body(width)` with the narrowest of the `widths` that holds the tile's live rows.

    Args:
        tile: The tile, with at least one live row.
        widths: Ascending, the last one `block_m`.
        body: Traced once per width.
    """
    narrower = 0
    for width in widths:

        @pl.when((tile.live > narrower) & (tile.live <= width))
        def _at_width(width=width):
            body(width)

        narrower = width


class TileQueue(NamedTuple):
    """Slots for the fields of a tile, and their barriers."""

    slots: Any
    full: Any
    empty: Any

    @property
    def num_slots(self) -> int:
        """Slots."""
        return self.slots.shape[0]

    def put(self, index, tile: Tile) -> None:
        """Producer warpgroup: hands the `index`-th tile over."""
        slot = self._slot(index)

        @pl.when(index >= self.num_slots)
        def _reuse():
            plgpu.barrier_wait(self.empty.at[slot])

        for position, field in enumerate(tile):
            self.slots[slot, position] = field
        # The producer's own warps read it, too, and none may be a tile behind when this one goes.
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.full.at[slot])

    def take(self, index) -> Tile:
        """Consumer: waits for the `index`-th tile and releases its slot."""
        slot = self._slot(index)
        plgpu.barrier_wait(self.full.at[slot])
        tile = self.read(index)
        plgpu.barrier_arrive(self.empty.at[slot])
        return tile

    def read(self, index, load=operator.getitem) -> Tile:
        """The `index`-th tile, whose slot must be full.

        Args:
            index: Its number in this CTA.
            load: How to read a number.
        """
        slot = self._slot(index)
        places = [(slot, position) for position in range(len(Tile._fields))]
        return Tile(*(load(self.slots, place) for place in places))

    def drain(self, count) -> None:
        """Producer warpgroup: observes the last phases of `count` tiles and the end.

        Every completed phase must be observed before the barriers go away.
        """

        @pl.loop(lax.max(count - (self.num_slots - 1), 0), count + 1)
        def _drain(index):
            plgpu.barrier_wait(self.empty.at[lax.rem(index, jnp.int32(self.num_slots))])

    def put_by_warp(self, tile: Tile) -> None:
        """A warp: hands a tile over in the only slot, which must be empty."""
        for position, field in enumerate(tile):
            warp.store(self.slots, (0, position), field)
        plgpu.barrier_arrive(self.full.at[0])

    def wait_empty_by_warp(self) -> None:
        """A warp: waits until all readers have released the only slot."""
        plgpu.barrier_wait(self.empty.at[0])

    def read_by_warp(self) -> Tile:
        """A warp: waits for the next tile, without releasing the only slot."""
        plgpu.barrier_wait(self.full.at[0])
        return self.read(0, warp.load)

    def release_by_warp(self) -> None:
        """A warp: releases the only slot."""
        plgpu.barrier_arrive(self.empty.at[0])

    def _slot(self, index):
        if self.num_slots == 1:
            return jnp.int32(0)
        return lax.rem(index, jnp.int32(self.num_slots))


def queue_types(num_slots: int, num_readers: int) -> TileQueue:
    """The scratch types of a queue.

    Args:
        num_slots: Tiles in it at most.
        num_readers: How many release a slot: consumer warpgroups, and a warp if it reads.
    """
    return TileQueue(
        slots=plgpu.SMEM((num_slots, len(Tile._fields)), jnp.int32),
        full=plgpu.Barrier(num_arrivals=1, num_barriers=num_slots),
        empty=plgpu.Barrier(num_arrivals=num_readers, num_barriers=num_slots),
    )
