"""What Pallas does not offer on a GPU: sums over lanes, ones of a word, a barrier of a warpgroup.

Each has its meaning on a CPU beside it, for the interpreter.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir.dialects import llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.mosaic import layouts
from pallas_kernels.mosaic.indexed_memory import map_lanes
from pallas_kernels.mosaic.ptx import i32

_LANES = 32
# Lane l adds what lane l - distance has; the lanes below `distance` have nobody to ask.
_ADD_EARLIER = (
    "{{ .reg .pred p; .reg .b32 t; shfl.sync.up.b32 t|p, $1, {distance}, 0, -1; "
    "@!p mov.b32 t, 0; add.s32 $0, $1, t; }}"
)


def count_ones(words: Int32[Array, "*n"], *, layout: plgpu.Layout, interpret) -> Array:
    """How many bits of each word are set, `i32[*n]`.

    Args:
        words: `i32[*n]`, held in `layout`.
        layout: Register layout of the words and of the result.
        interpret: The kernel's `interpret` argument.
    """
    if interpret:
        return lax.population_count(words)
    return _map(words, lambda word: llvm.intr_ctpop(word), layout)


def running_sum(values: Int32[Array, "4 32"], *, interpret) -> Int32[Array, "4 32"]:
    """Sum of each row up to and including each column: a row per warp, by five shuffles.

    Args:
        values: `i32[4, 32]`, held in `layouts.row_per_warp(32)`, as the result is.
        interpret: The kernel's `interpret` argument.
    """
    if interpret:
        return jnp.cumsum(values, axis=1, dtype=jnp.int32)

    def scan(value):
        for step in range(_LANES.bit_length() - 1):
            code = _ADD_EARLIER.format(distance=2**step)
            value = llvm.inline_asm(i32(), [value], code, "=r,r", has_side_effects=True)
        return value

    return _map(values, scan, layouts.row_per_warp(_LANES))


def sync(interpret) -> None:
    """Waits for the warpgroup: what its threads have stored in shared memory is seen by all.

    Without the fence of `plgpu.commit_smem`, which only TMA and wgmma need.
    """
    if not interpret:  # there a warpgroup is one thread

        @plgpu.inline_mgpu()
        def barrier(_):
            mgpu.utils.warpgroup_barrier()

        barrier()


def _map(values, fn, layout):
    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(values.shape, jnp.int32, layout=layout),
    )
    def mapped(_, array):
        registers = map_lanes(array, fn, i32())
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=True)

    return mapped(values)
