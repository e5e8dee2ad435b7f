"""Block-scaled FP8 grouped matmul for Hopper: the part that both projections share.

Weights are the wide operand: a tile is 128 weight rows of each of one or two weight blocks times
`block_m` tokens, so tokens are the n side of `wgmma`, where tiles may be as narrow as 16, and an
expert's last, partly filled tile runs at a narrower width instead of multiplying padding.

    producer warpgroup                       consumer warpgroups 0, 1
    ------------------                       ------------------------
    wait empty[s]                            wait full[s]
    TMA x[block_m, 128], its scales,    -->  for each weight block:
        weights[blocks, 128, 128]                wgmma 64 weight rows x tokens x 128
        -> slot s, full[s]                       accumulator += product * (x scale * w scale)
    next slot, into the next tile       <--  arrive empty[s]
                                             after the last 128 columns: epilogue of the tile

Consumer w takes rows 64 w .. 64 w + 63 of every weight block. Each 128-column step is promoted to
f32 registers with its own scales (DeepSeek-V3 technical report, section 3.3.2). CTAs are
persistent; tiles go expert by expert, rows fastest, so that weights are read from HBM once.
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

from pallas_kernels import launch
from pallas_kernels.device import SMEM_BYTES, num_sms
from pallas_kernels.shapes import QUANT_BLOCK

NUM_CONSUMERS = 2
WEIGHT_ROWS = QUANT_BLOCK // NUM_CONSUMERS
_MIN_SCALES = 32  # a TMA copy moves at least 128 bytes
_COLUMN_SCALES = plgpu.Layout.WGMMA.reduce(0)
_F8_TILES = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
_BARRIER_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """Shape of a tile and depth of the ring.

    Attributes:
        block_m: Tokens of a tile, 16 or a multiple of 32 up to 256; experts are padded to it.
        num_stages: Slots of the TMA ring, at least 2.
        widths: Narrower tile widths for an expert's last rows, ascending, multiples of 16.
        sms: CTAs; None takes one for each multiprocessor.
    """

    block_m: int
    num_stages: int
    widths: tuple[int, ...] = ()
    sms: int | None = None

    def __post_init__(self):
        if self.block_m != 16 and (self.block_m % 32 or not 32 <= self.block_m <= 256):
            raise ValueError(
                f"block_m: expected 16 or a multiple of 32 up to 256, got {self.block_m}"
            )
        if self.num_stages < 2:
            raise ValueError(f"num_stages: expected at least 2, got {self.num_stages}")
        ascending = (0, *self.widths, self.block_m)
        if any(a >= b or b % 16 for a, b in itertools.pairwise(ascending)):
            raise ValueError(
                f"widths: expected ascending multiples of 16 below block_m={self.block_m}, "
                f"got {self.widths}"
            )

    def check_smem(self, num_blocks: int, epilogue_bytes: int) -> None:
        """Raises ValueError if the ring and the epilogue do not fit in shared memory."""
        slot = (self.block_m + num_blocks * QUANT_BLOCK) * QUANT_BLOCK + 4 * self.scale_slots
        needed = self.num_stages * slot + epilogue_bytes + _BARRIER_BYTES
        if needed > SMEM_BYTES:
            raise ValueError(f"{self}: needs {needed} bytes of shared memory of {SMEM_BYTES}")

    @property
    def scale_slots(self) -> int:
        """Token scales of a ring slot."""
        return max(self.block_m, _MIN_SCALES)


class GroupedRows(NamedTuple):
    """Expert-major rows and where they lie; see docs/architecture.md for the plan's fields."""

    values: Float8e4m3fn[Array, "M K"]
    scales: Float[Array, "K/128 M"]
    group_sizes: Int32[Array, "E"]
    group_offsets: Int32[Array, "E"]
    tile_expert: Int32[Array, "M/block_m"]
    num_tiles: Int32[Array, "1"]


class Tile(NamedTuple):
    """One unit of work: `live` rows from `row` on times one column of weight blocks."""

    expert: Any
    row: Any
    live: Any
    column: Any


