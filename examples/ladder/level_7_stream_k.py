"""Level 7: stream-K. docs/kernels/level_7_stream_k.md explains it.

As level 6; where few tiles are left over after the last full round, they are split along K, so that
every multiprocessor gets an equal share of them. `pallas_kernels.mosaic.hopper.stream_k` has the
partition, `split_k` the partial sums. From here on the kernel is the library's `grouped_matmul`,
which level 6 has shown from the inside; what is still ours is the end of a tile.

The interpreter does not split tiles: it has no semaphores in global memory.

    python examples/ladder/level_7_stream_k.py
"""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import sys
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports last, Ctrl-C just ends

from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # the root of the repository
from examples.ladder import harness, level_6_persistent, store
from examples.ladder.level_4_swap_ab import FEW_TOKENS, block_m
from examples.ladder.level_5_wide_reads import tiles
from examples.ladder.problem import Level
from pallas_kernels import interruption
from pallas_kernels.mosaic.hopper.grouped_matmul import grouped_matmul as library_matmul
from pallas_kernels.types import GroupPlan, Quantized

NUM_SEGMENTS = 4


def grouped_matmul(
    rows: Quantized,
    plan: GroupPlan,
    weights: Float8e4m3fn[Array, "E N K"],
    weights_scale: Float32[Array, "E N/128 K/128"],
    interpret: Any = None,
    num_segments: int = NUM_SEGMENTS,
) -> BFloat16[Array, "M N"]:
    """As in level 6; the last tiles of few tokens are split into `num_segments` pieces of K."""
    config = level_6_persistent.MANY
    if plan.block_m == FEW_TOKENS:
        steps = rows.scales.shape[0] // num_segments
        config = dataclasses.replace(level_6_persistent.FEW, split_k_steps=steps)
    config = level_6_persistent.on_this_device(config, interpret)
    shape = tiles(config, rows, weights, interpret)
    num_rows, num_columns = rows.values.shape[0], weights.shape[1]
    out, _ = library_matmul(
        rows,
        plan,
        weights,
        weights_scale,
        config=config,
        num_columns=shape.num_columns,
        weight_blocks=shape.weight_blocks,
        epilogue=store.bf16_epilogue(num_rows, num_columns, plan.block_m, shape.num_blocks),
        name="ladder_stream_k",
        interpret=interpret,
    )
    return out


LEVEL = Level(7, "stream-K", grouped_matmul, block_m=block_m)

if __name__ == "__main__":
    interruption.exit_with(lambda: harness.main(LEVEL))
