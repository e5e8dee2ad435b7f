"""Level 3: promotion. docs/kernels/level_3_promotion.md explains it.

As level 2, but the tensor cores sum 128 columns only; the consumers add these products up in f32,
each times the scales of its own blocks. That is how DeepSeek-V3 multiplies (technical report,
section 3.3.2).

    producer warpgroup                       consumer warpgroups 0, 1
    ------------------                       ------------------------
    wait empty[s]                            wait full[s]
    copy x, its scales, weights         -->  wgmma: product[64, 128] = x @ weights.T
      -> stage s, full[s]               <--  arrive empty[s]
                                             sums += product * (scale of the row x of the block)

    python examples/ladder/level_3_promotion.py
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
from examples.ladder import harness
from examples.ladder.problem import Level
from pallas_kernels import interruption
from pallas_kernels.types import GroupPlan, Quantized

BLOCK = 128
NUM_STAGES = 4
NUM_CONSUMERS = 2
CONSUMER_ROWS = BLOCK // NUM_CONSUMERS
FP8_TILES = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
BF16_TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def grouped_matmul(
    rows: Quantized,
    plan: GroupPlan,
    weights: Float8e4m3fn[Array, "E N K"],
    weights_scale: Float32[Array, "E N/128 K/128"],
    interpret: Any = None,
) -> BFloat16[Array, "M N"]:
    """`rows @ weights[expert].T` for the rows of each expert, with block scales."""
    num_rows, num_columns = rows.values.shape[0], weights.shape[1]
    stages = plgpu.SMEM((NUM_STAGES, BLOCK, BLOCK), jnp.float8_e4m3fn, transforms=FP8_TILES)
    kernel = plgpu.kernel(
        _kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), jnp.bfloat16),
        scratch_types={
            "x_smem": stages,
            "x_scale_smem": plgpu.SMEM((NUM_STAGES, BLOCK), jnp.float32),
            "w_smem": stages,
            "out_smem": plgpu.SMEM((BLOCK, BLOCK), jnp.bfloat16, transforms=BF16_TILES),
            "full": plgpu.Barrier(num_arrivals=3, num_barriers=NUM_STAGES),
            "empty": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=NUM_STAGES),
        },
        grid=(num_rows // BLOCK, num_columns // BLOCK),
        grid_names=("row_tile", "column"),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="ladder_promotion",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return kernel(*rows, plan.tile_expert, plan.num_tiles, weights, weights_scale)


def _kernel(x, x_scale, tile_expert, num_tiles, weights, weights_scale, out, **smem):
    row_tile, column = lax.axis_index("row_tile"), lax.axis_index("column")
    warpgroup = lax.axis_index("warpgroup")

    @pl.when((row_tile < num_tiles[0]) & (warpgroup == NUM_CONSUMERS))
    def _producer():
        _fill(x, x_scale, weights, tile_expert[row_tile], row_tile, column, smem)

    @pl.when((row_tile < num_tiles[0]) & (warpgroup < NUM_CONSUMERS))
    def _consumer():
        mine = pl.ds(warpgroup * CONSUMER_ROWS, CONSUMER_ROWS)
        rows = pl.ds(row_tile * BLOCK + warpgroup * CONSUMER_ROWS, CONSUMER_ROWS)
        columns = pl.ds(column * BLOCK, BLOCK)
        scales = weights_scale.at[tile_expert[row_tile], column]
        sums = _multiply(x.shape[1] // BLOCK, mine, scales, smem)
        smem["out_smem"][mine] = sums.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["out_smem"].at[mine], out.at[rows, columns])
        plgpu.wait_smem_to_gmem(0)


def _fill(x, x_scale, weights, expert, row_tile, column, smem):
    """The producer: as in level 2, and the scales of the rows travel with them."""
    steps = x.shape[1] // BLOCK
    rows, columns = pl.ds(row_tile * BLOCK, BLOCK), pl.ds(column * BLOCK, BLOCK)

    @pl.loop(0, steps)
    def _step(k):
        stage = lax.rem(k, jnp.int32(NUM_STAGES))

        @pl.when(k >= NUM_STAGES)
        def _reuse():
            plgpu.barrier_wait(smem["empty"].at[stage])

        ks, full = pl.ds(k * BLOCK, BLOCK), smem["full"].at[stage]
        plgpu.copy_gmem_to_smem(x.at[rows, ks], smem["x_smem"].at[stage], full)
        plgpu.copy_gmem_to_smem(x_scale.at[k, rows], smem["x_scale_smem"].at[stage], full)
        plgpu.copy_gmem_to_smem(weights.at[expert, columns, ks], smem["w_smem"].at[stage], full)

    @pl.loop(max(steps - NUM_STAGES, 0), steps)
    def _drain(k):
        plgpu.barrier_wait(smem["empty"].at[lax.rem(k, jnp.int32(NUM_STAGES))])


def _multiply(steps: int, mine, weights_scale, smem):
    """A consumer: products of 128 columns from the tensor cores, promoted to sums in f32."""
    shape = (CONSUMER_ROWS, BLOCK)

    def product(stage):
        def multiply(accumulator):  # a fresh one: it begins at zero
            plgpu.wgmma(accumulator, smem["x_smem"].at[stage, mine], smem["w_smem"].at[stage].T)
            return accumulator[...]  # waits for the product

        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    def step(k, carry):
        sums, scale = carry
        stage = lax.rem(k, jnp.int32(NUM_STAGES))
        plgpu.barrier_wait(smem["full"].at[stage])
        # From global memory, so it is asked for a step before it is used.
        next_scale = weights_scale[lax.min(k + 1, jnp.int32(steps - 1))]
        layout = plgpu.Layout.WGMMA.reduce(1)  # one number per row of `sums`
        x_scale = plgpu.load(smem["x_scale_smem"].at[stage, mine], layout=layout)
        found = product(stage)
        plgpu.barrier_arrive(smem["empty"].at[stage])
        return sums + found * lax.broadcast_in_dim(x_scale * scale, shape, [0]), next_scale

    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    sums, _ = lax.fori_loop(0, steps, step, (zeros, weights_scale[0]))
    return sums


LEVEL = Level(3, "promotion", grouped_matmul, block_m=lambda expected: BLOCK)

if __name__ == "__main__":
    interruption.exit_with(lambda: harness.main(LEVEL))
