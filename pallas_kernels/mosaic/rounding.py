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
PTX_RECIPROCAL = """{
.reg .f32 guess, error;
rcp.approx.ftz.f32 guess, $1;
fma.rn.f32 error, guess, $1, 0fBF800000;
neg.f32 error, error;
fma.rn.f32 $0, guess, error, guess;
}"""
"""The steps of `rcp.rn.f32` where neither the number nor the result is a denormal."""


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

    return map_registers("div.rn.f32 $0, $1, $2;", numerator, denominator, layout=layout)


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
    return map_if_small(
        (PTX_RECIPROCAL, "rcp.rn.f32 $0, $1;"),
        [(value,) for value in values],
        tested=values,
        below=_DENORMAL_RECIPROCAL,
        layout=layout,
    )


def map_if_small(
    codes: tuple[str, str],
    operands: Sequence[tuple[Float32[Array, "*n"], ...]],
    *,
    tested: Sequence[Float32[Array, "*n"]],
    below: int,
    layout: plgpu.Layout,
) -> list[Float32[Array, "*n"]]:
    """PTX for each number, one of two codes for all numbers of a lane, on a GPU only.

    Instructions that round a quotient or a root correctly test each number and branch; ptxas then
    computes one after the other. One test for all of them lets it interleave them.

    Args:
        codes: `$0` is the result, `$1`, `$2`, ... the operands. The first code runs where all of
            `tested` are small, the second where one is not.
        operands: Of each result, `f32[...]` of one shape, held in `layout`, as the results are.
        tested: `f32[...]` of that shape, not negative or NaN.
        below: Bits of the f32 that small numbers are below; NaN is above all.
        layout: Register layout.
    """
    flat = [*tested, *(array for arrays in operands for array in arrays)]
    result = plgpu.ShapeDtypeStruct(flat[-1].shape, flat[-1].dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(flat), return_type=[result] * len(operands))
    def mapped(_, *arrays):
        i32 = ir.IntegerType.get_signless(32)
        lanes = [lane for array in arrays[: len(tested)] for lane in _lanes(array)]
        # Compared as integers, NaN is above infinity.
        largest = functools.reduce(arith.maxui, [mgpu.utils.bitcast(lane, i32) for lane in lanes])
        limit = mgpu.utils.c(below, i32)
        small = arith.cmpi(arith.CmpIPredicate.ult, largest, limit)
        remaining = iter(arrays[len(tested) :])
        given = [[_lanes(next(remaining)) for _ in arrays] for arrays in operands]
        numbers = [number for lanes in given for number in zip(*lanes, strict=True)]
        branch = scf.IfOp(small, [number[0].type for number in numbers], has_else=True)  # type: ignore[call-arg]
        for block, code in zip((branch.then_block, branch.else_block), codes, strict=True):
            with ir.InsertionPoint(block):
                scf.yield_([_asm(code, *number) for number in numbers])
        results, size, like = list(branch.results), len(given[0][0]), arrays[-1]
        return [_from_lanes(like, results[i * size :][:size]) for i in range(len(operands))]

    return mapped(*flat)


def map_registers(
    code: str, *operands: Float32[Array, "*n"], layout: plgpu.Layout
) -> Float32[Array, "*n"]:
    """PTX for each number, on a GPU only.

    Args:
        code: `$0` is the result, `$1`, `$2`, ... the operands. All lanes run it together, and may
            exchange.
        operands: `f32[...]` of one shape, held in `layout`, as the result is.
        layout: Register layout.
    """
    first = operands[0]

    @plgpu.inline_mgpu(
        arg_types=(layout,) * len(operands),
        return_type=plgpu.ShapeDtypeStruct(first.shape, first.dtype, layout=layout),
    )
    def mapped(_, *arrays):
        numbers = zip(*map(_lanes, arrays), strict=True)
        return _from_lanes(arrays[0], [_asm(code, *number) for number in numbers])

    return mapped(*operands)


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
