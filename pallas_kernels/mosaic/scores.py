"""The formulas of `pallas_kernels.scores` in a kernel, bit for bit: one row of logits per warp.

PTX with every rounding written down, for `ptxas` would fuse a product with the sum after it. In the
interpreter the formulas themselves run.

Registers are `f32[4, 32]` in `layouts.row_per_warp(32)`: an expert per lane.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from pallas_kernels import scores
from pallas_kernels.mosaic import layouts, topk
from pallas_kernels.mosaic.rounding import PTX_RECIPROCAL, divide, map_if_small, map_registers

_LANES = 32
_LAYOUT = layouts.row_per_warp(_LANES)

type _Register = Float32[Array, "4 32"]
type _Scores = Callable[[Sequence[_Register]], list[_Register]]


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


def _exp_of_negative(product_and_sum: Sequence[str], summand: np.float32) -> list[str]:
    """`y` becomes the exponential of `x` in -87..0, times a power of two, as `_EXP` rounds it.

    Args:
        product_and_sum: `i` becomes the product of `x` and LOG2_E, plus `summand`.
        summand: 1.5 2^23, which leaves the nearest integer n in the lowest bits, plus the exponent
            of the power of two.
    """
    return [
        *product_and_sum,
        f"sub.rn.f32 n, i, {_bits(summand)};",
        f"fma.rn.f32 r, n, {_bits(-scores.LN2_HIGH)}, x;",  # the product is exact
        f"mul.rn.f32 y, n, {_bits(scores.LN2_LOW)};",
        "sub.rn.f32 r, r, y;",
        *_horner("r", scores.EXP, "y"),
        "mul.rn.f32 n, r, r;",
        "mul.rn.f32 y, y, n;",
        "add.rn.f32 y, y, r;",
        f"add.rn.f32 y, y, {_ONE};",
        "mov.b32 e, i;",
        "shl.b32 e, e, 23;",
        "mov.b32 b, y;",
        "add.s32 b, b, e;",
        "mov.b32 y, b;",
    ]


def _quotient(to: str, a: str, b: str, reciprocal: str, scratch: str) -> list[str]:
    """`to` becomes `a / b`: the last steps of `div.rn.f32`, for results that are no denormals."""
    return [
        f"mul.rn.f32 {to}, {a}, {reciprocal};",
        f"neg.f32 {scratch}, {to};",
        f"fma.rn.f32 {scratch}, {scratch}, {b}, {a};",
        f"fma.rn.f32 {to}, {scratch}, {reciprocal}, {to};",
    ]


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
_INTEGER = np.float32(1.5 * 2**23)  # a sum with it is rounded to an integer
QUICK_SQRTSOFTPLUS = np.float32(45)
"""Below this magnitude `PTX_QUICK_SQRTSOFTPLUS` gives the bits of the formula, without branches.

