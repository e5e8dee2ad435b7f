"""Which tiling each size gets, from static shapes and the kind of GPU alone."""

from typing import NamedTuple

from pallas_kernels.triton.matmul import MatmulConfig


class Configs(NamedTuple):
    """Tiling of the two matmuls; both have the plan's `block_m`."""

    up_projection: MatmulConfig
    down_projection: MatmulConfig


# Measured by `python -m pallas_kernels.triton.tune` on an H100 (docs/performance_log.md).
_HOPPER = {
    # 16 and 32 are not measured yet: the memory of the best tilings without `swap_ab`.
    16: Configs(MatmulConfig(16, 8, 3, swap_ab=True), MatmulConfig(16, 8, 3, swap_ab=True)),
    32: Configs(MatmulConfig(32, 8, 3, swap_ab=True), MatmulConfig(32, 8, 3, swap_ab=True)),
    64: Configs(MatmulConfig(64, 4, 2, 2), MatmulConfig(64, 4, 2, 2)),
    128: Configs(MatmulConfig(128, 8, 3, 1), MatmulConfig(128, 8, 3, 1)),
}

# Not measured on any GPU.
_OTHERS = {
    # 8 warps and 99 KiB of shared memory also suit Ada, whose tensor cores work from registers.
    16: Configs(MatmulConfig(16, 8, 3, swap_ab=True), MatmulConfig(16, 8, 3, swap_ab=True)),
    32: Configs(MatmulConfig(32, 8, 3, swap_ab=True), MatmulConfig(32, 8, 3, swap_ab=True)),
    64: Configs(MatmulConfig(64, 8, 3), MatmulConfig(64, 8, 2)),
}

BLOCK_MS = tuple(_HOPPER)
"""All that `choose_block_m` can return."""


def choose(block_m: int, compute_capability: int) -> Configs:
    """The tiling for a plan's `block_m`, one of those that `choose_block_m` returns."""
    return (_HOPPER if compute_capability // 10 == 9 else _OTHERS)[block_m]


def choose_block_m(rows_per_expert: float, compute_capability: int) -> int:
    """Rows of a tile.

    Args:
        rows_per_expert: Expected rows of a local expert: T * top_k / E.
        compute_capability: 90 for Hopper.

    Returns:
        Few rows where few are expected: weights are what is read then, and padding is wasted work.
    """
    if rows_per_expert <= 8:
        return 16
    if rows_per_expert <= 16:
        return 32
    return 128 if rows_per_expert > 192 and compute_capability // 10 == 9 else 64
