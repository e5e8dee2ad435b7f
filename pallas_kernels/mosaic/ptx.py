"""Small pieces of inline Mosaic GPU code that several kernels write with."""

from __future__ import annotations

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu


def i32():
    """The MLIR type."""
    return ir.IntegerType.get_signless(32)


def constant(value: int):
    """An i32 constant."""
    return mgpu.utils.c(value, i32())


def asm(code: str, operands, constraints: str) -> None:
    """PTX with side effects and without a result."""
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, operands, code, constraints, has_side_effects=True)


def thread_of_warpgroup():
    """The thread's index in its warpgroup.

    Read anew each time: what is computed from it is cheap, and LLVM would otherwise keep all of it
    in registers from the start of a persistent kernel on.
    """
    thread = llvm.inline_asm(i32(), [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
    return arith.andi(thread, constant(127))


def flat(row, num_columns: int, column):
    """`row * num_columns + column` of i32 values, in 64 bits."""
    i64 = ir.IntegerType.get_signless(64)
    row, column = arith.extsi(i64, row), arith.extsi(i64, column)
    return arith.addi(arith.muli(row, mgpu.utils.c(num_columns, i64)), column)


def global_address(ref, element, size: int):
    """The address of an element, an i64 index, of `size` bytes in global memory."""
    i8 = ir.IntegerType.get_signless(8)
    i64 = ir.IntegerType.get_signless(64)
    offset = arith.muli(element, mgpu.utils.c(size, i64))
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [offset], i8)


def load_i32(ref, index):
    """The 32 bits at an i32 index of global memory that no thread writes meanwhile."""
    address = global_address(ref, arith.extsi(ir.IntegerType.get_signless(64), index), 4)
    return llvm.inline_asm(i32(), [address], "ld.global.nc.b32 $0, [$1];", "=r,l")


def shared_address(ref):
    """The 32-bit address of a reference in shared memory."""
    return llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(ref))
