"""An atomic work counter in global memory: the CTAs of a running kernel take tiles from it.

It is two numbers, tiles taken and CTAs that are finished: zeros before, and the last CTA to finish
sets them so again (`counted_in`). The interpreter cannot run these atomics.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax._src.lib.mlir.dialects import llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.mosaic import warp
from pallas_kernels.mosaic.ptx import asm, i32

_NEXT_TILE = """{
    .reg .pred first; .reg .b32 lane, drawn;
    mov.u32 lane, %laneid;
    setp.eq.u32 first, lane, 0;
    mov.u32 drawn, 0;
    @first atom.add.relaxed.gpu.global.u32 drawn, [$1], 1;
    shfl.sync.idx.b32 $0, drawn, 0, 31, 0xffffffff;
}"""
_FINISH = """{{
    .reg .pred last; .reg .u32 done;
    atom.add.acq_rel.gpu.global.u32 done, [$0+4], 1;
    setp.eq.u32 last, done, {others};
    @last st.relaxed.gpu.global.u32 [$0], 0;
    @last st.relaxed.gpu.global.u32 [$0+4], 0;
}}"""


def next_tile(counter_gmem) -> Int32[Array, ""]:
    """The number of a tile that no CTA has taken: 0, 1, 2, ...; called by a single warp.

    Args:
        counter_gmem: `i32[n]`, the counter in its first two.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
    )
    def take(_, counter):
        number = llvm.inline_asm(
            i32(), [mgpu.utils.memref_ptr(counter)], _NEXT_TILE, "=r,l", has_side_effects=True
        )
        return mgpu.FragmentedArray.splat(number, (), is_signed=True)

    return take(counter_gmem)


def finish(counter_gmem, num_ctas: int) -> None:
    """Says that this CTA takes no more tiles; called once, by one warp of each CTA.

    Args:
        counter_gmem: `i32[n]`, the counter in its first two.
        num_ctas: CTAs of the grid.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def count(_, counter):
        with mgpu.utils.when(warp.is_elected_lane()):
            asm(_FINISH.format(others=num_ctas - 1), [mgpu.utils.memref_ptr(counter)], "l")

    count(counter_gmem)
