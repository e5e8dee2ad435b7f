"""Level 8: SwiGLU and requantization fused in. docs/kernels/level_8_fused.md explains it.

This is the up-projection of the layer, `pallas_kernels.mosaic.hopper.up_projection`, with the tiles
that the layer takes: a tile multiplies block j of the up half and block j of the gate half of the
weights, so that its end has all it needs for

    silu(gate) * up -> e4m3 and one scale per row and 128 columns

    python examples/ladder/level_8_fused.py
"""

from __future__ import annotations

import pathlib
import signal
import sys
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports last, Ctrl-C just ends

from jaxtyping import Array, Float8e4m3fn, Float32

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # the root of the repository
from examples.ladder import harness, level_6_persistent
from examples.ladder.level_4_swap_ab import block_m
from examples.ladder.problem import Level
from pallas_kernels import interruption
from pallas_kernels.mosaic import tilings
from pallas_kernels.mosaic.hopper.up_projection import up_projection
from pallas_kernels.types import GroupPlan, Quantized


def swiglu_matmul(
    rows: Quantized,
    plan: GroupPlan,
    weights: Float8e4m3fn[Array, "E 2*I H"],
    weights_scale: Float32[Array, "E 2*I/128 H/128"],
    interpret: Any = None,
) -> Quantized:
    """`silu(gate) * up` of `rows @ weights[expert].T`: `e4m3[M, I]` and `f32[I/128, M]`."""
    num_experts, num_columns, hidden_size = weights.shape
    chosen = tilings.choose(plan.block_m, hidden_size, num_columns // 2, num_experts)
    config = level_6_persistent.on_this_device(chosen.up_projection, interpret)
    activations, _ = up_projection(
        rows, plan, weights, weights_scale, config=config, interpret=interpret
    )
    return activations


LEVEL = Level(8, "fused", swiglu_matmul, block_m=block_m, is_fused=True)

if __name__ == "__main__":
    interruption.exit_with(lambda: harness.main(LEVEL))
