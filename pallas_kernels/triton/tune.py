"""Measures the tilings of the Triton kernels: `python -m pallas_kernels.triton.tune`.

The best ones go to the user's cache folder, where `tilings` finds them. Triton is imported when a
tuner is asked for: without it the command still says what it does, and what is missing.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import interruption
from pallas_kernels.tuning import command, search
from pallas_kernels.tuning.search import Case, Prepared, Sizes, Tuner, Weights

CHOICES: Mapping[str, Sequence[int]] = {
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4, 5, 6),
    "programs_per_sm": (0, 1, 2, 3),
    "swap_ab": (False, True),
}


def prepare(case: Case, weights: Weights, sizes: Sizes) -> Prepared:
    """The inputs of one matmul."""
    from pallas_kernels.triton import down_projection, up_projection
    from pallas_kernels.triton.launch import call

    plan = search.draw_plan(case.num_tokens, case.block_m, sizes)
    live = np.flatnonzero(plan.row_token >= 0)
    row_token, *tiles = map(jnp.asarray, (plan.row_token, plan.tile_expert, plan.num_tiles))
    num_sms = jax.local_devices()[0].core_count
    if case.role == "up_projection":
        tokens = search.unit_rows(3, case.num_tokens, sizes.hidden_size)
        arrays: tuple[Any, ...] = (
            *tokens,
            *weights.up_projection,
            row_token,
            *tiles,
        )
        launch: Any = up_projection.launch
    else:
        rows = search.unit_rows(3, len(plan.row_token), sizes.intermediate_size)
        arrays = (*rows, *weights.down_projection, *tiles)
        launch = down_projection.launch

    def build(config: Any) -> Any:
        return lambda *inputs: call(launch(*inputs, config=config, num_sms=num_sms))

    def live_rows(result: Any) -> jax.Array:
        if len(result) == 1:
            return result[0][live]
        values, scales = result
        return search.dequantized(values, scales, live)

    return Prepared(arrays, build, live_rows)


def tuner(gpu: jax.Device) -> Tuner | str:
    """What to tune, or why these kernels do not run there."""
    for package in ("triton", "jax_triton"):
        if importlib.util.find_spec(package) is None:
            return f"needs the package {package}: install the extra triton"
    from pallas_kernels.triton import tilings

    capability = tilings.number_of(gpu.compute_capability)
    if capability < tilings.OLDEST:
        oldest = "{}.{}".format(*divmod(tilings.OLDEST, 10))
        return f"needs compute capability {oldest} or newer, got {gpu.device_kind}"

    def block_m(expected_rows: float) -> int:
        return tilings.block_m(expected_rows, capability)

    return Tuner(
        kernels=tilings.kernels(tilings.generation(capability)),
        gpu=tilings.gpu(capability),
        choices=lambda *_: CHOICES,
        block_m=block_m,
        prepare=prepare,
    )


if __name__ == "__main__":
    interruption.exit_with(lambda: command.main(sys.argv[1:], "pallas_kernels.triton.tune", tuner))
