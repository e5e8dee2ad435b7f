"""The formulas of `pallas_kernels.scores` in a kernel, bit for bit: one row of logits per warp.

PTX with every rounding written down, for `ptxas` would fuse a product with the sum after it. In the
interpreter the formulas themselves run.

Registers are `f32[4, 32]` in `layouts.row_per_warp(32)`: an expert per lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

from pallas_kernels import scores
from pallas_kernels.mosaic import layouts, topk
from pallas_kernels.mosaic.rounding import divide, map_registers

_LANES = 32
_LAYOUT = layouts.row_per_warp(_LANES)

type _Register = Float32[Array, "4 32"]


def _bits(value: Any) -> str:
    """A float as PTX writes it exactly."""
    return f"0f{np.float32(value).view(np.uint32):08X}"


def _horner(x: str, coefficients: Sequence[Any], to: str) -> list[str]:
    """`to` becomes the polynomial of `x`, highest power first."""
    code = [f"mov.f32 {to}, {_bits(coefficients[0])};"]
    for coefficient in coefficients[1:]:
        code += [f"mul.rn.f32 {to}, {x}, {to};", f"add.rn.f32 {to}, {to}, {_bits(coefficient)};"]
    return code


_ONE, _LARGEST = _bits(1), _bits(scores.LARGEST_EXPONENT)
# `y` becomes the exponential of `x`, in the order of `scores.exp`.
_EXP = [
    f"min.f32 i, x, {_LARGEST};",  # of a NaN the other; it is put back at the end
    f"max.f32 i, i, {_bits(-scores.LARGEST_EXPONENT)};",
    f"mul.rn.f32 n, i, {_bits(scores.LOG2_E)};",
    "cvt.rni.f32.f32 n, n;",
    f"mul.rn.f32 y, n, {_bits(scores.LN2_HIGH)};",
    "sub.rn.f32 r, i, y;",
    f"mul.rn.f32 y, n, {_bits(scores.LN2_LOW)};",
    "sub.rn.f32 r, r, y;",
    *_horner("r", scores.EXP, "y"),
    "mul.rn.f32 i, r, r;",
    "mul.rn.f32 y, y, i;",
    "add.rn.f32 y, y, r;",
    f"add.rn.f32 y, y, {_ONE};",
    "cvt.rni.s32.f32 e, n;",
    "shl.b32 e, e, 23;",
    "mov.b32 b, y;",
    "add.s32 b, b, e;",
    "mov.b32 y, b;",
    f"setp.lt.f32 p, x, {_bits(-scores.LARGEST_EXPONENT)};",
    f"selp.f32 y, {_bits(0)}, y, p;",
    f"setp.gt.f32 p, x, {_LARGEST};",
    f"selp.f32 y, {_bits(np.inf)}, y, p;",
    "setp.nan.f32 p, x, x;",
    "selp.f32 y, x, y, p;",
]
_REGISTERS = [".reg .f32 x, y, i, n, r;", ".reg .b32 b, e;", ".reg .pred p;"]
PTX_EXP = "\n".join(["{", *_REGISTERS, "mov.f32 x, $1;", *_EXP, "mov.f32 $0, y;", "}"])
PTX_SIGMOID = "\n".join(
    [
        "{",
        *_REGISTERS,
        "neg.f32 x, $1;",
        *_EXP,
        f"add.rn.f32 y, {_ONE}, y;",
        f"mov.f32 x, {_ONE};",
        "div.rn.f32 $0, x, y;",
        "}",
    ]
)
PTX_SQRTSOFTPLUS = "\n".join(
    [
        "{",
        *_REGISTERS,
        "abs.f32 x, $1;",
        "neg.f32 x, x;",
        *_EXP,
        "add.rn.f32 i, y, y;",
        f"add.rn.f32 n, {_bits(2)}, y;",
        "div.rn.f32 r, i, n;",  # r is d, i becomes z
        f"mul.rn.f32 i, r, {_bits(0.5)};",
        "mul.rn.f32 i, i, i;",
        *_horner("i", scores.ATANH, "y"),
        "mul.rn.f32 y, i, y;",
        "mul.rn.f32 y, r, y;",
        "add.rn.f32 y, r, y;",
        f"max.f32 x, $1, {_bits(0)};",  # of a NaN 0, but then y is one
        "add.rn.f32 y, x, y;",
        "sqrt.rn.f32 $0, y;",
        "}",
    ]
)
_ADD_ACROSS = (
    "{{ .reg .f32 t; shfl.sync.bfly.b32 t, $1, {distance}, 31, -1; add.rn.f32 $0, $1, t; }}"
)


def exp(x: _Register, interpret) -> _Register:
    """`scores.exp`."""
    return scores.exp(x) if interpret else map_registers(PTX_EXP, x, layout=_LAYOUT)


def sigmoid(x: _Register, interpret) -> _Register:
    """`scores.sigmoid`."""
    return scores.sigmoid(x) if interpret else map_registers(PTX_SIGMOID, x, layout=_LAYOUT)


def sqrtsoftplus(x: _Register, interpret) -> _Register:
    """`scores.sqrtsoftplus`."""
    if interpret:
        return scores.sqrtsoftplus(x)
    return map_registers(PTX_SQRTSOFTPLUS, x, layout=_LAYOUT)


def softmax(
    read: Callable[[int], _Register], num_experts: int, lane: Array, interpret
) -> Callable[[_Register], _Register]:
    """`scores.softmax` of each row, as a function of the logits whose scores are wanted.

    Twice over the logits: the largest, then the sum of the exponentials in the order of
    `scores.tree_sum`. That adds the upper half of the experts to the lower, until 32 are left: a
    tree over registers, taken depth first, so that few live at once. Then lanes add lanes.

    Args:
        read: Logits of the experts `lane + start`; of those from E on any.
        num_experts: E.
        lane: The register that holds each lane's number.
        interpret: The kernel's `interpret` argument.

    Returns:
        `logits -> scores`.
    """
    registers = max(1, (1 << (num_experts - 1).bit_length()) // _LANES)

    def logits(register: int) -> _Register:
        x = read(register * _LANES)
        # As a NaN it counts in neither; -inf would be 1 where all are.
        return jnp.where(lane + register * _LANES < num_experts, x, jnp.nan)

    exist = [register for register in range(registers) if register * _LANES < num_experts]
    keys = [topk.to_key(logits(register)) for register in exist]
    best = keys[0]
    for key in keys[1:]:
        best = lax.max(best, key)
    largest = topk.from_key(topk.across(jnp.max(best, axis=1), lane.shape))

    def exponential(x: _Register) -> _Register:
        return exp(jnp.where(x == largest, jnp.float32(0), x - largest), interpret)

    def total(first: int, width: int) -> _Register | None:
        """Of the registers `first`, `first + width`, ...; None where no expert is."""
        if width == registers:
            if first not in exist:
                return None
            x = logits(first)
            return jnp.where(x != x, jnp.float32(0), exponential(x))
        lower, upper = total(first, 2 * width), total(first + width, 2 * width)
        return lower if lower is None or upper is None else lower + upper

    of_lane = total(0, 1)
    assert of_lane is not None
    of_row = _across_lanes(of_lane, interpret)

    def score(x: _Register) -> _Register:
        share = divide(exponential(x), of_row, layout=_LAYOUT, interpret=interpret)
        return without_denormals(share)

    return score


def _across_lanes(x: _Register, interpret) -> _Register:
    """In every lane the sum of the row, lanes at distances of 16, 8, 4, 2 and 1."""
    if interpret:
        return jnp.broadcast_to(scores.tree_sum(x), x.shape)
    for distance in (16, 8, 4, 2, 1):
        x = map_registers(_ADD_ACROSS.format(distance=distance), x, layout=_LAYOUT)
    return x


def without_denormals(x: _Register) -> _Register:
    """`x`, and +0 for what is below 2^-126 in magnitude, -0 too."""
    tiny = jnp.float32(scores.SMALLEST_NORMAL)
    return jnp.where((x < tiny) & (x > -tiny), jnp.float32(0), x)
