"""Which tiling each size gets, from static shapes and the kind of GPU alone.

The tables are data (`pallas_kernels.tuning`): one that the user measured on this kind of GPU
(`python -m pallas_kernels.triton.tune`) wins over a shipped one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from pallas_kernels import device
from pallas_kernels.triton.grouped_matmul import MatmulConfig
from pallas_kernels.tuning import cache
from pallas_kernels.tuning.cache import Chosen, Gpu
from pallas_kernels.tuning.table_format import Kernels, Pair, Sizes

NAME = "triton"


class Generation(NamedTuple):
    """What GPUs of one compute capability have.

    Attributes:
        smem_bytes: Shared memory that a program may have.
        block_ms: Rows of the tiles that are worth it there.
        matmul_reads_smem: Whether the matrix instruction reads its operands from shared memory
            while other work goes on (wgmma, tcgen05), instead of from registers (mma).
        barrier_bytes: Bound on the shared memory that Triton takes beside the pipeline.
    """

    smem_bytes: int
    block_ms: tuple[int, ...]
    matmul_reads_smem: bool
    barrier_bytes: int = 0

    def smem_needed(self, config: MatmulConfig, *, widened: bool = False) -> int:
        """Shared memory that a program needs at most; `widened` is whether rows have 16 bits."""
        pipeline = config.smem_bytes(matmul_reads_smem=self.matmul_reads_smem, widened=widened)
        return pipeline + self.barrier_bytes


# Tiles of 128 rows have 2 x 128 x 128 partial sums in the registers of 8 warps. Triton 3.6 compiles
# them without spills for Hopper only, and of more warps it makes f16 instructions.
_NARROW, _ALL = (16, 32, 64), (16, 32, 64, 128)

GENERATIONS = {
    89: Generation(101376, _NARROW, matmul_reads_smem=False),
    90: Generation(232448, _ALL, matmul_reads_smem=True),
    100: Generation(232448, _NARROW, matmul_reads_smem=True, barrier_bytes=1024),
    103: Generation(232448, _NARROW, matmul_reads_smem=True, barrier_bytes=1024),
    120: Generation(101376, _NARROW, matmul_reads_smem=False),
}
"""By compute capability, those with shipped tables: 90 for Hopper."""

OLDEST = min(GENERATIONS)
"""The first compute capability with FP8 matrix instructions."""

BLOCK_MS = _ALL
"""All that `block_m` can return, on any GPU."""

MAX_WIDENED_BLOCK_M = 64
"""Rows of the largest tile of 16-bit rows: its weights take registers of their own."""

INVARIANT_BLOCK_M = 64
"""Of every plan whose rows keep their bits in any batch: the largest that all GPUs have."""


def block_m(expected_rows: float, compute_capability: int) -> int:
    """Rows of a tile.

    Args:
        expected_rows: Rows that an expert is likely to get.
        compute_capability: 90 for Hopper.

    Returns:
        Few rows where few are expected: weights are what is read then, and padding is wasted work.
    """
    if expected_rows <= 8:
        return 16
    if expected_rows <= 16:
        return 32
    widest = GENERATIONS[generation(compute_capability)].block_ms[-1]
    return min(128 if expected_rows > 192 else 64, widest)


def choose(
    block_m: int,
    compute_capability: int,
    hidden_size: int,
    intermediate_size: int,
    num_local_experts: int,
    *,
    only_shipped: bool = False,
) -> Pair[MatmulConfig]:
    """Tilings of both projections.

    Args:
        block_m: Of the plan, one that the function of that name returns.
        compute_capability: 90 for Hopper.
        hidden_size: H.
        intermediate_size: I.
        num_local_experts: E_local.
        only_shipped: Whether a table that the user measured does not count.
    """
    sizes = Sizes(hidden_size, intermediate_size, num_local_experts)
    if only_shipped:
        known = kernels(generation(compute_capability))
        return cache.nearest_shipped(known, gpu(compute_capability), sizes)[block_m]
    return chosen(compute_capability, sizes).table[block_m]


def choose_widened(
    block_m: int,
    compute_capability: int,
    hidden_size: int,
    intermediate_size: int,
    num_local_experts: int,
    *,
    only_shipped: bool = False,
) -> Pair[MatmulConfig]:
    """Tilings of both projections for rows of 16 bits: those of FP8 rows, as far as they fit.

    Args:
        block_m: Of the plan, at most `MAX_WIDENED_BLOCK_M`.
        compute_capability: 90 for Hopper.
        hidden_size: H.
        intermediate_size: I.
        num_local_experts: E_local.
        only_shipped: As for `choose`.

    Raises:
        ValueError: The plan was made for FP8 rows.
    """
    if block_m > MAX_WIDENED_BLOCK_M:
        raise ValueError(
            f'plan: expected one of plan_groups(precision="high"), of tiles of up to '
            f"{MAX_WIDENED_BLOCK_M} rows, got {block_m}"
        )
    sizes = (hidden_size, intermediate_size, num_local_experts)
    pair = choose(block_m, compute_capability, *sizes, only_shipped=only_shipped)
    return Pair(*(widened(config, compute_capability) for config in pair))


def widened(config: MatmulConfig, compute_capability: int) -> MatmulConfig:
    """The tiling of FP8 rows for 16-bit ones, with the stages that fit.

    Weights are first, in the registers of 8 warps. These fill an SM, so programs that would share
    it pool their stages.
    """
    has = GENERATIONS[generation(compute_capability)]
    most = min(config.num_stages * max(config.programs_per_sm, 1), 8)
    deep = dataclasses.replace(
        config,
        num_warps=8,
        num_stages=most,
        programs_per_sm=min(config.programs_per_sm, 1),
        swap_ab=True,
    )
    fewer = (dataclasses.replace(deep, num_stages=stages) for stages in range(most, 0, -1))
    return next(one for one in fewer if has.smem_needed(one, widened=True) <= has.smem_bytes)


def chosen(compute_capability: int, sizes: Sizes) -> Chosen[MatmulConfig]:
    """The table in use for a rank, and whether it is a shipped one."""
    number = generation(compute_capability)
    return cache.choose(kernels(number), gpu(compute_capability), sizes)


def gpu(compute_capability: int) -> Gpu:
    """The GPU that is compiled for: this process's, if it is one of that capability."""
    major, minor = divmod(generation(compute_capability), 10)
    local = device.local_gpu()
    is_here = local is not None and number_of(local.compute_capability) == compute_capability
    return Gpu(f"{major}.{minor}", local.device_kind if local and is_here else None)


def number_of(compute_capability: object) -> int:
    """90 for "9.0"."""
    return int(str(compute_capability).replace(".", ""))


def generation(compute_capability: int) -> int:
    """The newest known capability of the same major version, else the oldest: it asks for least."""
    family = [
        known
        for known in GENERATIONS
        if known // 10 == compute_capability // 10 and known <= compute_capability
    ]
    return max(family, default=OLDEST)


@functools.cache
def kernels(known_capability: int) -> Kernels[MatmulConfig]:
    """The kernels with what limits their tilings on one of `GENERATIONS`."""
    has = GENERATIONS[known_capability]

    def check(role: str, config: MatmulConfig, sizes: Sizes) -> None:
        needed = has.smem_needed(config)
        if needed > has.smem_bytes:
            raise ValueError(f"needs {needed} bytes of shared memory of {has.smem_bytes}")

    return Kernels(NAME, MatmulConfig, has.block_ms, check)