def grouped_matmul(
    rows: GroupedRows,
    weights: Float8e4m3fn[Array, "E N K"],
    weights_scale: Float[Array, "E N/128 K/128"],
    *,
    config: MatmulConfig,
    num_columns: int,
    weight_blocks: Callable[[Any], tuple],
    epilogue: Callable[..., None],
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
        out_type: Shapes of the results.
        scratch_types: The epilogue's scratch.
        name: Kernel name.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        Arrays of `out_type`; rows that no tile covers are unwritten.
    """
    num_blocks = len(weight_blocks(0))
    ring = [
        plgpu.SMEM(
            (config.num_stages, config.block_m, QUANT_BLOCK),
            jnp.float8_e4m3fn,
            transforms=_F8_TILES,
        ),
        plgpu.SMEM((config.num_stages, config.scale_slots), jnp.float32),
        plgpu.SMEM(
            (config.num_stages, num_blocks, QUANT_BLOCK, QUANT_BLOCK),
            jnp.float8_e4m3fn,
            transforms=_F8_TILES,
        ),
        plgpu.Barrier(num_arrivals=2 + num_blocks, num_barriers=config.num_stages),
        plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=config.num_stages),
    ]
    outputs = out_type if isinstance(out_type, tuple) else (out_type,)
    sms = config.sms or num_sms()

    def body(x, x_scales, sizes, offsets, tile_expert, num_tiles, w, w_scales, *refs):
        results, refs = refs[: len(outputs)], refs[len(outputs) :]
        slots = _Ring(*refs[: len(ring)])
        scratch = refs[len(ring) :]
        walk = _Walk(
            config.block_m,
            num_columns,
            sms,
            sizes,
            offsets,
            tile_expert,
            num_tiles[0] * num_columns,
        )
        num_steps = x.shape[1] // QUANT_BLOCK
        role = lax.axis_index("warpgroup")

        @pl.when(role == NUM_CONSUMERS)
        def _producer():
            plgpu.set_max_registers(24, action="decrease")
            _produce(walk, slots, x, x_scales, w, weight_blocks, config, num_steps)

        @pl.when(role < NUM_CONSUMERS)
        def _consumer():
            plgpu.set_max_registers(240, action="increase")

            def tile_body(index, tile, width):
                blocks = weight_blocks(tile.column)
                accumulators = _accumulate(
                    slots, w_scales, tile, blocks, index * num_steps, num_steps, width, config
                )
                epilogue(accumulators, tile, width, results, scratch)

            _for_each_tile(walk, config, tile_body)
            plgpu.wait_smem_to_gmem(0)

    kernel = launch.kernel(
        body,
        out_type=out_type,
        scratch_types=[*ring, *scratch_types],
        grid=(sms,),
        grid_names=("sm",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return kernel(*rows, weights, weights_scale)


class _Ring(NamedTuple):
    x: Any
    x_scales: Any
    weights: Any
    full: Any
    empty: Any


class _Walk(NamedTuple):
    """The order of tiles: expert by expert; inside one, rows fastest, so weights stay in L2."""

    block_m: int
    num_columns: int
    sms: int
    sizes: Any
    offsets: Any
    tile_expert: Any
    total: Any

    def num_tiles(self):
        """Tiles of this CTA."""
        return lax.div(self.total - lax.axis_index("sm") + (self.sms - 1), jnp.int32(self.sms))

    def tile(self, index) -> Tile:
        """This CTA's `index`-th tile; past its last one, some valid tile."""
        linear = lax.min(lax.axis_index("sm") + index * self.sms, lax.max(self.total - 1, 0))
        expert = self.tile_expert[lax.div(linear, jnp.int32(self.num_columns))]
        size, offset = self.sizes[expert], self.offsets[expert]
        row_tiles = lax.max(lax.div(size + (self.block_m - 1), jnp.int32(self.block_m)), 1)
        inside = linear - lax.div(offset, jnp.int32(self.block_m)) * self.num_columns
        first = lax.rem(inside, row_tiles) * self.block_m
        live = lax.min(size - first, jnp.int32(self.block_m))
        return Tile(expert, offset + first, live, lax.div(inside, row_tiles))


def _for_each_tile(walk: _Walk, config: MatmulConfig, tile_body) -> None:
    """Calls `tile_body(index, tile, width)`; the next tile's place is looked up a tile ahead."""

    def step(index, fields):
        upcoming = walk.tile(index + 1)
        tile = Tile(*fields)
        tile = tile._replace(row=pl.multiple_of(tile.row, config.block_m))
        narrower = 0
        for width in (*config.widths, config.block_m):

            @pl.when((tile.live > narrower) & (tile.live <= width))
            def _at_width(width=width):
                tile_body(index, tile, width)

            narrower = width
        return tuple(upcoming)

    lax.fori_loop(0, walk.num_tiles(), step, tuple(walk.tile(0)))


def _produce(walk, slots, x, x_scales, w, weight_blocks, config, num_steps):
    def fill(index, tile, width):
        blocks = weight_blocks(tile.column)

        @pl.loop(0, num_steps)
        def _step(k):
            step = index * num_steps + k
            slot = lax.rem(step, jnp.int32(config.num_stages))

            @pl.when(step >= config.num_stages)
            def _reuse():
                plgpu.barrier_wait(slots.empty.at[slot])

            full = slots.full.at[slot]
            columns = pl.ds(k * QUANT_BLOCK, QUANT_BLOCK)
            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(tile.row, width), columns], slots.x.at[slot, pl.ds(0, width)], full
            )
            scales = pl.ds(tile.row - _scale_offset(tile.row, config), config.scale_slots)
            plgpu.copy_gmem_to_smem(x_scales.at[k, scales], slots.x_scales.at[slot], full)
            for i, block in enumerate(blocks):
                plgpu.copy_gmem_to_smem(
                    w.at[tile.expert, pl.ds(block * QUANT_BLOCK, QUANT_BLOCK), columns],
                    slots.weights.at[slot, i],
                    full,
                )

    _for_each_tile(walk, config, fill)
    steps = walk.num_tiles() * num_steps

    # Every completed phase must be observed before the barriers go away.
    @pl.loop(lax.max(steps - config.num_stages, 0), steps)
    def _drain(step):
        plgpu.barrier_wait(slots.empty.at[lax.rem(step, jnp.int32(config.num_stages))])


