"""Block-scaled FP8 grouped matmul for Hopper: the part that both projections share.

A tile is `block_m` tokens of one expert times 128 rows of each of one or two weight blocks.

    producer warpgroup                       consumer warpgroups 0, 1
    ------------------                       ------------------------
    wait empty[s]                            for each weight block:
    TMA x[block_m, 128], its scales,    -->      wait full[s, block]
        weights[blocks, 128, 128]                wgmma 64 rows x columns x 128
        -> slot s, full[s, block]                accumulator += product * (x scale * w scale)
    next slot, into the next tile       <--  arrive empty[s]
                                             after the last 128 columns: epilogue of the tile

A full tile of 128 tokens has its tokens on the 64-row side of `wgmma`, consumer w takes tokens
64 w .. 64 w + 63. Narrower tiles, those of few tokens and an expert's last one, have the weights
there (consumer w takes rows 64 w .. 64 w + 63 of every block) and the tokens on the n side, which
may be as narrow as 16, so that little padding is multiplied. Each 128-column step is promoted to
f32 registers with its own scales (DeepSeek-V3 technical report, section 3.3.2). CTAs are
persistent; `tile_walk` has the order of tiles, `matmul_ring` the slots.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float8e4m3fn, Int32

from pallas_kernels import launch, matmul_ring, tickets
from pallas_kernels.device import SMEM_BYTES, num_sms
from pallas_kernels.matmul_ring import Ring, ring_types
from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.tile_walk import MAILBOX_BYTES, Mailbox, Walk, mailbox_types

NUM_CONSUMERS = 2
CONSUMER_ROWS = QUANT_BLOCK // NUM_CONSUMERS
_BARRIER_BYTES = 512


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """Shape of a tile and depth of the ring.

    Attributes:
        block_m: Tokens of a tile, 16 or a multiple of 32 up to 256; experts are padded to it.
        num_stages: Slots of the TMA ring, at least 2.
        widths: Narrower tile widths for an expert's last rows, ascending, multiples of 16.
        sms: CTAs; None takes one for each multiprocessor.
        k_blocks: Slots that the producer fills together, a power of two up to `num_stages`: a
            weight row's 128-byte pieces are then read side by side. Taken as 1 where the number
            of 128-column steps is not a multiple of it.
        dynamic: Whether a CTA takes the next tile that nobody has, instead of every `sms`-th one.
            Worth it where tiles are many and long; the counter costs a launch of its own.
    """

    block_m: int
    num_stages: int
    widths: tuple[int, ...] = ()
    sms: int | None = None
    k_blocks: int = 1
    dynamic: bool = False

    def __post_init__(self):
        if self.block_m != 16 and (self.block_m % 32 or not 32 <= self.block_m <= 256):
            raise ValueError(
                f"block_m: expected 16 or a multiple of 32 up to 256, got {self.block_m}"
            )
        if self.num_stages < 2:
            raise ValueError(f"num_stages: expected at least 2, got {self.num_stages}")
        if self.k_blocks not in (1, 2, 4) or self.k_blocks > self.num_stages:
            raise ValueError(
                f"k_blocks: expected 1, 2 or 4, up to num_stages={self.num_stages}, "
                f"got {self.k_blocks}"
            )
        ascending = (0, *self.widths, self.block_m)
        if any(a >= b or b % 16 for a, b in itertools.pairwise(ascending)):
            raise ValueError(
                f"widths: expected ascending multiples of 16 below block_m={self.block_m}, "
                f"got {self.widths}"
            )

    @property
    def has_row_tiles(self) -> bool:
        """Whether some tiles have their tokens on the 64-row side of `wgmma`."""
        return any(_tokens_are_rows(width) for width in (*self.widths, self.block_m))

    def check_smem(self, num_blocks: int, epilogue_bytes: int) -> None:
        """Raises ValueError if the ring and the epilogue do not fit in shared memory."""
        ring = self.num_stages * matmul_ring.slot_bytes(self.block_m, num_blocks)
        needed = ring + epilogue_bytes + MAILBOX_BYTES + _BARRIER_BYTES
        if needed > SMEM_BYTES:
            raise ValueError(f"{self}: needs {needed} bytes of shared memory of {SMEM_BYTES}")


class GroupedRows(NamedTuple):
    """Expert-major rows and where they lie; see docs/architecture.md for the plan's fields."""

    values: Float8e4m3fn[Array, "M K"]
    scales: Float[Array, "K/128 M"]
    group_sizes: Int32[Array, "E"]
    group_offsets: Int32[Array, "E"]
    tile_expert: Int32[Array, "M/block_m"]
    num_tiles: Int32[Array, "1"]


