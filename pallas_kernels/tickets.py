"""Tickets: a counter in global memory from which the CTAs of a running kernel draw numbers.

The counter is two of the call's own semaphores, tickets drawn and CTAs done. Pallas hands them over
as zeros and wants zeros back: the last CTA that is done sets them so. The interpreter cannot run
these atomics.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, memref
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.ptx import asm, i32

_RETIRE = """{{
    .reg .pred last; .reg .u32 done;
    atom.add.acq_rel.gpu.global.u32 done, [$0+4], 1;
    setp.eq.u32 last, done, {others};
    @last st.relaxed.gpu.global.u32 [$0], 0;
    @last st.relaxed.gpu.global.u32 [$0+4], 0;
}}"""


def new_counter():
    """The counter of the kernel that is being traced, all zeros."""
    return pl.get_global(plgpu.SemaphoreType.REGULAR((2,)))


def draw(counter_gmem, mailbox_smem) -> Int32[Array, ""]:
    """The next ticket, 0, 1, 2, ..., the same for all threads of the calling warpgroup.

    Args:
        counter_gmem: From `new_counter`.
        mailbox_smem: `i32[1]`, through which the thread that draws tells the others.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
    )
    def drawn(_, counter, mailbox):
        first = mgpu.utils.c(0, ir.IndexType.get())
        with mgpu.utils.when(_one_thread()):
            ticket = llvm.inline_asm(
                i32(),
                [mgpu.utils.memref_ptr(counter)],
                "atom.add.relaxed.gpu.global.u32 $0, [$1], 1;",
                "=r,l",
                has_side_effects=True,
            )
            memref.store(ticket, mailbox, [first])
        mgpu.utils.warpgroup_barrier()
        ticket = memref.load(mailbox, [first])
        mgpu.utils.warpgroup_barrier()  # nobody may draw again before everybody has read
        return mgpu.FragmentedArray.splat(ticket, (), is_signed=True)

    return drawn(counter_gmem, mailbox_smem)


def retire(counter_gmem, num_ctas: int) -> None:
    """Says that this CTA draws no more; called once by one warpgroup of each CTA.

    Args:
        counter_gmem: From `new_counter`.
        num_ctas: CTAs of the grid.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def retired(_, counter):
        with mgpu.utils.when(_one_thread()):
            asm(_RETIRE.format(others=num_ctas - 1), [mgpu.utils.memref_ptr(counter)], "l")

    retired(counter_gmem)


def _one_thread():
    return mgpu.utils.single_thread_predicate(scope=mgpu.utils.ThreadSubset.WARPGROUP)
