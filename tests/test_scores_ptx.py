"""The PTX of scores, instruction by instruction in NumPy: the bits of `pallas_kernels.scores`."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import scores
from pallas_kernels.mosaic import routing
from pallas_kernels.mosaic import scores as in_kernels
from tests.backend_cases import slow
from tests.fused import fma


def approximate(function, ulp):
    """An instruction that is some ulp off the correctly rounded result, which it need not find."""

    def operation(a):
        exact = function(a.astype(np.float64)).astype(np.float32)
        return np.where(
            np.isfinite(exact) & (exact != 0), (exact.view(np.int32) + ulp).view(np.float32), exact
        )

    return operation


def flushed(x):
    return np.where(np.abs(x) < scores.SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def run(code, *operands, ulp=0):
    """Runs straight-line PTX on many numbers at once: `$1`, ... are `operands`, `$0` is returned.

    What is approximate comes out `ulp` off.
    """
    x = np.asarray(operands[0])
    registers = {f"${i}": np.asarray(operand) for i, operand in enumerate(operands, 1)}

    def value(name):
        if name.startswith("0f"):
            return np.uint32(int(name[2:], 16)).view(np.float32)
        return registers[name] if name in registers else np.int32(int(name))

    def number_of(a, b, pick):
        """PTX takes the other where one is no number."""
        return np.where(np.isnan(a), b, np.where(np.isnan(b), a, pick(a, b)))

    operations = {
        "mov.f32": lambda a: a,
        "mov.b32": lambda a: a.view(np.int32 if a.dtype == np.float32 else np.float32),
        "neg.f32": lambda a: -a,
        "abs.f32": np.abs,
        "min.f32": lambda a, b: number_of(a, b, np.minimum),
        "max.f32": lambda a, b: number_of(a, b, np.maximum),
        "max.NaN.f32": np.maximum,
        "mul.rn.f32": lambda a, b: a * b,
        "add.rn.f32": lambda a, b: a + b,
        "add.rn.ftz.f32": lambda a, b: flushed(flushed(a) + flushed(b)),
        "mul.rn.ftz.f32": lambda a, b: flushed(flushed(a) * flushed(b)),
        "sub.rn.f32": lambda a, b: a - b,
        "fma.rn.f32": fma,
        "rcp.approx.ftz.f32": approximate(lambda a: 1 / a, ulp),
        "rsqrt.approx.ftz.f32": approximate(lambda a: 1 / np.sqrt(a), ulp),
        "div.rn.f32": lambda a, b: a / b,
        "sqrt.rn.f32": np.sqrt,
        "cvt.rni.f32.f32": np.rint,
        "cvt.rni.s32.f32": lambda a: np.rint(a).astype(np.int32),
        "shl.b32": lambda a, b: a << b,
        "add.s32": lambda a, b: a + b,
        "setp.lt.f32": lambda a, b: a < b,
        "setp.gt.f32": lambda a, b: a > b,
        "setp.ge.f32": lambda a, b: a >= b,
        "setp.eq.f32": lambda a, b: a == b,
        "setp.nan.f32": lambda a, b: np.isnan(a) | np.isnan(b),
        "selp.f32": lambda a, b, p: np.where(p, a, b),
        "shfl.sync.idx.b32": lambda a, i, *_: np.take_along_axis(a, i & 31, axis=1),
        "shfl.sync.bfly.b32": lambda a, distance, *_: a[:, np.arange(32) ^ distance],
    }
    for statement in code.strip("{}").split(";"):
        if not (text := statement.strip()) or text.startswith(".reg"):
            continue
        operation, to, *given = re.split(r",?\s+", text)
        registers[to] = np.broadcast_to(operations[operation](*map(value, given)), x.shape)
        if operation.endswith("f32") and not operation.startswith(("setp", "cvt.rni.s32")):
            assert registers[to].dtype == np.float32, text
    return registers["$0"]


EDGES = [0.0, -0.0, 87, -87, 88, -88, 87.5, -87.5, 1e-40, -1e-40, 1e30, -1e30, 3e38]


def same_bits(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found[~is_nan].view(np.uint32), expected[~is_nan].view(np.uint32))


@pytest.fixture
def emulated(monkeypatch):
    """Lets the kernel's functions run the PTX here; the list it returns holds the ulp."""
    ulps = [0]

    def map_registers(code, *operands, layout):
        with np.errstate(all="ignore"):
            return run(code, *operands, ulp=ulps[0])

    def map_if_small(codes, operands, *, tested, below, layout):
        largest = np.max([np.asarray(x).view(np.uint32) for x in tested], axis=0)
        branches = [[map_registers(c, *each, layout=layout) for each in operands] for c in codes]
        return [np.where(largest < below, a, b) for a, b in zip(*branches, strict=True)]

    monkeypatch.setattr(in_kernels, "map_registers", map_registers)
    monkeypatch.setattr(routing, "map_registers", map_registers)
    monkeypatch.setattr(in_kernels, "map_if_small", map_if_small)
    return ulps


@pytest.mark.parametrize("name", ["sigmoid", "sqrtsoftplus"])
def test_the_bits_are_those_of_the_formula(name):
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.standard_normal(4000) * scale for scale in (1e-3, 1, 10, 60)])
    x = np.concatenate([drawn, EDGES, [np.inf, -np.inf, np.nan]]).astype(np.float32)
    with np.errstate(all="ignore"):
        found = run(getattr(in_kernels, f"PTX_{name.upper()}"), x)
    same_bits(found, jax.jit(getattr(scores, name))(x))


