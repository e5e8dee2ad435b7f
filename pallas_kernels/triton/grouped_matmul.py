"""The main loop of both grouped matmuls, and how it is tiled.

A program holds one tile of rows against *two* blocks of 128 weight rows: gate and up of the same
columns in the up-projection, neighbours in the down-projection. Both dot products share the loaded
activations, as one tile of 256 columns would, yet only one of them has a partial sum alive.

`wgmma` takes 64 rows of its first operand and as few as 8 of its second, so tiles of fewer than
64 rows put the weights first ("swap AB"). With the activations first, Triton 3.6 has no FP8
instruction for them on sm_90 and sm_100, and multiplies in f16.

Rows of f16 (`precision="high"`) have the weights first at any width: they are widened to f16, which
is exact, in registers, and that is where `wgmma` may take its first operand from.
"""

import dataclasses
from typing import Any

import triton
import triton.language as tl

from pallas_kernels.shapes import QUANT_BLOCK

BLOCK = tl.constexpr(QUANT_BLOCK)
_TILE_N = 2 * QUANT_BLOCK


def is_widened(rows: Any) -> bool:
    """Whether rows, an array of any framework, have 16 bits."""
    return rows.dtype.itemsize == 2


@triton.jit
def _dot(x, w, SWAP_AB: tl.constexpr):
    """`x @ w.T` of e4m3 or f16[M,K] and e4m3[N,K], in f32."""
    w = w.to(x.dtype)
    if SWAP_AB:
        # On Hopper neither transposition moves data: they rename layouts.
        return tl.dot(w, x.T).T
    return tl.dot(x, w.T)


@triton.jit
def multiply_pair(
    x, x_scales, x_scales_stride, w0, w0_scales, w1, w1_scales, num_rows,
    BLOCKS_K: tl.constexpr, BLOCK_M: tl.constexpr, SWAP_AB: tl.constexpr,
):  # fmt: skip
    """`x @ w0.T` and `x @ w1.T` in f32, each 128 of K scaled and added apart.

    The FP8 tensor cores of Hopper accumulate with few bits (deepseek-ai/DeepGEMM, "promotion").

    Args:
        x: Pointers to e4m3 or f16[BLOCK_M,128], the first block of K.
        x_scales: Pointers to f32[BLOCK_M].
        x_scales_stride: From the scales of one block of K to those of the next.
        w0: Pointers to e4m3[128,128], the first block of K.
        w0_scales: Pointer to f32[BLOCKS_K].
        w1: As `w0`.
        w1_scales: As `w0_scales`.
        num_rows: M, at least BLOCK_M.
        BLOCKS_K: K / 128.
        BLOCK_M: Rows.
        SWAP_AB: Whether the weights are the first operand.
    """
    acc0 = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    steps = BLOCKS_K
    if BLOCKS_K < 16:
        # The same number, which ptxas cannot know: it would unroll so few steps, and spill.
        steps = tl.minimum(BLOCKS_K, num_rows)
    for k in range(steps):
        # Asked for before the dots, whose time hides the latency.
        x_scale = tl.load(x_scales)
        w0_scale = tl.load(w0_scales + k)
        w1_scale = tl.load(w1_scales + k)
        x_tile = tl.load(x + k * BLOCK)
        w0_tile = tl.load(w0 + k * BLOCK)
        w1_tile = tl.load(w1 + k * BLOCK)
        x_scales += x_scales_stride
        acc0 += _dot(x_tile, w0_tile, SWAP_AB) * (x_scale * w0_scale)[:, None]
        acc1 += _dot(x_tile, w1_tile, SWAP_AB) * (x_scale * w1_scale)[:, None]
    return acc0, acc1


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """Tiling of one grouped matmul.

    Attributes:
        block_m: Rows of a tile: 16, 32, 64 or 128.
        num_warps: 4 or 8.
        num_stages: Depth of the software pipeline, 1 to 8.
        programs_per_sm: Programs that fit on an SM; each then works through several tiles. 0 makes
            one program per tile and leaves the rest to the hardware.
        swap_ab: Whether the weights are the first operand of the matrix instruction.

    Raises:
        ValueError: A field is out of its range.
    """

    block_m: int
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 0
    swap_ab: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("block_m", (16, 32, 64, 128)),
            ("num_warps", (4, 8)),
            ("num_stages", range(1, 9)),
            ("programs_per_sm", range(9)),
            ("swap_ab", (False, True)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {list(allowed)}, got {getattr(self, name)}"
                )

    def smem_bytes(self, *, matmul_reads_smem: bool, widened: bool = False) -> int:
        """Shared memory that the pipeline takes, at most.

        Args:
            matmul_reads_smem: Whether the GPU's matrix instruction can read from shared memory
                (wgmma, tcgen05); one of fewer than 64 rows cannot.
            widened: Whether rows have 16 bits.
        """
        # It reads a tile while the next ones arrive; other instructions copy the tile first.
        reads_smem = matmul_reads_smem and (self.swap_ab or self.block_m >= 64)
        copied, read = self.num_stages - 1, self.num_stages
        rows = (read if reads_smem else copied) * self.block_m * (2 if widened else 1)
        weights = (read if reads_smem and not widened else copied) * _TILE_N
        return (rows + weights) * QUANT_BLOCK

    def grid(self, row_tiles: int, column_tiles: int, num_sms: int) -> tuple[int]:
        """Programs for the worst case of `row_tiles`."""
        tiles = row_tiles * column_tiles
        return (min(tiles, num_sms * self.programs_per_sm) if self.programs_per_sm else tiles,)
