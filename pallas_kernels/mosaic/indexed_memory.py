"""Per-lane indexed memory accesses, which Pallas does not offer on a GPU.

`load_at` and `store_at` take a vector of flat element offsets into global or shared memory, `or_at`
and `add_at` one into shared memory. On a GPU each lane computes its own address (a few lines of
inline Mosaic GPU); in the interpreter, which cannot run those, the same meaning is spelled with
ordinary indexing.
"""

from __future__ import annotations

import math

import jax
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

_PTX = "{instruction} [$0], $1;"
_PTX_IF = "{{ .reg .pred p; setp.ne.b32 p, $2, 0; @p {instruction} [$0], $1; }}"


def load_at(
    ref, offsets: Int32[Array, "*n"], *, layout: plgpu.Layout, interpret, shift: int = 0
) -> Array:
    """`ref.ravel()[offsets + shift]`; every element must be in range.

    Args:
        ref: Contiguous array in global or shared memory.
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
        loaded = map_lanes(
            index, lambda i: llvm.load(element, _address(memory, i, element, shift)), element
        )
        signed = jnp.issubdtype(ref.dtype, jnp.signedinteger) or None
        return mgpu.FragmentedArray(_registers=loaded, _layout=index.layout, _is_signed=signed)

    return gather(ref, offsets)


def store_at(
    ref,
    offsets: Int32[Array, "*n"],
    values: Array,
    mask: Bool[Array, "*n"] | None = None,
    *,
    layout: plgpu.Layout,
    interpret,
) -> None:
    """`ref.ravel()[offsets[mask]] = values[mask]`; live offsets must be in range and distinct.

    Args:
        ref: Contiguous array in global or shared memory, 4-byte elements.
        offsets: `i32[...]` flat element offsets, held in `layout`.
        values: `[...]`, the dtype of `ref`, held in `layout`.
        mask: `bool[...]`, which elements to store, or None for all.
        layout: Register layout of the three.
        interpret: The kernel's `interpret` argument.

    Raises:
        ValueError: `ref` has more elements than int32 offsets reach.
    """
    _check_extent(ref)
    if interpret:
        mask = jnp.ones_like(offsets, bool) if mask is None else mask
        if jax.typeof(ref).memory_space == plgpu.SMEM:
            end = math.prod(ref.shape)
            flat = ref[...].reshape(-1).at[jnp.where(mask, offsets, end)].set(values, mode="drop")
            ref[...] = flat.reshape(ref.shape)
        else:  # not the whole array: other blocks may write to it meanwhile
            _store_one_by_one(ref, offsets, values, mask)
        return

    _for_each(ref, offsets, values, mask, layout, {False: "st.global.b32", True: "st.shared.b32"})


def or_at(
    ref,
    offsets: Int32[Array, "*n"],
    values: Int32[Array, "*n"],
    mask: Bool[Array, "*n"],
    *,
    layout: plgpu.Layout,
    interpret,
) -> None:
    """`ref.ravel()[offsets[mask]] |= values[mask]`, atomically: offsets may be equal.

    Args:
        ref: Contiguous i32 array in shared memory.
        offsets: `i32[...]` flat element offsets, held in `layout`; live ones must be in range.
        values: `i32[...]`, held in `layout`.
        mask: `bool[...]`, which elements take part.
        layout: Register layout of the three.
        interpret: The kernel's `interpret` argument.
    """
    if interpret:
        offsets, values = offsets.ravel(), jnp.where(mask, values, 0).ravel()

        def step(i, flat):
            at = jnp.where(values[i] != 0, offsets[i], 0)
            return flat.at[at].set(flat[at] | values[i])

        flat = lax.fori_loop(0, offsets.shape[0], step, ref[...].reshape(-1))
        ref[...] = flat.reshape(ref.shape)
        return
    _for_each(ref, offsets, values, mask, layout, {True: "red.shared.or.b32"})


def add_at(
    ref, offsets: Int32[Array, "*n"], values: Int32[Array, "*n"], *, layout: plgpu.Layout, interpret
) -> None:
    """`ref.ravel()[offsets] += values`, atomically: offsets may be equal.

    Args:
        ref: Contiguous i32 array in shared memory.
        offsets: `i32[...]` flat element offsets in range, held in `layout`.
        values: `i32[...]`, held in `layout`.
        layout: Register layout of the two.
        interpret: The kernel's `interpret` argument.
    """
    if interpret:
        flat = ref[...].reshape(-1).at[offsets.ravel()].add(values.ravel())
        ref[...] = flat.reshape(ref.shape)
        return
    _for_each(ref, offsets, values, None, layout, {True: "red.shared.add.u32"})


def _for_each(ref, offsets, values, mask, layout, instructions):
    """An instruction per element whose mask is set: `instructions[whether ref is shared]`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(layout,) * (2 if mask is None else 3)))
    def scatter(_, memory, *vectors):
        element = mgpu.utils.dtype_to_ir_type(ref.dtype)
        shared = mgpu.utils.is_smem_ref(memory)
        code = (_PTX if mask is None else _PTX_IF).format(instruction=instructions[shared])
        constraints = ",".join(["r" if shared else "l", *"r" * (len(vectors) - 1)])
        for registers in zip(*(array.registers.flat for array in vectors), strict=True):
            for lane in range(ir.VectorType(registers[0].type).shape[0]):
                index, value, *live = (_extract(register, lane) for register in registers)
                address = _address(memory, index, element)
                if shared:
                    address = llvm.ptrtoint(i32(), address)
                asm(code, [address, mgpu.utils.bitcast(value, i32()), *live], constraints)

    vectors = [] if mask is None else [layouts.as_int(mask)]
    scatter(ref, offsets, values, *vectors)


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


def map_lanes(array: mgpu.FragmentedArray, fn, element):
    """The registers of `fn(x)`, of the MLIR type `element`, for every element x of `array`."""
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
