"""A consumer warpgroup of a grouped matmul: sums a tile and hands the sums to the epilogue.

per tile:
accumulate     128-column steps from the pipeline, promoted to f32 registers
epilogue       of a tile that is whole, or that this CTA finishes (`split_k`)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.experimental import pallas as pl

from pallas_kernels.mosaic.hopper.accumulate import accumulate
from pallas_kernels.mosaic.hopper.matmul_config import MatmulShape, is_token_major
from pallas_kernels.mosaic.hopper.operands import Operands
from pallas_kernels.mosaic.hopper.pipeline import Pipeline
from pallas_kernels.mosaic.hopper.split_k import PartialSums
from pallas_kernels.mosaic.hopper.tile_queue import Tile, at_width


class Epilogue(NamedTuple):
    """What becomes of a tile's sums; each function is called by both consumer warpgroups.

    Attributes:
        weight_major: `weight_major(sums, tile, width, outputs, staging)`, with one
            `f32[64, width]` per weight block, weights x tokens.
        token_major: The same for a full tile of 128 tokens, with `f32[64, 128]`, tokens x weights.
        out_type: Shapes of the outputs, a pytree.
        staging_types: Scratch types, a pytree.
    """

    weight_major: Callable[..., None]
    token_major: Callable[..., None]
    out_type: Any
    staging_types: Any


class Consumer(NamedTuple):
    """Computes tiles; `outputs` and `staging` are the epilogue's references.

    Without split tiles `partial_sums` is None.
    """

    shape: MatmulShape
    operands: Operands
    pipeline: Pipeline
    partial_sums: PartialSums | None
    epilogue: Epilogue
    outputs: Any
    staging: Any

    def compute(self, done, tile: Tile) -> None:
        """Computes a tile, after `done` segments of the CTA's tiles before."""
        at_width(tile, self.shape.widths, functools.partial(self._compute, done, tile))

    def _compute(self, done, tile: Tile, width: int) -> None:
        partial_sums = self.partial_sums
        sums = accumulate(
            self.pipeline,
            self.operands.weights_scale,
            self.shape,
            tile,
            width,
            first_step=(done - tile.begin) * self.shape.segment_steps,
            store_segment=partial_sums
            and functools.partial(partial_sums.store_partial, tile, width),
        )
        if partial_sums is None:
            self._finish(tile, width, sums)
            return
        partial_sums.publish(tile)

        @pl.when(tile.begin == 0)
        def _finishes():
            self._finish(tile, width, partial_sums.reduce_partials(tile, width, sums))

    def _finish(self, tile: Tile, width: int, sums) -> None:
        epilogue = self.epilogue
        run = epilogue.token_major if is_token_major(width) else epilogue.weight_major
        run(sums, tile, width, self.outputs, self.staging)
