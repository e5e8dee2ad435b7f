"""Correctly rounded division, where the last bit is part of the contract.

On a GPU Pallas' `/` becomes `div.full.f32`, which may be 2 ulp off.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, scf, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

# Bits of 2^126: below it the reciprocals of numbers from 1 on are normal.
_DENORMAL_RECIPROCAL = 0x7E800000
_PTX_RECIPROCAL = """{
.reg .f32 guess, error;
rcp.approx.ftz.f32 guess, $1;
fma.rn.f32 error, guess, $1, 0fBF800000;
neg.f32 error, error;
fma.rn.f32 $0, guess, error, guess;
}"""


def divide(
    numerator: Float32[Array, "*n"],
    denominator: Float32[Array, "*n"],
    *,
    layout: plgpu.Layout,
    interpret,
) -> Float32[Array, "*n"]:
    """`numerator / denominator` rounded to nearest even, denormals kept.

    Args:
        numerator: `f32[...]`, held in `layout`.
        denominator: `f32[...]`, the same shape and layout.
        layout: Register layout of both and of the result.
        interpret: The kernel's `interpret` argument.
    """
    if interpret:
        # The barrier keeps XLA from multiplying by the reciprocal of a constant.
        return numerator / lax.optimization_barrier(denominator)

    @plgpu.inline_mgpu(
        arg_types=(layout, layout),
        return_type=plgpu.ShapeDtypeStruct(numerator.shape, numerator.dtype, layout=layout),
    )
    def divide_registers(_, top, bottom):
        pairs = zip(_lanes(top), _lanes(bottom), strict=True)
        return _from_lanes(top, [_asm("div.rn.f32 $0, $1, $2;", a, b) for a, b in pairs])

    return divide_registers(numerator, denominator)


def reciprocals(
    values: Sequence[Float32[Array, "*n"]], *, layout: plgpu.Layout, interpret
) -> list[Float32[Array, "*n"]]:
    """`1 / value` of each, rounded to nearest even, denormals kept.

    On a GPU these are the steps of `rcp.rn.f32`, whose test for values that need more of them is
    made once for all values of a lane.

    Args:
        values: `f32[...]` of one shape, each at least 1 or NaN, held in `layout`.
        layout: Register layout of the values and of the results.
        interpret: The kernel's `interpret` argument.
    """
    if interpret:
        return [1.0 / lax.optimization_barrier(value) for value in values]
    result = plgpu.ShapeDtypeStruct(values[0].shape, values[0].dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(values), return_type=[result] * len(values))
    def invert(_, *arrays):
        i32 = ir.IntegerType.get_signless(32)
        lanes = [lane for array in arrays for lane in _lanes(array)]
        # Compared as integers, NaN is above infinity.
        largest = functools.reduce(arith.maxui, [mgpu.utils.bitcast(lane, i32) for lane in lanes])
        limit = mgpu.utils.c(_DENORMAL_RECIPROCAL, i32)
        normal = arith.cmpi(arith.CmpIPredicate.ult, largest, limit)
        types = [lane.type for lane in lanes]
        branch = scf.IfOp(normal, types, has_else=True)  # type: ignore[call-arg]
        codes = (_PTX_RECIPROCAL, "rcp.rn.f32 $0, $1;")
        for block, code in zip((branch.then_block, branch.else_block), codes, strict=True):
            with ir.InsertionPoint(block):
                scf.yield_([_asm(code, lane) for lane in lanes])
        inverted, size = list(branch.results), len(lanes) // len(arrays)
        return [_from_lanes(a, inverted[i * size :][:size]) for i, a in enumerate(arrays)]

    return invert(*values)


def map_registers(
    code: str, values: Float32[Array, "*n"], *, layout: plgpu.Layout
) -> Float32[Array, "*n"]:
    """PTX for each number, on a GPU only.

    Args:
        code: `$0` is the result, `$1` the number. All lanes run it together, and may exchange.
        values: `f32[...]`, held in `layout`, as the result is.
        layout: Register layout.
    """

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(values.shape, values.dtype, layout=layout),
    )
    def mapped(_, array):
        return _from_lanes(array, [_asm(code, lane) for lane in _lanes(array)])

    return mapped(values)


def _asm(code: str, *operands):
    """One float computed from others by PTX; where lanes exchange, all of them come there."""
    constraints = ",".join(["=f"] + ["f"] * len(operands))
    exchanges = {"has_side_effects": True} if "shfl" in code else {}
    return llvm.inline_asm(ir.F32Type.get(), operands, code, constraints, **exchanges)


def _lanes(array: mgpu.FragmentedArray) -> list[ir.Value]:
    return [
        vector.extract(register, dynamic_position=[], static_position=[lane])
        for register in array.registers.flat
        for lane in range(ir.VectorType(register.type).shape[0])
    ]


def _from_lanes(like: mgpu.FragmentedArray, lanes: list[ir.Value]) -> mgpu.FragmentedArray:
    remaining = iter(lanes)
    registers = like.registers.copy()
    for position, register in enumerate(like.registers.flat):
        result = llvm.mlir_undef(register.type)
        for lane in range(ir.VectorType(register.type).shape[0]):
            result = vector.insert(
                next(remaining), result, dynamic_position=[], static_position=[lane]
            )
        registers.flat[position] = result
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)