def grouped_matmul(
    rows: GroupedRows,
    weights: Float8e4m3fn[Array, "E N K"],
    weights_scale: Float[Array, "E N/128 K/128"],
    *,
    config: MatmulConfig,
    num_columns: int,
    weight_blocks: Callable[[Any], tuple],
    epilogue: Callable[..., None],
    row_epilogue: Callable[..., None],
    out_type: Any,
    scratch_types: Sequence[Any],
    name: str,
    interpret=None,
):
    """Runs `epilogue` on every tile of `rows @ weights[expert].T`.

    Args:
        rows: The left side.
        weights: `e4m3[E, N, K]`.
        weights_scale: `f32[E, N/128, K/128]`.
        config: Tile and ring.
        num_columns: Columns of tiles that cover N.
        weight_blocks: Maps a column to the 128-row blocks of N that its tile multiplies.
        epilogue: `epilogue(accumulators, tile, width, outputs, scratch)`, called by both consumer
            warpgroups with one `f32[64, width]` accumulator a weight block, weights x tokens.
        row_epilogue: The same for a full tile of 128 tokens, with accumulators
            `f32[64, 128]`, tokens x weights.
        out_type: Shapes of the results.
        scratch_types: The epilogue's scratch.
        name: Kernel name.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        Arrays of `out_type`; rows that no tile covers are unwritten.
    """
    num_blocks = len(weight_blocks(0))
    num_steps = rows.values.shape[1] // QUANT_BLOCK
    together = config.k_blocks if num_steps % config.k_blocks == 0 else 1
    box_rows = QUANT_BLOCK // together
    ring_scratch = ring_types(
        config.block_m, config.num_stages, num_blocks, box_rows, NUM_CONSUMERS
    )
    mail = mailbox_types(NUM_CONSUMERS)
    outputs = out_type if isinstance(out_type, tuple) else (out_type,)
    sms = config.sms or num_sms()
    dynamic = config.dynamic and interpret is None  # the interpreter has no atomics

    def body(x, x_scales, sizes, offsets, tile_expert, num_tiles, w, w_scales, *refs):
        counter = tickets.new_counter() if dynamic else None
        results, refs = refs[: len(outputs)], refs[len(outputs) :]
        ring, refs = Ring(*refs[: len(ring_scratch)]), refs[len(ring_scratch) :]
        mailbox, scratch = Mailbox(*refs[: len(mail)]), refs[len(mail) :]
        walk = Walk(
            config.block_m,
            num_columns,
            sms,
            sizes,
            offsets,
            tile_expert,
            num_tiles[0] * num_columns,
            counter,
        )
        role = lax.axis_index("warpgroup")
        # Small tiles leave the producer the registers for copies that are issued together.
        small = config.block_m <= CONSUMER_ROWS
        producer_registers, consumer_registers = (56, 224) if small else (24, 240)

        @pl.when(role == NUM_CONSUMERS)
        def _producer():
            plgpu.set_max_registers(producer_registers, action="decrease")

            def fill_tile(index, tile, width, look_ahead):
                blocks = weight_blocks(tile.column)

                @pl.loop(0, num_steps // together)
                def _steps(group):
                    pl.when(group == num_steps // together // 2)(look_ahead)
                    ks = [group * together + i for i in range(together)]
                    sources = (x, x_scales, w)
                    first_step = index * num_steps
                    matmul_ring.fill(ring, sources, tile, width, blocks, first_step, ks, box_rows)

            count = walk.produce(mailbox, _by_width(config, fill_tile))
            matmul_ring.drain(ring, count * num_steps)

        @pl.when(role < NUM_CONSUMERS)
        def _consumer():
            plgpu.set_max_registers(consumer_registers, action="increase")

            def tile_body(index, tile, width):
                blocks = weight_blocks(tile.column)
                first_step = index * num_steps
                sums = _accumulate(ring, w_scales, tile, blocks, first_step, num_steps, width)
                finish = row_epilogue if _tokens_are_rows(width) else epilogue
                finish(sums, tile, width, results, scratch)

            walk.consume(mailbox, _by_width(config, tile_body))
            plgpu.wait_smem_to_gmem(0)

    kernel = launch.kernel(
        body,
        out_type=out_type,
        scratch_types=[*ring_scratch, *mail, *scratch_types],
        grid=(sms,),
        grid_names=("sm",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return kernel(*rows, weights, weights_scale)


def _by_width(config: MatmulConfig, tile_body):
    """`tile_body(index, tile, width, ...)` at the narrowest width that holds the live rows."""

    def body(index, tile, *more):
        narrower = 0
        for width in (*config.widths, config.block_m):

            @pl.when((tile.live > narrower) & (tile.live <= width))
            def _at_width(width=width):
                tile_body(index, tile, width, *more)

            narrower = width

    return body


def _tokens_are_rows(width: int) -> bool:
    """Whether a tile of that width has its tokens on the 64-row side of `wgmma`.

    There a thread holds two token scales instead of a quarter of all, so promotion costs half as
    many instructions; but only tiles of 128 tokens give both consumers 64 rows.
    """
    return width == NUM_CONSUMERS * CONSUMER_ROWS


def _accumulate(ring: Ring, w_scales, tile, blocks, first_step, num_steps, width):
    """A weight block's promoted sum over all 128-column steps.

    `f32[64 tokens, 128]` if tokens are rows, else `f32[64 weight rows, width]`.
    """
    my_rows = pl.ds(lax.axis_index("warpgroup") * CONSUMER_ROWS, CONSUMER_ROWS)
    token_rows = _tokens_are_rows(width)
    shape = (CONSUMER_ROWS, QUANT_BLOCK if token_rows else width)
    token_axis = 0 if token_rows else 1
    scale_layout = plgpu.Layout.WGMMA.reduce(1 - token_axis)
    my_scales = my_rows if token_rows else pl.ds(ring.scale_offset(tile.row), width)

    def operands(slot, i):
        if token_rows:
            return ring.x.at[slot, my_rows], ring.weights.at[slot, i].T
        return ring.weights.at[slot, i, my_rows], ring.x.at[slot, pl.ds(0, width)].T

    def promoted_product(slot, i, x_scales, scale):
        def multiply(accumulator):
            plgpu.wgmma(accumulator, *operands(slot, i))
            factor = lax.broadcast_in_dim(x_scales * scale, shape, [token_axis])
            return accumulator[...] * factor

        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    def weight_scales(k):
        return tuple(w_scales[tile.expert, block, k] for block in blocks)

    def step(k, carry):
        sums, scales = carry
        slot = ring.slot(first_step + k)
        plgpu.barrier_wait(ring.full(slot, 0))
        upcoming = weight_scales(lax.min(k + 1, jnp.int32(num_steps - 1)))
        x_scales = plgpu.load(ring.x_scales.at[slot, my_scales], layout=scale_layout)
        updated = []
        for i, (total, scale) in enumerate(zip(sums, scales, strict=True)):
            if i:
                plgpu.barrier_wait(ring.full(slot, i))
            updated.append(total + promoted_product(slot, i, x_scales, scale))
        plgpu.barrier_arrive(ring.empty.at[slot])
        return tuple(updated), upcoming

    zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    initial = ((zero,) * len(blocks), weight_scales(jnp.int32(0)))
    return lax.fori_loop(0, num_steps, step, initial)[0]
