"""Level 2: a pipeline of TMA copies. docs/kernels/level_2_pipeline.md explains it.

A tile is computed by three warpgroups, which meet over `NUM_STAGES` buffers of shared memory:

    producer warpgroup                       consumer warpgroups 0, 1
    ------------------                       ------------------------
    wait empty[s]                            wait full[s]
    copy x[128, 128], weights[128, 128] -->  wgmma: sums[64, 128] += rows 64 w .. of x @ weights.T
      -> stage s, full[s]               <--  arrive empty[s]
                                             after the last 128 columns: scale, bf16, store

    python examples/ladder/level_2_pipeline.py
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
    """`rows @ weights[expert].T` for the rows of each expert; scales must not change along K."""
    num_rows, num_columns = rows.values.shape[0], weights.shape[1]
    stages = plgpu.SMEM((NUM_STAGES, BLOCK, BLOCK), jnp.float8_e4m3fn, transforms=FP8_TILES)
    kernel = plgpu.kernel(
        _kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), jnp.bfloat16),
        scratch_types={
            "x_smem": stages,
            "w_smem": stages,
            "out_smem": plgpu.SMEM((BLOCK, BLOCK), jnp.bfloat16, transforms=BF16_TILES),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=NUM_STAGES),
            "empty": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=NUM_STAGES),
        },
        grid=(num_rows // BLOCK, num_columns // BLOCK),
        grid_names=("row_tile", "column"),
        num_threads=NUM_CONSUMERS + 1,  # Pallas calls a warpgroup a thread
        thread_name="warpgroup",
        kernel_name="ladder_pipeline",
        # We order the warpgroups ourselves, by `full` and `empty`.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return kernel(*rows, plan.tile_expert, plan.num_tiles, weights, weights_scale)


def _kernel(x, x_scale, tile_expert, num_tiles, weights, weights_scale, out, **smem):
    row_tile, column = lax.axis_index("row_tile"), lax.axis_index("column")
    warpgroup = lax.axis_index("warpgroup")

    @pl.when((row_tile < num_tiles[0]) & (warpgroup == NUM_CONSUMERS))
    def _producer():
        _fill(x, weights, tile_expert[row_tile], row_tile, column, smem)

    @pl.when((row_tile < num_tiles[0]) & (warpgroup < NUM_CONSUMERS))
    def _consumer():
        mine = pl.ds(warpgroup * CONSUMER_ROWS, CONSUMER_ROWS)
        rows = pl.ds(row_tile * BLOCK + warpgroup * CONSUMER_ROWS, CONSUMER_ROWS)
        sums = _multiply(x.shape[1] // BLOCK, mine, smem)
        layout = plgpu.Layout.WGMMA.reduce(1)  # one number per row of `sums`
        scale = plgpu.load(x_scale.at[0, rows], layout=layout, optimized=False)
        scale = scale * weights_scale[tile_expert[row_tile], column, 0]
        sums = sums * lax.broadcast_in_dim(scale, sums.shape, [0])
        smem["out_smem"][mine] = sums.astype(jnp.bfloat16)
        plgpu.commit_smem()
        columns = pl.ds(column * BLOCK, BLOCK)
        plgpu.copy_smem_to_gmem(smem["out_smem"].at[mine], out.at[rows, columns])
        plgpu.wait_smem_to_gmem(0)


def _fill(x, weights, expert, row_tile, column, smem):
    """The producer: one stage per step of 128 columns, as soon as the stage is free."""
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
        plgpu.copy_gmem_to_smem(weights.at[expert, columns, ks], smem["w_smem"].at[stage], full)

    @pl.loop(max(steps - NUM_STAGES, 0), steps)
    def _drain(k):  # every completed phase must be observed before the barriers go away
        plgpu.barrier_wait(smem["empty"].at[lax.rem(k, jnp.int32(NUM_STAGES))])


def _multiply(steps: int, mine, smem):
    """A consumer: its 64 rows, summed over all of K by the tensor cores."""

    def multiply(sums):
        @pl.loop(0, steps)
        def _step(k):
            stage = lax.rem(k, jnp.int32(NUM_STAGES))
            plgpu.barrier_wait(smem["full"].at[stage])
            plgpu.wgmma(sums, smem["x_smem"].at[stage, mine], smem["w_smem"].at[stage].T)
            plgpu.wgmma_wait(0)  # the other consumer keeps the tensor cores busy meanwhile
            plgpu.barrier_arrive(smem["empty"].at[stage])

        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((CONSUMER_ROWS, BLOCK), jnp.float32))


LEVEL = Level(2, "pipeline", grouped_matmul, block_m=lambda expected: BLOCK, block_scales=False)

if __name__ == "__main__":
    interruption.exit_with(lambda: harness.main(LEVEL))
