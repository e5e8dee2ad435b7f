"""Measures tilings of the Mosaic kernels on this GPU: `python -m pallas_kernels.mosaic.tune`.

The best ones go to the user's cache folder, where `tilings` finds them.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import interruption
from pallas_kernels.mosaic import hopper, tiling_check, tilings
from pallas_kernels.mosaic.hopper.matmul_config import MOST_SEGMENTS, MatmulConfig, Scheduler
from pallas_kernels.tuning import command, search
from pallas_kernels.tuning.cache import Gpu
from pallas_kernels.tuning.search import Case, Prepared, Sizes, Tuner, Weights

_SEGMENTS = range(2, MOST_SEGMENTS + 1)


def choices(config: MatmulConfig, num_steps: int) -> Mapping[str, Sequence[Any]]:
    """What to try: depths of the pipeline, stages per fill, tails, splits of K, schedulers.

    Args:
        config: Where the search starts.
        num_steps: 128-column steps along K: a split that does not divide them is none.
    """
    splits = sorted(num_steps // n for n in _SEGMENTS if num_steps % n == 0)
    half, sixteenth = config.block_m // 2, range(16, config.block_m, 16)
    quarters = range(config.block_m // 4, config.block_m, config.block_m // 4)
    tails = {(), tuple(sixteenth), (half,), tuple(quarters)}
    return {
        "num_stages": range(3, 9),
        "stages_per_fill": (1, 2),
        "tail_widths": sorted(
            tail for tail in tails if len(tail) < 4 and not any(w % 16 for w in tail)
        ),
        "split_k_steps": (None, *splits) if config.block_m < 128 else (None,),
        "scheduler": typing.get_args(Scheduler),
    }


def prepare(case: Case, weights: Weights, sizes: Sizes, interpret: Any = None) -> Prepared:
    """The inputs of one matmul, its rows gathered where the layer does so before it.

    Args:
        case: Which matmul, how many tokens.
        weights: Of the local experts.
        sizes: Of the layer.
        interpret: Interpreter parameters, or None for the GPU.
    """
    plan = search.draw_plan(case.num_tokens, case.block_m, sizes)
    live = np.flatnonzero(plan.row_token >= 0)
    is_up = case.role == "up_projection"
    columns = sizes.hidden_size if is_up else sizes.intermediate_size
    gathers = is_up and tilings.gathers(case.block_m)
    num_rows = case.num_tokens if gathers else len(plan.row_token)
    rows = search.unit_rows(3, num_rows, columns)

    def live_rows(result: Any) -> jax.Array:
        if not is_up:
            return result[live]
        return search.dequantized(result.values, result.scales, live)

    return Prepared(
        arrays=(rows, jax.tree.map(jnp.asarray, plan), *getattr(weights, case.role)),
        build=lambda config: tiling_check.projection(case.role, config, interpret),
        rows=live_rows,
    )


def tuner(gpu: jax.Device) -> Tuner | str:
    """What to tune, or why these kernels do not run there."""
    if str(gpu.compute_capability) != hopper.COMPUTE_CAPABILITY:
        return (
            f"needs a GPU of compute capability {hopper.COMPUTE_CAPABILITY} (Hopper), "
            f"got {gpu.device_kind}"
        )
    return Tuner(
        kernels=tilings.KERNELS,
        gpu=Gpu(hopper.COMPUTE_CAPABILITY, gpu.device_kind),
        choices=choices,
        block_m=tilings.block_m,
        prepare=prepare,
    )


if __name__ == "__main__":
    interruption.exit_with(lambda: command.main(sys.argv[1:], "pallas_kernels.mosaic.tune", tuner))
