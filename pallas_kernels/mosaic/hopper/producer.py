"""The producer warpgroup of a grouped matmul: fills the pipeline for the tiles of a scheduler.

per tile, per `stages_per_fill` steps of 128 columns:
look ahead     the scheduler may see about the next tile
wait empty[s]  of these stages
copy           tokens, their scales, weight blocks -> full[s]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.experimental import pallas as pl

from pallas_kernels.mosaic.hopper.matmul_config import MatmulShape
from pallas_kernels.mosaic.hopper.operands import Operands
from pallas_kernels.mosaic.hopper.pipeline import Pipeline
from pallas_kernels.mosaic.hopper.tile_queue import Tile, at_width


class Producer(NamedTuple):
    """A `tile_scheduler.TileProducer`."""

    shape: MatmulShape
    operands: Operands
    pipeline: Pipeline

    def produce(self, done, tile: Tile, look_ahead: Callable[[Any, Any], None]) -> None:
        """Fills the pipeline for a tile."""
        at_width(
            tile, self.shape.widths, lambda width: self._produce(done, tile, width, look_ahead)
        )

    def _produce(self, done, tile: Tile, width: int, look_ahead) -> None:
        shape = self.shape
        blocks = shape.weight_blocks(tile.column)
        fills = (tile.end - tile.begin) * (shape.segment_steps // shape.stages_per_fill)
        first_step = (done - tile.begin) * shape.segment_steps

        @pl.loop(0, fills)
        def _fill(i):
            look_ahead(i, fills)
            first = tile.begin * shape.segment_steps + i * shape.stages_per_fill
            ks = [first + j for j in range(shape.stages_per_fill)]
            self.pipeline.produce(self.operands, tile, width, blocks, first_step, ks)

    def commit_last(self, done) -> None:
        """Commits the rows whose copies are still under way."""
        if self.shape.is_gathered:
            self.pipeline.commit_last(done * self.shape.segment_steps)

    def drain(self, done) -> None:
        """Waits until the consumers have released all stages."""
        self.pipeline.drain(done * self.shape.segment_steps)
