"""Which tiling each size gets, from static shapes and the kind of GPU alone.

A table measured on this kind of GPU by `python -m pallas_kernels.triton.tune` wins over the
shipped one.
"""

import functools

from pallas_kernels import device
from pallas_kernels.triton.grouped_matmul import MatmulConfig
from pallas_kernels.tuning import cache
from pallas_kernels.tuning.cache import Check, Pair, Table

KERNELS = "triton"

_OTHERS_SMEM = 101376  # what a program may have on any GPU from Ada on

# Measured by `python -m pallas_kernels.triton.tune` on an H100 (docs/experiments).
_HOPPER: Table[MatmulConfig] = {
    # 16 and 32 were measured in the layer, but the tuner has not compared them with others yet.
    16: Pair(MatmulConfig(16, 8, 3, swap_ab=True), MatmulConfig(16, 8, 3, swap_ab=True)),
    32: Pair(MatmulConfig(32, 8, 3, swap_ab=True), MatmulConfig(32, 8, 3, swap_ab=True)),
    64: Pair(MatmulConfig(64, 4, 2, 2), MatmulConfig(64, 4, 2, 2)),
    128: Pair(MatmulConfig(128, 8, 3, 1), MatmulConfig(128, 8, 3, 1)),
}

# Not measured on any GPU.
_OTHERS: Table[MatmulConfig] = {
    # 8 warps and 99 KiB of shared memory also suit Ada, whose tensor cores work from registers.
    16: Pair(MatmulConfig(16, 8, 3, swap_ab=True), MatmulConfig(16, 8, 3, swap_ab=True)),
    32: Pair(MatmulConfig(32, 8, 3, swap_ab=True), MatmulConfig(32, 8, 3, swap_ab=True)),
    64: Pair(MatmulConfig(64, 8, 3), MatmulConfig(64, 8, 2)),
}

BLOCK_MS = tuple(_HOPPER)
"""All that `choose_block_m` can return."""


def choose(block_m: int, compute_capability: int) -> Pair[MatmulConfig]:
    """The tiling for a plan's `block_m`, one of those that `choose_block_m` returns."""
    return _table(compute_capability)[block_m]


def is_shipped(compute_capability: int) -> bool:
    """Whether the table in use here is the one that comes with the package."""
    return _table(compute_capability) is shipped(compute_capability)


def shipped(compute_capability: int) -> Table[MatmulConfig]:
    """The table that comes with the package."""
    return _HOPPER if _is_hopper(compute_capability) else _OTHERS


def checker(compute_capability: int) -> Check[MatmulConfig]:
    """Refuses, for `tuning_cache`, what needs more shared memory than there is."""
    limit = device.SMEM_BYTES if _is_hopper(compute_capability) else _OTHERS_SMEM

    def check(role: str, config: MatmulConfig) -> None:
        if config.smem_bytes > limit:
            raise ValueError(f"needs {config.smem_bytes} bytes of shared memory of {limit}")

    return check


def _table(compute_capability: int) -> Table[MatmulConfig]:
    gpu = device.local_gpu()
    if gpu is None or str(gpu.compute_capability).replace(".", "") != str(compute_capability):
        return shipped(compute_capability)
    return _table_of(gpu.device_kind, compute_capability)


@functools.cache
def _table_of(device_kind: str, compute_capability: int) -> Table[MatmulConfig]:
    check = checker(compute_capability)
    return cache.choose(KERNELS, device_kind, shipped(compute_capability), check)


def _is_hopper(compute_capability: int) -> bool:
    return compute_capability // 10 == 9


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
    return 128 if rows_per_expert > 192 and _is_hopper(compute_capability) else 64
