"""Level 4: swap-AB for few tokens. docs/kernels/level_4_swap_ab.md explains it.

As level 3 with the operands exchanged where an expert has few tokens: the weights go to the 64-row
side of `wgmma` and the tokens to its n side, which may be as narrow as 16. Many tokens: level 3.

    producer warpgroup                       consumer warpgroups 0, 1
    ------------------                       ------------------------
    wait empty[s]                            wait full[s]
    copy x[16, 128], weights[128, 128]  -->  wgmma: product[64, 16] = weights 64 w .. @ x.T
      -> stage s, full[s]               <--  arrive empty[s]
                                             sums += product * (scale of the column x of the block)
                                             after the last 128 columns: transpose, bf16, store

    python examples/ladder/level_4_swap_ab.py
"""

from __future__ import annotations

import pathlib
import signal
import sys
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports last, Ctrl-C just ends

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # the root of the repository
from examples.ladder import harness, level_3_promotion
from examples.ladder.problem import FEW_ROWS, Level
from pallas_kernels import interruption
from pallas_kernels.types import GroupPlan, Quantized

BLOCK = 128
FEW_TOKENS = 16
NUM_STAGES = 6
NUM_CONSUMERS = 2
CONSUMER_ROWS = BLOCK // NUM_CONSUMERS
FP8_TILES = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
BF16_TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def block_m(expected_rows: float) -> int:
    """Tokens of a tile."""
    return FEW_TOKENS if expected_rows <= FEW_ROWS else level_3_promotion.BLOCK


def grouped_matmul(
    rows: Quantized,
    plan: GroupPlan,
    weights: Float8e4m3fn[Array, "E N K"],
    weights_scale: Float32[Array, "E N/128 K/128"],
    interpret: Any = None,
) -> BFloat16[Array, "M N"]:
    """`rows @ weights[expert].T` for the rows of each expert, with block scales."""
    if plan.block_m > FEW_TOKENS:
        return level_3_promotion.grouped_matmul(rows, plan, weights, weights_scale, interpret)
    num_rows, num_columns = rows.values.shape[0], weights.shape[1]
    x_shape, w_shape = (NUM_STAGES, FEW_TOKENS, BLOCK), (NUM_STAGES, BLOCK, BLOCK)
    out_shape = (NUM_CONSUMERS, FEW_TOKENS, CONSUMER_ROWS)
    kernel = plgpu.kernel(
        _kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), jnp.bfloat16),
        scratch_types={
            "x_smem": plgpu.SMEM(x_shape, jnp.float8_e4m3fn, transforms=FP8_TILES),
            "w_smem": plgpu.SMEM(w_shape, jnp.float8_e4m3fn, transforms=FP8_TILES),
            "out_smem": plgpu.SMEM(out_shape, jnp.bfloat16, transforms=BF16_TILES),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=NUM_STAGES),
            "empty": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=NUM_STAGES),
        },
        grid=(num_rows // FEW_TOKENS, num_columns // BLOCK),
        grid_names=("row_tile", "column"),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="ladder_swap_ab",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return kernel(*rows, plan.tile_expert, plan.num_tiles, weights, weights_scale)


def _kernel(x, x_scale, tile_expert, num_tiles, weights, weights_scale, out, **smem):
    row_tile, column = lax.axis_index("row_tile"), lax.axis_index("column")
    warpgroup = lax.axis_index("warpgroup")
    tokens = pl.ds(row_tile * FEW_TOKENS, FEW_TOKENS)

    @pl.when((row_tile < num_tiles[0]) & (warpgroup == NUM_CONSUMERS))
    def _producer():
        _fill(x, weights, tile_expert[row_tile], tokens, column, smem)

    @pl.when((row_tile < num_tiles[0]) & (warpgroup < NUM_CONSUMERS))
    def _consumer():
        mine = pl.ds(warpgroup * CONSUMER_ROWS, CONSUMER_ROWS)
        block_scales = weights_scale.at[tile_expert[row_tile], column]
        sums = _multiply(x_scale, tokens, block_scales, mine, smem)
        # `sums` are weights x tokens; the result is tokens x weights.
        out_smem = smem["out_smem"].at[warpgroup]
        out_smem.T[...] = sums.astype(jnp.bfloat16)
        plgpu.commit_smem()
        columns = pl.ds(column * BLOCK + warpgroup * CONSUMER_ROWS, CONSUMER_ROWS)
        plgpu.copy_smem_to_gmem(out_smem, out.at[tokens, columns])
        plgpu.wait_smem_to_gmem(0)


def _fill(x, weights, expert, tokens, column, smem):
    """The producer: as in level 2, with 16 rows of x instead of 128."""
    steps = x.shape[1] // BLOCK
    columns = pl.ds(column * BLOCK, BLOCK)

    @pl.loop(0, steps)
    def _step(k):
        stage = lax.rem(k, jnp.int32(NUM_STAGES))

        @pl.when(k >= NUM_STAGES)
        def _reuse():
            plgpu.barrier_wait(smem["empty"].at[stage])

        ks, full = pl.ds(k * BLOCK, BLOCK), smem["full"].at[stage]
        plgpu.copy_gmem_to_smem(x.at[tokens, ks], smem["x_smem"].at[stage], full)
        plgpu.copy_gmem_to_smem(weights.at[expert, columns, ks], smem["w_smem"].at[stage], full)

    @pl.loop(max(steps - NUM_STAGES, 0), steps)
    def _drain(k):
        plgpu.barrier_wait(smem["empty"].at[lax.rem(k, jnp.int32(NUM_STAGES))])


def _multiply(x_scale, tokens, block_scales, mine, smem):
    """A consumer: its 64 rows of weights times all tokens, promoted as in level 3."""
    steps = x_scale.shape[0]
    shape = (CONSUMER_ROWS, FEW_TOKENS)

    def scales(k):  # 16 scales are less than TMA moves, so they come straight from global memory
        layout = plgpu.Layout.WGMMA.reduce(0)  # one number per column of `sums`
        x_scales = plgpu.load(x_scale.at[k, tokens], layout=layout, optimized=False)
        return x_scales * block_scales[k]

    def product(stage):
        def multiply(accumulator):
            plgpu.wgmma(accumulator, smem["w_smem"].at[stage, mine], smem["x_smem"].at[stage].T)
            return accumulator[...]

        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    def step(k, carry):
        sums, scale = carry
        stage = lax.rem(k, jnp.int32(NUM_STAGES))
        plgpu.barrier_wait(smem["full"].at[stage])
        next_scale = scales(lax.min(k + 1, jnp.int32(steps - 1)))  # a step before it is used
        found = product(stage)
        plgpu.barrier_arrive(smem["empty"].at[stage])
        return sums + found * lax.broadcast_in_dim(scale, shape, [1]), next_scale

    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    sums, _ = lax.fori_loop(0, steps, step, (zeros, scales(jnp.int32(0))))
    return sums


LEVEL = Level(4, "swap-AB", grouped_matmul, block_m=block_m)

if __name__ == "__main__":
    interruption.exit_with(lambda: harness.main(LEVEL))
