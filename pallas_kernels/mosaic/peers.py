"""What the kernels between ranks share: who needs a token, rows of peers, how a kernel ends.

Pallas knows nothing of how a peer's memory is aligned and would store a row byte by byte. Rows are
moved here in words of 16 bytes, by a few lines of inline Mosaic GPU.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.mosaic.ptx import constant, global_address, i32, thread_of_warpgroup

THREADS = 128
_WORDS = 4  # i32 that a thread moves at once
_BYTES = 4 * _WORDS


def is_needed(ids_gmem, token, rank, num_local_experts: int):
    """Whether one of a token's experts is on a rank.

    Args:
        ids_gmem: i32[T,k] physical expert ids; a negative one is on no rank.
        token: Which.
        rank: Which.
        num_local_experts: Experts of each rank.
    """
    first = rank * num_local_experts
    places = [ids_gmem[token, choice] - first for choice in range(ids_gmem.shape[1])]
    return functools.reduce(
        jnp.logical_or, [(place >= 0) & (place < num_local_experts) for place in places]
    )


def load_bytes(ref) -> Int32[Array, " words"]:
    """A row of global memory, of this or another GPU, in registers.

    Args:
        ref: Contiguous, of any dtype, a multiple of 16 bytes.

    Returns:
        Its words; the last ones are repeated until every thread has as many.
    """
    words = _row_words(ref)
    padded = THREADS * _WORDS * math.ceil(words / (THREADS * _WORDS))
    layout = _row_layout(padded)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((padded,), jnp.int32, layout=layout),
    )
    def loaded(_, row):
        vector = ir.VectorType.get((_WORDS,), i32())
        registers = [
            llvm.load(vector, address, alignment=_BYTES) for address in _addresses(row, words)
        ]
        return _in_registers(registers, layout)

    return loaded(ref)


def store_bytes(ref, values: Int32[Array, " words"]) -> None:
    """Writes what `load_bytes` has read to a row of the same size, on this or another GPU."""
    words = _row_words(ref)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _row_layout(values.shape[0])))
    def stored(_, row, values):
        for address, value in zip(_addresses(row, words), values.registers.flat, strict=True):
            llvm.store(value, address, alignment=_BYTES)

    stored(ref, values)


def load_words(ref) -> Int32[Array, " words"]:
    """A few 4-byte elements of this GPU's memory, strided or not, in registers: one per thread."""
    (count,) = ref.shape
    padded = THREADS * math.ceil(count / THREADS)
    layout = columns_layout(padded, 1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((padded,), jnp.int32, layout=layout),
    )
    def loaded(_, words):
        vector = ir.VectorType.get((1,), i32())
        return _in_registers([llvm.load(vector, a) for a in _word_addresses(words, count)], layout)

    return loaded(ref)


def store_words(ref, values: Int32[Array, " words"]) -> None:
    """Writes what `load_words` has read to as many elements, on this or another GPU."""
    (count,) = ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), columns_layout(values.shape[0], 1)))
    def stored(_, words, values):
        addresses = _word_addresses(words, count)
        for address, value in zip(addresses, values.registers.flat, strict=True):
            llvm.store(value, address)

    stored(ref, values)


def load_columns(ref, *, columns: int, vector: int) -> Array:
    """Columns of a row of another GPU: `vector` neighbours per thread in each load.

    Args:
        ref: Contiguous, `columns` elements, aligned to `vector` of them.
        columns: A multiple of 128 * `vector`.
        vector: A power of two.

    Returns:
        `[columns]` in the layout of `columns_layout`.
    """
    layout = columns_layout(columns, vector)
    size = ref.dtype.itemsize

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((columns,), ref.dtype, layout=layout),
    )
    def loaded(_, row):
        element = mgpu.utils.dtype_to_ir_type(ref.dtype)
        kind = ir.VectorType.get((vector,), element)
        registers = []
        for register in range(columns // (THREADS * vector)):
            index = _element(register, vector, columns - vector)
            address = global_address(row, arith.extsi(_i64(), index), size)
            registers.append(llvm.load(kind, address, alignment=size * vector))
        return _in_registers(registers, layout, signed=None)

    return loaded(ref)


def columns_layout(columns: int, vector: int) -> plgpu.Layout:
    """Layout of `load_columns`."""
    return plgpu.Layout.WG_STRIDED((columns,), vector)


def finish(done, axis_name: str, num_ranks: int, blocks: int) -> None:
    """Ends a block; the kernel of no rank ends before all blocks of all ranks are here.

    A signal is sent after everything that the block has read and written. Only block 0 waits, so
    that no block holds a place on the GPU that another one needs to begin.

    Args:
        done: A semaphore of the whole grid. (One among the kernel's scratch would be the block's.)
        axis_name: Mesh axis of the ranks.
        num_ranks: How many.
        blocks: Of each rank's grid.
    """
    rank = lax.axis_index(axis_name)
    for step in range(num_ranks):
        pl.semaphore_signal(done, device_id={axis_name: lax.rem(rank + step, num_ranks)})

    @pl.when(lax.axis_index("block") == 0)
    def _wait():
        pl.semaphore_wait(done, num_ranks * blocks, decrement=False)


def _row_words(ref) -> int:
    size = math.prod(ref.shape) * ref.dtype.itemsize
    if size % _BYTES:
        raise ValueError(f"expected a row of a multiple of {_BYTES} bytes, got {size}")
    return size // 4


def _row_layout(words: int) -> plgpu.Layout:
    return plgpu.Layout.WG_STRIDED((words,), _WORDS)


def _addresses(row, words: int):
    """Of each of a thread's vectors; past the end of the row, of the last one in it."""
    for register in range(math.ceil(words / (THREADS * _WORDS))):
        index = _element(register, _WORDS, words - _WORDS)
        yield global_address(row, arith.extsi(_i64(), index), 4)


def _word_addresses(words, count: int):
    """Of each of a thread's elements; past the end, of the last one."""
    (stride,), _ = ir.MemRefType(words.type).get_strides_and_offset()
    for register in range(math.ceil(count / THREADS)):
        index = arith.extsi(_i64(), _element(register, 1, count - 1))
        yield global_address(words, arith.muli(index, mgpu.utils.c(stride, _i64())), 4)


def _element(register: int, vector: int, last: int):
    """First element of a thread's vector of that number, at most `last`."""
    index = arith.addi(
        arith.muli(thread_of_warpgroup(), constant(vector)), constant(register * THREADS * vector)
    )
    if (register + 1) * THREADS * vector > last + vector:
        index = arith.minsi(index, constant(last))
    return index


def _in_registers(values, layout: plgpu.Layout, signed: bool | None = True):
    """A register array from each thread's vectors."""
    registers = np.empty(len(values), dtype=object)
    registers[:] = values
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=signed)


def _i64():
    return ir.IntegerType.get_signless(64)
