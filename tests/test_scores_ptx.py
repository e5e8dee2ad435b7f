"""The PTX of scores, instruction by instruction in NumPy: the bits of `pallas_kernels.scores`."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import scores
from pallas_kernels.mosaic import scores as in_kernels


def run(code, x):
    """Runs straight-line PTX on many numbers at once: `$1` is `x`, `$0` what is returned."""
    registers = {"$1": x}

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
        "mul.rn.f32": lambda a, b: a * b,
        "add.rn.f32": lambda a, b: a + b,
        "sub.rn.f32": lambda a, b: a - b,
        "div.rn.f32": lambda a, b: a / b,
        "sqrt.rn.f32": np.sqrt,
        "cvt.rni.f32.f32": np.rint,
        "cvt.rni.s32.f32": lambda a: np.rint(a).astype(np.int32),
        "shl.b32": lambda a, b: a << b,
        "add.s32": lambda a, b: a + b,
        "setp.lt.f32": lambda a, b: a < b,
        "setp.gt.f32": lambda a, b: a > b,
        "setp.nan.f32": lambda a, b: np.isnan(a) | np.isnan(b),
        "selp.f32": lambda a, b, p: np.where(p, a, b),
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


@pytest.mark.parametrize("name", ["exp", "sigmoid", "sqrtsoftplus"])
def test_the_bits_are_those_of_the_formula(name):
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.standard_normal(4000) * scale for scale in (1e-3, 1, 10, 60)])
    x = np.concatenate([drawn, EDGES, [np.inf, -np.inf, np.nan]]).astype(np.float32)
    with np.errstate(all="ignore"):
        found = run(getattr(in_kernels, f"PTX_{name.upper()}"), x)
    expected = np.asarray(jax.jit(getattr(scores, name))(x))
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found[~is_nan].view(np.uint32), expected[~is_nan].view(np.uint32))


@pytest.mark.parametrize("num_experts", [5, 32, 72, 256, 300])
def test_a_softmax_adds_in_the_order_of_the_formula(num_experts):
    """A row per warp, an expert per lane and register; past the last one anything may stand."""
    logits = np.random.default_rng(1).standard_normal((4, num_experts)).astype(np.float32) * 4
    logits[1, ::3], logits[2], logits[3, 0] = np.nan, -np.inf, np.inf
    width = -(-num_experts // 32) * 32
    padded = np.pad(logits, ((0, 0), (0, width - num_experts)), constant_values=50)
    lane = np.tile(np.arange(32, dtype=np.int32), (4, 1))

    def in_a_kernel(padded):
        def read(start):
            return padded[:, start : start + 32]

        score = in_kernels.softmax(read, num_experts, lane, True)
        return jnp.concatenate([score(read(start)) for start in range(0, width, 32)], axis=1)

    found = np.asarray(jax.jit(in_a_kernel)(padded))[:, :num_experts]
    expected = np.asarray(jax.jit(scores.softmax)(logits))
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found[~is_nan].view(np.uint32), expected[~is_nan].view(np.uint32))
