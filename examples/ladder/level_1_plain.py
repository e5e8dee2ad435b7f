"""Level 1: a plain FP8 grouped matmul. docs/kernels/level_1_plain.md explains it.

One warpgroup computes one tile: 128 rows of one expert times 128 of its weight rows.

    for each 128 columns of K:
        copy x[128, 128] and weights[128, 128] to shared memory, wait for both
        wgmma: sums += x @ weights.T, wait
    sums * (scale of the row x scale of the weights) -> bf16 -> global memory

    python examples/ladder/level_1_plain.py
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
# How the tensor cores want FP8 operands to lie in shared memory.
FP8_TILES = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
BF16_TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def grouped_matmul(
    rows: Quantized,
    plan: GroupPlan,
    weights: Float8e4m3fn[Array, "E N K"],
    weights_scale: Float32[Array, "E N/128 K/128"],
    interpret: Any = None,
) -> BFloat16[Array, "M N"]:
    """`rows @ weights[expert].T` for the rows of each expert; scales must not change along K.

    Args:
        rows: `e4m3[M, K]` in the order of the plan, and its scales `f32[K/128, M]`.
        plan: Where the rows of each expert lie.
        weights: `e4m3[E, N, K]`.
        weights_scale: `f32[E, N/128, K/128]`.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `bf16[M, N]`; padding rows hold anything.
    """
    num_rows, num_columns = rows.values.shape[0], weights.shape[1]
    kernel = plgpu.kernel(
        _kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((BLOCK, BLOCK), jnp.float8_e4m3fn, transforms=FP8_TILES),
            plgpu.SMEM((BLOCK, BLOCK), jnp.float8_e4m3fn, transforms=FP8_TILES),
            plgpu.SMEM((BLOCK, BLOCK), jnp.bfloat16, transforms=BF16_TILES),
            plgpu.Barrier(num_arrivals=2),  # two copies arrive at it
        ],
        grid=(num_rows // BLOCK, num_columns // BLOCK),
        grid_names=("row_tile", "column"),
        kernel_name="ladder_plain",
        interpret=interpret,
    )
    return kernel(*rows, plan.tile_expert, plan.num_tiles, weights, weights_scale)


def _kernel(
    x, x_scale, tile_expert, num_tiles, weights, weights_scale, out, x_smem, w_smem, out_smem, full
):
    row_tile, column = lax.axis_index("row_tile"), lax.axis_index("column")

    @pl.when(row_tile < num_tiles[0])
    def _tile():
        expert = tile_expert[row_tile]
        rows, columns = pl.ds(row_tile * BLOCK, BLOCK), pl.ds(column * BLOCK, BLOCK)

        def multiply(sums):
            @pl.loop(0, x.shape[1] // BLOCK)
            def _step(k):
                ks = pl.ds(k * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(x.at[rows, ks], x_smem, full)
                plgpu.copy_gmem_to_smem(weights.at[expert, columns, ks], w_smem, full)
                plgpu.barrier_wait(full)
                plgpu.wgmma(sums, x_smem, w_smem.T)
                plgpu.wgmma_wait(0)

            return sums[...]

        sums = pl.run_scoped(multiply, plgpu.ACC((BLOCK, BLOCK), jnp.float32))
        layout = plgpu.Layout.WGMMA.reduce(1)  # one number per row of `sums`
        scale = plgpu.load(x_scale.at[0, rows], layout=layout, optimized=False)
        scale = scale * weights_scale[expert, column, 0]
        sums = sums * lax.broadcast_in_dim(scale, sums.shape, [0])
        out_smem[...] = sums.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out.at[rows, columns])
        plgpu.wait_smem_to_gmem(0)


LEVEL = Level(1, "plain", grouped_matmul, block_m=lambda expected: BLOCK, block_scales=False)

if __name__ == "__main__":
    interruption.exit_with(lambda: harness.main(LEVEL))
