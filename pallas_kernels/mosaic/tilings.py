"""Which tile each size class gets. Chosen from static shapes only, so routing never recompiles.

The tables are data (`pallas_kernels.tuning`): one that the user measured on this kind of GPU
(`python -m pallas_kernels.mosaic.tune`) wins over a shipped one.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels import device
from pallas_kernels.mosaic import hopper, tiling_check
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig
from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.tuning import cache
from pallas_kernels.tuning.cache import Chosen, Gpu
from pallas_kernels.tuning.table_format import Kernels, Pair, Sizes, Table

MAX_BLOCK_M, gathers = tiling_check.MAX_BLOCK_M, tiling_check.gathers

MAX_WIDENED_BLOCK_M = 64
"""Tokens of the largest tile of 16-bit rows: its weights take registers of their own."""

_STAGES = {16: (5, 5), 64: (4, 3)}  # of 16-bit rows, up- and down-projection

KERNELS = Kernels("mosaic", MatmulConfig, (16, 64, 128), tiling_check.check)


def block_m(expected_rows: float) -> int:
    """Tokens of a tile, from the rows that an expert is likely to get."""
    if expected_rows <= 8:
        return 16
    # Experts get more and less than that; those of more than one tile are read twice.
    return 64 if expected_rows <= 48 else 128


def choose(
    block_m: int, hidden_size: int, intermediate_size: int, num_local_experts: int
) -> Pair[MatmulConfig]:
    """Tiles and pipelines of both projections.

    Args:
        block_m: Of the plan, one that the function of that name returns.
        hidden_size: H.
        intermediate_size: I.
        num_local_experts: E_local.
    """
    return table(hidden_size, intermediate_size, num_local_experts)[block_m]


def choose_widened(
    block_m: int, hidden_size: int, intermediate_size: int, num_local_experts: int
) -> Pair[MatmulConfig]:
    """Tiles and pipelines for rows of 16 bits: those of FP8 rows, with the stages that fit.

    Args:
        block_m: Of the plan, at most `MAX_WIDENED_BLOCK_M`.
        hidden_size: H.
        intermediate_size: I.
        num_local_experts: E_local.

    Raises:
        ValueError: The plan was made for FP8 rows.
    """
    if block_m > MAX_WIDENED_BLOCK_M:
        raise ValueError(
            f'plan: expected one of plan_groups(precision="high"), of tiles of up to '
            f"{MAX_WIDENED_BLOCK_M} rows, got {block_m}"
        )
    pair = choose(block_m, hidden_size, intermediate_size, num_local_experts)
    return Pair(
        *(_widened(config, most) for config, most in zip(pair, _STAGES[block_m], strict=True))
    )


def _widened(config: MatmulConfig, most: int) -> MatmulConfig:
    splits = config.split_k_steps if config.block_m == 16 else None  # no registers for more sums
    return dataclasses.replace(
        config,
        split_k_steps=splits,
        num_stages=min(config.num_stages, most),
        stages_per_fill=min(config.stages_per_fill, 2),
        scheduler="static",
    )


def partials_bytes(hidden_size: int, intermediate_size: int, num_local_experts: int) -> int:
    """Most global memory for the partial sums of tiles that are split, of both projections."""
    sms = device.num_sms()
    pairs = table(hidden_size, intermediate_size, num_local_experts).values()
    return max(
        pair.up_projection.partials_bytes(hidden_size // QUANT_BLOCK, 2, sms)
        + pair.down_projection.partials_bytes(intermediate_size // QUANT_BLOCK, 2, sms)
        for pair in pairs
    )


def table(hidden_size: int, intermediate_size: int, num_local_experts: int) -> Table[MatmulConfig]:
    """The table in use for a rank: `block_m` to the tilings of both matmuls."""
    return chosen(Sizes(hidden_size, intermediate_size, num_local_experts)).table


def chosen(sizes: Sizes) -> Chosen[MatmulConfig]:
    """The table in use for a rank, and whether it is a shipped one."""
    return cache.choose(KERNELS, gpu(), sizes)


def gpu() -> Gpu:
    """The GPU that is compiled for."""
    local = device.local_gpu()
    return Gpu(hopper.COMPUTE_CAPABILITY, local and local.device_kind)
