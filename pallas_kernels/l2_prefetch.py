"""Asks the L2 cache for memory that a later kernel reads first."""

from __future__ import annotations

import math

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ptx import asm, constant, global_address, thread_of_warpgroup

PART_BYTES = 256 * 1024
"""What one warpgroup asks for."""

_PIECE = PART_BYTES // 128


def prefetch_part(array, index, part) -> None:
    """Asks for the `part`-th `PART_BYTES` of `array[index]`, as far as there are so many.

    Args:
        array: `[N, ...]` in global memory, elements of one byte.
        index: Which of the N.
        part: Which part.
    """
    size = math.prod(array.shape[1:])
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat))
    def prefetch(_, array, index, part):
        i64 = ir.IntegerType.get_signless(64)
        (index,), (part,) = index.registers.flat, part.registers.flat
        offset = arith.addi(
            arith.muli(part, constant(PART_BYTES)),
            arith.muli(thread_of_warpgroup(), constant(_PIECE)),
        )
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.sle, offset, constant(size - _PIECE))):
            start = arith.muli(arith.extsi(i64, index), mgpu.utils.c(size, i64))
            address = global_address(array, arith.addi(start, arith.extsi(i64, offset)), 1)
            asm(f"cp.async.bulk.prefetch.L2.global [$0], {_PIECE};", [address], "l")

    if size >= _PIECE:
        prefetch(array, index, part)
