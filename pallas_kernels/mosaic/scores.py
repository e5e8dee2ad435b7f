"""The formulas of `pallas_kernels.scores` in a kernel, bit for bit: one row of logits per warp.

PTX with every rounding written down, for `ptxas` would fuse a product with the sum after it. In the
interpreter the formulas themselves run.

Registers are `f32[4, 32]` in `layouts.row_per_warp(32)`: an expert per lane.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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


def _fma_horner(x: str, coefficients: Sequence[Any], to: str) -> list[str]:
    """`_horner` with product and sum rounded together."""
    first, *others = map(_bits, coefficients)
    return [f"mov.f32 {to}, {first};", *(f"fma.rn.f32 {to}, {to}, {x}, {c};" for c in others)]


def _decay(exponent: int) -> list[str]:
    """`y` becomes `scores.decay` of `x`, which is no larger than `scores.decay_limit`.

    What counts as 0 comes as an f32 denormal of any size.
    """
    integer = _bits(scores.INTEGER + exponent)
    return [
        f"fma.rn.f32 i, x, {_bits(-scores.LOG2_E)}, {integer};",
        f"sub.rn.f32 n, {integer}, i;",
        f"fma.rn.f32 r, x, {_bits(-scores.LOG2_E)}, n;",
        *_fma_horner("r", scores.EXP2, "y"),
        "mov.b32 e, i;",
        "shl.b32 e, e, 23;",
        "mov.b32 b, y;",
        "add.s32 b, b, e;",
        "mov.b32 y, b;",
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
# `y`, the decay of a number's magnitude, becomes the softplus of that number, `$1`.
_SOFTPLUS_OF_DECAY = [
    *_fma_horner("y", scores.LOG1P, "n"),
    f"max.f32 x, $1, {_bits(0)};",
    "fma.rn.f32 y, y, n, x;",
]
PTX_SQRTSOFTPLUS = "\n".join(
    [
        "{",
        *_REGISTERS,
        "abs.f32 r, $1;",
        f"setp.gt.f32 p, r, {_LARGEST};",
        f"min.f32 x, r, {_LARGEST};",
        *_decay(0),
        f"selp.f32 y, {_bits(0)}, y, p;",
        *_SOFTPLUS_OF_DECAY,
        "sqrt.rn.f32 y, y;",
        "setp.nan.f32 p, $1, $1;",
        "selp.f32 $0, $1, y, p;",
        "}",
    ]
)
QUICK_SQRTSOFTPLUS = np.float32(45)
"""Below this magnitude `PTX_QUICK_SQRTSOFTPLUS` gives the bits of the formula, without branches."""
PTX_QUICK_SQRTSOFTPLUS = "\n".join(
    [
        "{",
        *_REGISTERS,
        "abs.f32 x, $1;",
        *_decay(0),
        *_SOFTPLUS_OF_DECAY,
        # The steps of `sqrt.rn.f32`: no denormal is near.
        "rsqrt.approx.ftz.f32 i, y;",
        "mul.rn.f32 r, y, i;",
        f"mul.rn.f32 i, i, {_bits(0.5)};",
        "neg.f32 n, r;",
        "fma.rn.f32 n, n, r, y;",
        "fma.rn.f32 $0, n, i, r;",
        "}",
    ]
)
# NaN if one is.
PTX_LARGER_MAGNITUDE = "{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.NaN.f32 $0, a, b; }"
# `scores.decay` of `$2`, the largest logit of the row, less the logit `$1`. A NaN counts as -inf.
PTX_SOFTMAX_EXP = "\n".join(
    [
        "{",
        *_REGISTERS,
        "sub.rn.f32 x, $2, $1;",
        "setp.eq.f32 p, $1, $2;",
        f"selp.f32 x, {_bits(0)}, x, p;",  # also where both are infinite
        f"min.f32 x, x, {_bits(scores.decay_limit(scores.SOFTMAX_EXPONENT))};",
        *_decay(scores.SOFTMAX_EXPONENT),
        "mov.f32 $0, y;",
        "}",
    ]
)
# Of f32 denormals, which are 0. No result is one.
PTX_ADD = "add.rn.ftz.f32 $0, $1, $2;"
PTX_MULTIPLY = "mul.rn.ftz.f32 $0, $1, $2;"
PTX_WITHOUT_DENORMALS = f"add.rn.ftz.f32 $0, $1, {_bits(0)};"
_ADD_ACROSS = (
    "{{ .reg .f32 t; shfl.sync.bfly.b32 t, $1, {distance}, 31, -1; add.rn.ftz.f32 $0, $1, t; }}"
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
    larger = functools.partial(map_registers, PTX_LARGER_MAGNITUDE, layout=_LAYOUT)
    return map_if_small(
        (PTX_QUICK_SQRTSOFTPLUS, PTX_SQRTSOFTPLUS),
        [(x,) for x in logits],
        tested=[jnp.abs(functools.reduce(larger, logits))],
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
        from the exponentials that were summed, so that a NaN has the score 0.
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
    summed = functools.cache(lambda register: _exponential(logits(register), largest, interpret))

    def total(first: int, step: int) -> _Register | None:
        """Of the registers `first`, `first + step`, ...; None where no expert is."""
        if step == width:
            return summed(first) if first in registers else None
        lower, upper = total(first, 2 * step), total(first + step, 2 * step)
        return lower if lower is None or upper is None else add(lower, upper, interpret)

    of_lane = total(0, 1)
    assert of_lane is not None
    of_row = _across_lanes(of_lane, interpret)
    if interpret:
        inverse = divide(jnp.ones_like(of_row), of_row, layout=_LAYOUT, interpret=True)
    else:  # the total is far from denormals, or 0 where all are NaN
        inverse = map_registers(PTX_RECIPROCAL, of_row, layout=_LAYOUT)

    def score(logits: Sequence[_Register]) -> list[_Register]:
        exponentials = [_exponential(x, largest, interpret) for x in logits]
        shares = [_multiply(e, inverse, interpret) for e in exponentials]
        return [jnp.where(x != x, x, share) for x, share in zip(logits, shares, strict=True)]

    return score, lambda _: [_multiply(summed(r), inverse, interpret) for r in registers]


def softmax_of_best(logits: Sequence[_Register], largest: _Register, interpret) -> list[_Register]:
    """A softmax but for a factor of the row, whose largest logit is known."""
    shares = [without_denormals(_exponential(x, largest, interpret), interpret) for x in logits]
    return [jnp.where(x != x, x, share) for x, share in zip(logits, shares, strict=True)]


def _exponential(x: _Register, largest: _Register, interpret) -> _Register:
    """What a logit adds to the total of its row."""
    if interpret:
        distance = jnp.where(x == largest, jnp.float32(0), largest - x)
        return scores.decay(distance, scores.SOFTMAX_EXPONENT)
    return map_registers(PTX_SOFTMAX_EXP, x, largest, layout=_LAYOUT)


def add(a: _Register, b: _Register, interpret) -> _Register:
    """The sum of two exponentials, or of a score and a bias; no result but 0 is near a denormal."""
    if interpret:
        return scores.without_denormals(a + b)
    return map_registers(PTX_ADD, a, b, layout=_LAYOUT)


def _multiply(a: _Register, b: _Register, interpret) -> _Register:
    return a * b if interpret else map_registers(PTX_MULTIPLY, a, b, layout=_LAYOUT)


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
