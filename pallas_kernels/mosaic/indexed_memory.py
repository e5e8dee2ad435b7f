"""Per-lane indexed loads and stores of global memory, which Pallas does not offer on a GPU.

`load_at` and `store_at` take a vector of flat element offsets. On a GPU each lane computes its own
address (a few lines of inline Mosaic GPU); in the interpreter, which cannot run those, the same
meaning is spelled with ordinary indexing.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int32

from pallas_kernels.mosaic import layouts
from pallas_kernels.mosaic.ptx import asm, i32

MAX_OFFSET = 2**31
"""Elements that int32 offsets reach."""

_PTX_STORE = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.b32 [$0], $1; }"


def load_at(
    ref, offsets: Int32[Array, "*n"], *, layout: plgpu.Layout, interpret, shift: int = 0
) -> Array:
    """`ref.ravel()[offsets + shift]`; every element must be in range.

    Args:
        ref: Contiguous array in global memory.
        offsets: `i32[...]` flat element offsets, held in `layout`.
        layout: Register layout of `offsets` and of the result.
        interpret: The kernel's `interpret` argument.
        shift: Added to the offsets by the load itself, which costs no instruction.

    Returns:
        An array of `offsets.shape` and the dtype of `ref`.

    Raises:
        ValueError: `ref` has more elements than int32 offsets reach.
    """
    _check_extent(ref)
    if interpret:
        return jnp.take(ref[...].reshape(-1), offsets + shift)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout),
        return_type=plgpu.ShapeDtypeStruct(offsets.shape, ref.dtype, layout=layout),
    )
    def gather(_, memory, index):
        element = mgpu.utils.dtype_to_ir_type(ref.dtype)
        loaded = _map_lanes(
            index, lambda i: llvm.load(element, _address(memory, i, element, shift)), element
        )
        signed = jnp.issubdtype(ref.dtype, jnp.signedinteger) or None
        return mgpu.FragmentedArray(_registers=loaded, _layout=index.layout, _is_signed=signed)

    return gather(ref, offsets)


def store_at(
    ref,
    offsets: Int32[Array, "*n"],
    values: Array,
    mask: Bool[Array, "*n"],
    *,
    layout: plgpu.Layout,
    interpret,
) -> None:
    """`ref.ravel()[offsets[mask]] = values[mask]`; live offsets must be in range and distinct.

    Args:
        ref: Contiguous array in global memory, 4-byte elements.
        offsets: `i32[...]` flat element offsets, held in `layout`.
        values: `[...]`, the dtype of `ref`, held in `layout`.
        mask: `bool[...]`, which elements to store.
        layout: Register layout of the three.
        interpret: The kernel's `interpret` argument.

    Raises:
        ValueError: `ref` has more elements than int32 offsets reach.
    """
    _check_extent(ref)
    if interpret:
        _store_one_by_one(ref, offsets, values, mask)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout, layout))
    def scatter(_, memory, index, value, live):
        element = mgpu.utils.dtype_to_ir_type(ref.dtype)
        triples = zip(index.registers.flat, value.registers.flat, live.registers.flat, strict=True)
        for i_reg, v_reg, m_reg in triples:
            for lane in range(ir.VectorType(i_reg.type).shape[0]):
                address = _address(memory, _extract(i_reg, lane), element)
                word = mgpu.utils.bitcast(_extract(v_reg, lane), i32())
                asm(_PTX_STORE, [address, word, _extract(m_reg, lane)], "l,r,r")

    scatter(ref, offsets, values, layouts.as_int(mask))


def _check_extent(ref) -> None:
    if math.prod(ref.shape) > MAX_OFFSET:
        raise ValueError(
            f"expected an array of at most 2^31 elements, which int32 offsets reach, "
            f"got {list(ref.shape)}"
        )


def _store_one_by_one(ref, offsets, values, mask):
    offsets, values, mask = offsets.ravel(), values.ravel(), mask.ravel()

    @pl.loop(0, offsets.shape[0])
    def _element(i):
        @pl.when(lax.dynamic_index_in_dim(mask, i, keepdims=False))
        def _store():
            offset = lax.dynamic_index_in_dim(offsets, i, keepdims=False)
            position: list[Array] = []
            for extent in reversed(ref.shape):
                position.insert(0, lax.rem(offset, jnp.int32(extent)))
                offset = lax.div(offset, jnp.int32(extent))
            ref[tuple(position)] = lax.dynamic_index_in_dim(values, i, keepdims=False)


def _map_lanes(array: mgpu.FragmentedArray, fn, element):
    registers = array.registers.copy()
    for position, register in enumerate(array.registers.flat):
        lanes = ir.VectorType(register.type).shape[0]
        result = llvm.mlir_undef(ir.VectorType.get((lanes,), element))
        for lane in range(lanes):
            result = vector.insert(
                fn(_extract(register, lane)), result, dynamic_position=[], static_position=[lane]
            )
        registers.flat[position] = result
    return registers


def _extract(register, lane: int):
    return vector.extract(register, dynamic_position=[], static_position=[lane])


def _address(memory, index, element, shift: int = 0):
    i64 = ir.IntegerType.get_signless(64)
    base = mgpu.utils.memref_ptr(memory)
    offset = arith.addi(arith.extsi(i64, index), mgpu.utils.c(shift, i64))
    return llvm.getelementptr(
        base.type, base, [offset], [-(2**31)], element, llvm.GEPNoWrapFlags.none
    )
