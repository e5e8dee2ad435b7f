"""The producer warpgroup of a grouped matmul: fills the pipeline for the tiles of a scheduler.

per tile, per `stages_per_fill` steps of 128 columns:
look ahead     the scheduler may see about the next tile
wait empty[s]  of these stages
copy           tokens, their scales, weight blocks -> full[s]
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import warp
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
        tokens = self._tile_of_tokens(tile)
        at_width(
            tile,
            self.shape.widths,
            lambda width: self._produce(done, tile, tokens, width, look_ahead),
        )

    def _tile_of_tokens(self, tile: Tile):
        """Which tile of tokens the rows of a shared expert's tile are, counted from token 0.

        Negative for other experts; None where all rows are permuted.
        """
        if self.operands.tokens is None:
            return None
        load = warp.load if self.shape.is_dynamic else operator.getitem
        inside = tile.row - load(self.operands.plan.group_offsets, tile.expert)
        first_expert = self.operands.weights.shape[0] - self.shape.num_shared_experts
        number = lax.div(inside, jnp.int32(self.shape.block_m))
        return lax.select(tile.expert >= first_expert, number, jnp.int32(-1))

    def _produce(self, done, tile: Tile, tokens, width: int, look_ahead) -> None:
        shape = self.shape
        blocks = shape.weight_blocks(tile.column)
        fills = (tile.end - tile.begin) * (shape.segment_steps // shape.stages_per_fill)
        first_step = (done - tile.begin) * shape.segment_steps

        @pl.loop(0, fills)
        def _fill(i):
            look_ahead(i, fills)
            first = tile.begin * shape.segment_steps + i * shape.stages_per_fill
            ks = [first + j for j in range(shape.stages_per_fill)]
            self.pipeline.produce(self.operands, tile, tokens, width, blocks, first_step, ks)

    def commit_last(self, done) -> None:
        """Commits the rows whose copies are still under way."""
        if self.shape.is_gathered:
            self.pipeline.commit_last(done * self.shape.segment_steps)

    def drain(self, done) -> None:
        """Waits until the consumers have released all stages."""
        self.pipeline.drain(done * self.shape.segment_steps)
