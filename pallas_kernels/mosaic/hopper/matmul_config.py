"""How a grouped matmul is tiled: what may be chosen, and what follows from the choice."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Callable
from typing import Any, Literal

from pallas_kernels.device import SMEM_BYTES, num_sms
from pallas_kernels.mosaic.hopper.gather import GATHER_DELAY
from pallas_kernels.mosaic.hopper.tile_queue import QUEUE_BYTES
from pallas_kernels.shapes import QUANT_BLOCK

NUM_CONSUMERS = 2
CONSUMER_ROWS = QUANT_BLOCK // NUM_CONSUMERS
Scheduler = Literal["static", "dynamic"]

MOST_SEGMENTS = 8  # whose partial sums a thread has in registers at once

_BARRIER_BYTES = 512
_MIN_SCALES = 32  # a TMA copy moves at least 128 bytes


def is_token_major(width: int) -> bool:
    """Whether a tile of that width has its tokens on the 64-row side of `wgmma`, the M side.

    Token-major, a thread holds two token scales instead of a quarter of all, so promotion costs
    half as many instructions; but only tiles of 128 tokens give both consumers 64 rows. All others
    are weight-major, tokens on the N side.
    """
    return width == NUM_CONSUMERS * CONSUMER_ROWS


def scales_per_stage(block_m: int) -> int:
    """Token scales of a stage."""
    return max(block_m, _MIN_SCALES)


def stage_bytes(block_m: int, num_blocks: int, row_bytes: int = 1) -> int:
    """Shared memory of a stage without its barriers; `row_bytes` is the size of a row's element."""
    rows = row_bytes * block_m + num_blocks * QUANT_BLOCK
    return rows * QUANT_BLOCK + 4 * scales_per_stage(block_m)


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """Shape of a tile and depth of the pipeline.

    Attributes:
        block_m: Tokens of a tile, 16 or a multiple of 32 up to 256; experts are padded to it.
        num_stages: Stages of the TMA pipeline, at least 2.
        tail_widths: Narrower tiles for an expert's last rows, ascending, multiples of 16.
        sms: CTAs; None takes one for each multiprocessor, of which there may not be more.
        stages_per_fill: Stages that the producer fills together, a power of two up to `num_stages`:
            a weight row's 128-byte pieces are then read side by side. Taken as 1 where the number
            of 128-column steps is not a multiple of it.
        scheduler: "static": a CTA computes every `sms`-th tile; "dynamic": it takes the next tile
            that no CTA has. Worth it where tiles are many and long. Taken as static where rows are
            gathered: that takes the scheduler's warp.
        split_k_steps: Splits the last tiles along K, where they are few, into segments of that many
            128-column steps (`stream_k`); None, or a number of steps that it does not divide,
            leaves them whole. The order of additions does not depend on where a tile is split.
    """

    block_m: int
    num_stages: int
    tail_widths: tuple[int, ...] = ()
    sms: int | None = None
    stages_per_fill: int = 1
    scheduler: Scheduler = "static"
    split_k_steps: int | None = None

    def __post_init__(self):
        if self.block_m != 16 and (self.block_m % 32 or not 32 <= self.block_m <= 256):
            raise ValueError(
                f"block_m: expected 16 or a multiple of 32 up to 256, got {self.block_m}"
            )
        if self.num_stages < 2:
            raise ValueError(f"num_stages: expected at least 2, got {self.num_stages}")
        if self.sms is not None and self.sms < 1:
            raise ValueError(f"sms: expected None or at least 1, got {self.sms}")
        if self.stages_per_fill not in (1, 2, 4) or self.stages_per_fill > self.num_stages:
            raise ValueError(
                f"stages_per_fill: expected 1, 2 or 4, up to num_stages={self.num_stages}, "
                f"got {self.stages_per_fill}"
            )
        if self.scheduler not in typing.get_args(Scheduler):
            raise ValueError(f"scheduler: expected 'static' or 'dynamic', got {self.scheduler!r}")
        if self.split_k_steps is not None and (
            self.split_k_steps < 1 or self.scheduler == "dynamic"
        ):
            raise ValueError(
                f"split_k_steps: expected None, or at least 1 with scheduler='static', "
                f"got {self.split_k_steps} with scheduler={self.scheduler!r}"
            )
        ascending = (0, *self.tail_widths, self.block_m)
        if any(a >= b or b % 16 for a, b in itertools.pairwise(ascending)):
            raise ValueError(
                f"tail_widths: expected ascending multiples of 16 below block_m={self.block_m}, "
                f"got {self.tail_widths}"
            )

    @property
    def has_token_major_tiles(self) -> bool:
        """Whether some tiles have their tokens on the 64-row side of `wgmma`."""
        return any(is_token_major(width) for width in (*self.tail_widths, self.block_m))

    def check_smem(self, num_blocks: int, epilogue_bytes: int, row_bytes: int = 1) -> None:
        """Raises ValueError if the pipeline and the epilogue do not fit in shared memory."""
        stages = self.num_stages * stage_bytes(self.block_m, num_blocks, row_bytes)
        needed = stages + epilogue_bytes + QUEUE_BYTES + _BARRIER_BYTES
        if needed > SMEM_BYTES:
            raise ValueError(f"{self}: needs {needed} bytes of shared memory of {SMEM_BYTES}")

    def partials_bytes(self, num_steps: int, num_blocks: int, sms: int) -> int:
        """Global memory for the partial sums of tiles that are split."""
        segments = self.segments(num_steps)
        if segments == 1:
            return 0
        return 4 * sms * segments * num_blocks * QUANT_BLOCK * self.block_m

    def segments(self, num_steps: int) -> int:
        """Pieces that a tile of `num_steps` steps may be split into, at most `MOST_SEGMENTS`.

        Of a longer K several segments are taken as one.
        """
        if self.split_k_steps is None or num_steps % self.split_k_steps:
            return 1
        segments = num_steps // self.split_k_steps
        return max(n for n in range(1, MOST_SEGMENTS + 1) if segments % n == 0)


