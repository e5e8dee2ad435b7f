"""Which tile each size class gets. Chosen from static shapes only, so routing never recompiles.

A table measured on this kind of GPU (`python -m pallas_kernels.mosaic.tune`) wins over the shipped
one.
"""

from __future__ import annotations

import functools

from pallas_kernels import device
from pallas_kernels.mosaic import tiling_check
from pallas_kernels.mosaic.hopper.grouped_matmul import MatmulConfig
from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.tuning import cache
from pallas_kernels.tuning.cache import Pair, Table

KERNELS = "mosaic"
MAX_BLOCK_M, gathers = tiling_check.MAX_BLOCK_M, tiling_check.gathers

# Measured on an H100 (docs/experiments).
_UP = {
    16: MatmulConfig(block_m=16, num_stages=6, stages_per_fill=2, split_k_steps=14),
    64: MatmulConfig(block_m=64, num_stages=5, tail_widths=(16, 32, 48), stages_per_fill=2),
    128: MatmulConfig(block_m=128, num_stages=4, tail_widths=(32, 64, 96), scheduler="dynamic"),
}
_DOWN = {
    16: MatmulConfig(block_m=16, num_stages=6, stages_per_fill=2, split_k_steps=8),
    64: MatmulConfig(block_m=64, num_stages=4, tail_widths=(16, 32, 48), stages_per_fill=2),
    128: MatmulConfig(block_m=128, num_stages=3, tail_widths=(32, 64, 96), scheduler="dynamic"),
}
SHIPPED: Table[MatmulConfig] = {block_m: Pair(_UP[block_m], _DOWN[block_m]) for block_m in _UP}


def block_m(expected_rows: float) -> int:
    """Tokens of a tile, from the rows that an expert is likely to get."""
    if expected_rows <= 8:
        return 16
    # Experts get more and less than that; those of more than one tile are read twice.
    return 64 if expected_rows <= 48 else 128


def up_config(block_m: int) -> MatmulConfig:
    """Tile and ring of the up-projection for a plan of `block_m`."""
    return table()[block_m].up_projection


def down_config(block_m: int) -> MatmulConfig:
    """Tile and ring of the down-projection for a plan of `block_m`."""
    return table()[block_m].down_projection


def parts_bytes(hidden_size: int, intermediate_size: int) -> int:
    """Most global memory for sums of tiles that are cut along K, of both projections."""
    sms = device.num_sms()
    return max(
        pair.up_projection.parts_bytes(hidden_size // QUANT_BLOCK, 2, sms)
        + pair.down_projection.parts_bytes(intermediate_size // QUANT_BLOCK, 2, sms)
        for pair in table().values()
    )


def is_shipped() -> bool:
    """Whether the table in use here is the one that comes with the package."""
    return table() is SHIPPED


def table() -> Table[MatmulConfig]:
    """The table in use here: `block_m` to the tilings of both matmuls."""
    gpu = device.local_gpu()
    return SHIPPED if gpu is None else _table_of(gpu.device_kind)


@functools.cache
def _table_of(device_kind: str) -> Table[MatmulConfig]:
    return cache.choose(KERNELS, device_kind, SHIPPED, tiling_check.check)