@pytest.mark.parametrize("ulp", [-1, 0, 1])
def test_the_quick_steps_of_sqrtsoftplus(emulated, ulp):
    """Numbers next to half of an odd integer over LOG2_E are where another n is near."""
    emulated[0] = ulp
    rng = np.random.default_rng(2)
    drawn = np.concatenate([rng.standard_normal(20000) * scale for scale in (1e-3, 1, 4, 16)])
    halves = ((np.arange(66) + 0.5) / np.float64(scores.LOG2_E)).astype(np.float32)
    near = (halves.view(np.int32)[:, None] + np.arange(-4, 5)).ravel().view(np.float32)
    limit = np.nextafter(in_kernels.QUICK_SQRTSOFTPLUS, np.float32([0, 99]))
    inside = np.concatenate([near, -near, drawn, limit, -limit, [0, -0.0, 1e-40, -1e-40, 45, -45]])
    inside = inside[: len(inside) // 32 * 32].astype(np.float32).reshape(-1, 32)
    outside = np.resize(np.float32([*EDGES, np.inf, -np.inf, np.nan]), (16, 32))
    for x in (inside, outside):
        (found,) = in_kernels.sqrtsoftplus([jnp.asarray(x)], None)
        same_bits(found, jax.jit(scores.sqrtsoftplus)(x))
    first, second = in_kernels.sqrtsoftplus([jnp.asarray(inside[:16]), jnp.asarray(outside)], None)
    same_bits(first, jax.jit(scores.sqrtsoftplus)(inside[:16]))
    same_bits(second, jax.jit(scores.sqrtsoftplus)(outside))


@pytest.mark.parametrize("interpret", [True, None])
@pytest.mark.parametrize("num_experts", [5, slow(32), 72, slow(256), 300])
def test_a_softmax_has_the_bits_of_the_formula(emulated, num_experts, interpret):
    """A row per warp, an expert per lane and register; past the last one anything may stand."""
    rng = np.random.default_rng(1)
    lane = np.tile(np.arange(32, dtype=np.int32), (4, 1))
    spreads = np.repeat(np.float32([0.1, 4, 60]), 8)
    logits = rng.standard_normal((24, num_experts), np.float32) * spreads[:, None]
    logits[1, ::3], logits[2], logits[3, 0], logits[5] = np.nan, -np.inf, np.inf, np.nan
    logits[6, 1:], logits[7, 1:3] = -np.inf, [-0.0, 0.0]
    logits[8, 1] = logits[8].max() - np.float32(87)
    expected = np.asarray(jax.jit(scores.softmax)(logits))
    padding = -num_experts % 32
    padded = np.pad(logits, ((0, 0), (0, padding)), constant_values=50)
    for row in range(0, len(logits), 4):
        wanted = expected[row : row + 4]
        registers = np.split(padded[row : row + 4], padded.shape[1] // 32, axis=1)
        numbers = ~np.isnan(wanted)
        registers = [jnp.asarray(register) for register in registers]
        score, of_all = in_kernels.softmax(
            functools.partial(lambda registers, start: registers[start // 32], registers),
            num_experts,
            lane,
            interpret,
        )
        found = np.concatenate(score(registers), axis=1)[:, :num_experts]
        same_bits(found, wanted)
        of_numbers = np.concatenate(of_all(registers), axis=1)[:, :num_experts][numbers]
        same_bits(of_numbers, wanted[numbers])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("interpret", [True, None])
def test_a_softmax_without_its_total(emulated, interpret):
    rng = np.random.default_rng(3)
    logits = np.sort(rng.uniform(-80, 80, (4, 32)).astype(np.float32), axis=1)[:, ::-1]
    logits[1, 3], logits[2, 0], logits[3, 9:] = np.nan, np.inf, -np.inf
    largest = np.repeat(logits[:, :1], 32, axis=1)
    (found,) = in_kernels.softmax_of_best([jnp.asarray(logits)], jnp.asarray(largest), interpret)
    distance = np.where(logits == largest, np.float32(0), largest - logits)
    expected = jax.jit(functools.partial(scores.decay, exponent=scores.SOFTMAX_EXPONENT))(distance)
    same_bits(found, np.where(np.isnan(logits), logits, expected))
    assert (np.asarray(found)[3, 9:] == 0).all()
    assert (np.asarray(found)[0] == 0).any()


def test_denormals_and_minus_zero_become_zero():
    x = np.float32([1e-40, -1e-40, -0.0, 0, 2**-126, -(2**-126), -1, np.inf, -np.inf, np.nan])
    found = run(in_kernels.PTX_WITHOUT_DENORMALS, x)
    same_bits(found, np.float32([0, 0, 0, 0, *x[4:]]))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("interpret", [True, None])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_chosen_scores_come_from_the_lanes_that_hold_them(count, interpret):
    rng = np.random.default_rng(4)
    values = rng.standard_normal((4, 32 * count), np.float32)
    ids = rng.integers(0, 32 * count, (4, 32)).astype(np.int32)
    registers = [jnp.asarray(register) for register in np.split(values, count, axis=1)]
    found = routing._pick(registers, jnp.asarray(ids), None, interpret)
    same_bits(found, np.take_along_axis(values, ids, axis=1))