def has_spare_warps(config: MatmulConfig, *, gathered: bool, interpret: Any) -> bool:
    """Whether one warp of the producer schedules and one fills, which leaves two without work.

    Args:
        config: Tile and pipeline.
        gathered: Whether the producer gathers the rows, which takes all of its warps.
        interpret: Interpreter parameters, or None for the GPU: the interpreter has neither
            atomics nor semaphores.
    """
    return config.scheduler == "dynamic" and interpret is None and not gathered


@dataclasses.dataclass(frozen=True)
class MatmulShape:
    """What is known of a matmul when its kernel is traced.

    Attributes:
        config: Tile and pipeline.
        num_columns: Columns of tiles that cover N.
        weight_blocks: Maps a column to the 128-row blocks of N that its tiles multiply.
        num_steps: 128-column steps that cover K.
        sms: CTAs.
        is_gathered: Whether the producer gathers the rows, instead of TMA.
        is_dynamic: Whether a warp of the producer schedules, which leaves two without work.
        is_split: Whether the last tiles may be split along K.
        is_widened: Whether rows have 16 bits, and the weights are widened to f16 in registers.
        is_interpreted: Whether the interpreter runs the kernel.
        num_shared_experts: How many of the last experts have all tokens in order as their rows.
    """

    config: MatmulConfig
    num_columns: int
    weight_blocks: Callable[[Any], tuple[Any, ...]]
    num_steps: int
    sms: int
    is_gathered: bool
    is_dynamic: bool
    is_split: bool
    is_widened: bool = False
    is_interpreted: bool = False
    num_shared_experts: int = 0

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return self.config.block_m

    @property
    def num_blocks(self) -> int:
        """Weight blocks of a tile."""
        return len(self.weight_blocks(0))

    @property
    def segments(self) -> int:
        """Segments of K, which have a sum each."""
        return self.config.segments(self.num_steps)

    @property
    def segment_steps(self) -> int:
        """Steps of a segment."""
        return self.num_steps // self.segments

    @property
    def stages_per_fill(self) -> int:
        """Stages that are filled together."""
        wanted = self.config.stages_per_fill
        return 1 if self.segment_steps % wanted else wanted

    @property
    def queue_slots(self) -> int:
        """Tiles that the queue of a static scheduler holds.

        Two, so that a tile is queued while the one before it is under way. For its slot the
        producer waits until consumers are through with an earlier tile, all of whose steps must
        then be committed. Gathered steps are so `GATHER_DELAY` steps late: tiles of fewer steps
        take more slots, or both sides wait for ever.
        """
        delay = GATHER_DELAY if self.is_gathered else 0
        return max(2, -(-delay // self.segment_steps) + 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that a tile may have, ascending."""
        return (*self.config.tail_widths, self.config.block_m)


def matmul_shape(
    config: MatmulConfig,
    *,
    num_columns: int,
    weight_blocks: Callable[[Any], tuple[Any, ...]],
    num_steps: int,
    gathered: bool,
    interpret: Any,
    widened: bool = False,
    num_shared_experts: int = 0,
) -> MatmulShape:
    """The shape of a matmul on the GPU that is compiled for.

    Args:
        config: Tile and pipeline.
        num_columns: Columns of tiles.
        weight_blocks: See `MatmulShape`.
        num_steps: Steps of K.
        gathered: Whether the producer gathers the rows.
        interpret: Interpreter parameters, or None for the GPU.
        widened: Whether rows have 16 bits.
        num_shared_experts: See `MatmulShape`.

    Raises:
        ValueError: The configuration does not fit the GPU, or the rows.
    """
    if widened and config.has_token_major_tiles:
        raise ValueError(
            f"config: expected tiles of fewer than {NUM_CONSUMERS * CONSUMER_ROWS} tokens where "
            f"rows have 16 bits, got block_m={config.block_m}, tail_widths={config.tail_widths}"
        )
    available = num_sms()
    sms = available if config.sms is None else config.sms
    if sms > available:
        raise ValueError(f"sms: expected at most the {available} of this GPU, got {sms}")
    shape = MatmulShape(
        config=config,
        num_columns=num_columns,
        weight_blocks=weight_blocks,
        num_steps=num_steps,
        sms=sms,
        is_gathered=gathered,
        is_dynamic=has_spare_warps(config, gathered=gathered, interpret=interpret),
        is_split=config.segments(num_steps) > 1 and interpret is None,
        is_widened=widened,
        is_interpreted=interpret is not None,
        num_shared_experts=num_shared_experts,
    )
    if gathered and config.num_stages < shape.stages_per_fill + GATHER_DELAY:
        raise ValueError(
            f"num_stages: expected at least stages_per_fill + {GATHER_DELAY} where rows are "
            f"gathered, got {config.num_stages} with stages_per_fill={config.stages_per_fill}"
        )
    return shape