def _scale_offset(row, config):
    """Where a tile's token scales start in their slot, which may be wider than the tile."""
    return pl.multiple_of(lax.rem(row, jnp.int32(config.scale_slots)), config.block_m)


def _accumulate(slots, w_scales, tile, blocks, first_step, num_steps, width, config):
    """`f32[64, width]` a weight block: the promoted sum over all 128-column steps."""
    shape = (WEIGHT_ROWS, width)
    my_scales = pl.ds(_scale_offset(tile.row, config), width)
    my_rows = pl.ds(lax.axis_index("warpgroup") * WEIGHT_ROWS, WEIGHT_ROWS)

    def promoted_product(slot, i, x_scales, scale):
        def multiply(accumulator):
            tokens = slots.x.at[slot, pl.ds(0, width)]
            plgpu.wgmma(accumulator, slots.weights.at[slot, i, my_rows], tokens.T)
            factor = x_scales * scale  # while the tensor cores work
            return accumulator[...] * lax.broadcast_in_dim(factor, shape, [1])

        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    def weight_scales(k):
        return tuple(w_scales[tile.expert, block, k] for block in blocks)

    def step(k, carry):
        sums, scales = carry
        slot = lax.rem(first_step + k, jnp.int32(config.num_stages))
        plgpu.barrier_wait(slots.full.at[slot])
        upcoming = weight_scales(lax.min(k + 1, jnp.int32(num_steps - 1)))
        x_scales = plgpu.load(slots.x_scales.at[slot, my_scales], layout=_COLUMN_SCALES)
        updated = tuple(
            total + promoted_product(slot, i, x_scales, scale)
            for i, (total, scale) in enumerate(zip(sums, scales, strict=True))
        )
        plgpu.barrier_arrive(slots.empty.at[slot])
        return updated, upcoming

    zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    initial = ((zero,) * len(blocks), weight_scales(jnp.int32(0)))
    return lax.fori_loop(0, num_steps, step, initial)[0]