No edge of the exponential and no denormal is near. The product with LOG2_E is fused with the sum
after it: of all numbers in -87..0, ten then round to another n. Four of them are above -45, where
the root has the same bits nevertheless, as every f32 below 45 in magnitude has: all were compared.
"""
# `$2` is the magnitude of `$1`. The exponential comes doubled.
PTX_QUICK_SQRTSOFTPLUS = "\n".join(
    [
        "{",
        *_REGISTERS,
        ".reg .f32 g, h;",
        "neg.f32 x, $2;",
        *_exp_of_negative(
            [f"fma.rn.f32 i, x, {_bits(scores.LOG2_E)}, {_bits(_INTEGER + 1)};"], _INTEGER + 1
        ),
        f"fma.rn.f32 n, y, {_bits(0.5)}, {_bits(2)};",
        # The steps of `div.rn.f32`; r becomes d.
        "rcp.approx.ftz.f32 g, n;",
        "neg.f32 h, n;",
        f"fma.rn.f32 h, h, g, {_ONE};",
        "fma.rn.f32 g, g, h, g;",
        *_quotient("r", "y", "n", "g", "h"),
        "mul.rn.f32 i, r, r;",  # 4 z; the coefficients make up for it
        *_horner("i", [c / 4 ** (4 - k) for k, c in enumerate(scores.ATANH)], "y"),
        "mul.rn.f32 y, i, y;",
        "mul.rn.f32 y, r, y;",
        "add.rn.f32 y, r, y;",
        f"max.f32 x, $1, {_bits(0)};",
        "add.rn.f32 y, x, y;",
        # The steps of `sqrt.rn.f32`.
        "rsqrt.approx.ftz.f32 g, y;",
        "mul.rn.f32 r, y, g;",
        f"mul.rn.f32 h, g, {_bits(0.5)};",
        "neg.f32 n, r;",
        "fma.rn.f32 n, n, r, y;",
        "fma.rn.f32 $0, n, h, r;",
        "}",
    ]
)
_SOFTMAX_EXPONENT = np.float32(60)
# The exponential of `$1`, a logit, less `$2`, the largest of the row, times 2^60; 0 of a NaN.
PTX_SOFTMAX_EXP = "\n".join(
    [
        "{",
        *_REGISTERS,
        "sub.rn.f32 x, $1, $2;",
        "setp.eq.f32 p, $1, $2;",
        f"selp.f32 x, {_bits(0)}, x, p;",  # also where both are infinite
        *_exp_of_negative(
            [
                f"mul.rn.f32 i, x, {_bits(scores.LOG2_E)};",
                f"add.rn.f32 i, i, {_bits(_INTEGER + _SOFTMAX_EXPONENT)};",
            ],
            _INTEGER + _SOFTMAX_EXPONENT,
        ),
        f"setp.ge.f32 p, x, {_bits(-scores.LARGEST_EXPONENT)};",
        f"selp.f32 $0, y, {_bits(0)}, p;",
        "}",
    ]
)
# `$1` is the exponential, `$2` the total and `$3` its reciprocal. The factor of the two keeps the
# remainder of the smallest quotients exact; a denormal becomes 0 at the end.
PTX_SHARE = "\n".join(
    [
        "{",
        ".reg .f32 q, r;",
        *_quotient("q", "$1", "$2", "$3", "r"),
        f"add.rn.ftz.f32 $0, q, {_bits(0)};",
        "}",
    ]
)
PTX_WITHOUT_DENORMALS = f"add.rn.ftz.f32 $0, $1, {_bits(0)};"
_ADD_ACROSS = (
    "{{ .reg .f32 t; shfl.sync.bfly.b32 t, $1, {distance}, 31, -1; add.rn.f32 $0, $1, t; }}"
)


def sigmoid(logits: Sequence[_Register], interpret) -> list[_Register]:
    """`scores.sigmoid` of each."""
    if interpret:
        return [scores.sigmoid(x) for x in logits]
    return [map_registers(PTX_SIGMOID, x, layout=_LAYOUT) for x in logits]


def sqrtsoftplus(logits: Sequence[_Register], interpret) -> list[_Register]:
    """`scores.sqrtsoftplus` of each."""
    if interpret:
        return [scores.sqrtsoftplus(x) for x in logits]
    magnitudes = [jnp.abs(x) for x in logits]
    return map_if_small(
        (PTX_QUICK_SQRTSOFTPLUS, PTX_SQRTSOFTPLUS),
        list(zip(logits, magnitudes, strict=True)),
        tested=magnitudes,
        below=int(QUICK_SQRTSOFTPLUS.view(np.int32)),
        layout=_LAYOUT,
    )


def softmax(
    read: Callable[[int], _Register], num_experts: int, lane: Array, interpret
) -> tuple[_Scores, _Scores]:
    """`scores.softmax` of each row.

    Twice over the logits: the largest, then the sum of the exponentials in the order of
    `scores.tree_sum`. That adds the upper half of the experts to the lower, until 32 are left: a
    tree over registers, taken depth first, so that few live at once. Then lanes add lanes.

    Args:
        read: Logits of the experts `lane + start`; of those from E on any.
        num_experts: E.
        lane: The register that holds each lane's number.
        interpret: The kernel's `interpret` argument.

    Returns:
        `logits -> scores`; and the same for the logits of all experts, a register for each 32,
        with the exponentials that were summed.
    """
    width = max(1, (1 << (num_experts - 1).bit_length()) // _LANES)
    registers = range(-(-num_experts // _LANES))

    def logits(register: int) -> _Register:
        start = register * _LANES
        if start + _LANES <= num_experts:
            return read(start)
        # As a NaN it counts in neither; -inf would be 1 where all are.
        return jnp.where(lane < num_experts - start, read(start), jnp.nan)

    largest_of_lane = functools.reduce(
        lambda a, b: _larger(a, b, interpret), map(logits, registers)
    )
    key = jnp.max(topk.to_key(largest_of_lane), axis=1)
    largest = topk.from_key(topk.across(key, lane.shape))

    def exponential(x: _Register) -> _Register:
        if interpret:
            e = scores.exp(jnp.where(x == largest, jnp.float32(0), x - largest))
            return jnp.where(x != x, jnp.float32(0), e)
        return map_registers(PTX_SOFTMAX_EXP, x, largest, layout=_LAYOUT)

    summed = functools.cache(lambda register: exponential(logits(register)))

    def total(first: int, step: int) -> _Register | None:
        """Of the registers `first`, `first + step`, ...; None where no expert is."""
        if step == width:
            return summed(first) if first in registers else None
        lower, upper = total(first, 2 * step), total(first + step, 2 * step)
        return lower if lower is None or upper is None else lower + upper

    of_lane = total(0, 1)
    assert of_lane is not None
    of_row = _across_lanes(of_lane, interpret)

    def shares(exponentials: Iterable[_Register]) -> list[_Register]:
        if interpret:
            quotients = [divide(e, of_row, layout=_LAYOUT, interpret=True) for e in exponentials]
            return [without_denormals(quotient, interpret) for quotient in quotients]
        # The total is far from denormals, or 0 where all are NaN.
        inverse = map_registers(PTX_RECIPROCAL, of_row, layout=_LAYOUT)
        return [map_registers(PTX_SHARE, e, of_row, inverse, layout=_LAYOUT) for e in exponentials]

    def score(
        logits: Sequence[_Register], exponentials: Iterable[_Register] | None = None
    ) -> list[_Register]:
        found = shares(map(exponential, logits) if exponentials is None else exponentials)
        return [jnp.where(x != x, x, share) for x, share in zip(logits, found, strict=True)]

    return score, lambda logits: score(logits, map(summed, registers))


def _larger(a: _Register, b: _Register, interpret) -> _Register:
    """The larger of each two; of a NaN the other."""
    if interpret:
        return jnp.fmax(a, b)
    return map_registers("max.f32 $0, $1, $2;", a, b, layout=_LAYOUT)


def _across_lanes(x: _Register, interpret) -> _Register:
    """In every lane the sum of the row, lanes at distances of 16, 8, 4, 2 and 1."""
    if interpret:
        return jnp.broadcast_to(scores.tree_sum(x), x.shape)
    for distance in (16, 8, 4, 2, 1):
        x = map_registers(_ADD_ACROSS.format(distance=distance), x, layout=_LAYOUT)
    return x


def without_denormals(x: _Register, interpret) -> _Register:
    """`x`, and +0 for what is below 2^-126 in magnitude, -0 too."""
    if interpret:
        return scores.without_denormals(x)
    return map_registers(PTX_WITHOUT_DENORMALS, x, layout=_LAYOUT)
