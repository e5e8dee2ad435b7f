"""Correctly rounded division, where the last bit is part of the contract.

On a GPU Pallas' `/` becomes `div.full.f32`, which may be 2 ulp off.
"""

from __future__ import annotations

from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32


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
        f32 = ir.F32Type.get()
        quotients = top.registers.copy()
        pairs = zip(top.registers.flat, bottom.registers.flat, strict=True)
        for position, (a, b) in enumerate(pairs):
            result = llvm.mlir_undef(a.type)
            for lane in range(ir.VectorType(a.type).shape[0]):
                operands = [
                    vector.extract(x, dynamic_position=[], static_position=[lane]) for x in (a, b)
                ]
                quotient = llvm.inline_asm(f32, operands, "div.rn.f32 $0, $1, $2;", "=f,f,f")
                result = vector.insert(
                    quotient, result, dynamic_position=[], static_position=[lane]
                )
            quotients.flat[position] = result
        return mgpu.FragmentedArray(_registers=quotients, _layout=top.layout, _is_signed=None)

    return divide_registers(numerator, denominator)
