"""Routing and rows in one launch: the bits of the launches that it stands for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe.backends import in_precision
from jax_moe.numerics import scaled_f16
from pallas_kernels.mosaic import group_quant, routing, routing_and_rows
from pallas_kernels.mosaic.hopper import widened
from pallas_kernels.types import Quantized
from tests.backend_cases import running, slow
from tests.moe_inputs import E4M3, SMALL, bits, make_inputs
from tests.test_kernels_interpreted import OVERLAPPING_ROWS, run

GROUPS = {"top_k": 4, "n_group": 4, "topk_group": 2}
# The last rows of an odd count of groups, as in the quantizer; their scales are stored one by one.
OVERLAPPING = OVERLAPPING_ROWS | {"_store_one_by_one.<locals>._element.<locals>._store"}
DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}


def hidden_states(kind, num_tokens, hidden_size):
    """Rows of every size with each corner case, and their scales."""
    rng = np.random.default_rng(num_tokens)
    x = rng.standard_normal((num_tokens, hidden_size), np.float32)
    if kind == "e4m3":
        numbers = np.arange(256, dtype=np.uint8).view(E4M3)
        x = rng.choice(numbers, x.shape)
        return x, rng.uniform(0.5, 2, (hidden_size // 128, num_tokens)).astype(np.float32)
    if kind != "f16":
        x *= np.float32(10) ** rng.integers(-36, 36, (num_tokens, 1))
    x[0, :128] = 0
    x[0, 128:132] = 447.9, -0.0, 464, 1e-40
    x[-1, -1] = jnp.finfo(DTYPES[kind]).max
    if num_tokens > 3:
        x[1, 5], x[2, 7], x[2, 200], x[3, 130] = np.inf, np.nan, 3, -np.inf
    return x.astype(DTYPES[kind]), None


def expected_rows(x, scale, scale_format, precision, interpret):
    if scale is not None:
        rows = in_precision(Quantized(x, scale), precision)
    elif precision == "high":
        rows = Quantized(*scaled_f16(x))
    else:
        rows = group_quant.quantize(x, scale_format=scale_format, interpret=interpret)
    if precision == "high" and interpret is None:
        rows = rows._replace(values=widened.wgmma_order(rows.values))
    return rows


def assert_same(found, expected):
    """Bit for bit, but for the many bits of a NaN."""
    for part, other in zip(found, expected, strict=True):
        assert part.dtype == other.dtype
        is_nan = np.isnan(np.asarray(other, np.float32))
        np.testing.assert_array_equal(np.isnan(np.asarray(part, np.float32)), is_nan)
        np.testing.assert_array_equal(bits(part)[~is_nan], bits(other)[~is_nan])


def routed(num_tokens, num_experts):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((num_tokens, num_experts), np.float32)
    return logits, rng.standard_normal(num_experts).astype(ml_dtypes.bfloat16), np.float32(2.5)


KINDS = [
    ("bf16", "fast", "f32"),
    slow("f16", "fast", "f32"),
    slow("f32", "fast", "f32"),
    slow("f32", "fast", "ue8m0"),
    slow("bf16", "fast", "ue8m0"),
    slow("f16", "fast", "ue8m0"),
    slow("e4m3", "high", "f32"),
    slow("bf16", "high", "f32"),
    slow("f16", "high", "f32"),
    ("f32", "high", "f32"),
]


@pytest.mark.parametrize(("kind", "precision", "scale_format"), KINDS)
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(9, 256), slow(1, 640), slow(5, 384)])
def test_interpreted(kind, precision, scale_format, num_tokens, hidden_size):
    """An odd count of groups in blocks of sixteen, and fewer groups than that."""
    x, scale = hidden_states(kind, num_tokens, hidden_size)
    given = routed(num_tokens, 32)
    options = {"precision": precision, "scale_format": scale_format}
    prepare = functools.partial(routing_and_rows.route_and_prepare, **GROUPS, **options)
    chosen, rows = run(prepare, *given, x, scale, known_races=OVERLAPPING)
    assert_same(chosen, run(routing.route, *given, **GROUPS))

    def expected(x, scale, interpret):
        return expected_rows(x, scale, scale_format, precision, interpret)

    assert_same(rows, run(expected, x, scale, known_races=OVERLAPPING))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "precision", "scale_format"), KINDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 16, 80, 256])
def test_on_a_gpu(kind, precision, scale_format, num_tokens):
    x, scale = hidden_states(kind, num_tokens, 7168)
    given = routed(num_tokens, 256)
    groups = jax_moe.DEEPSEEK_V3.routing_options
    options = {"precision": precision, "scale_format": scale_format}
    with running("mosaic"):
        prepare = functools.partial(routing_and_rows.route_and_prepare, **groups, **options)
        chosen, rows = jax.jit(prepare)(*given, x, scale)
        assert_same(chosen, jax.jit(functools.partial(routing.route, **groups))(*given))
        expected = jax.jit(lambda x, s: expected_rows(x, s, scale_format, precision, None))
        assert_same(rows, expected(x, scale))


@pytest.mark.parametrize(
    ("shape", "kind", "precision", "expected"),
    [
        ((1, 7168), "e4m3", "fast", False),  # nothing to prepare
        ((1, 7168), "e4m3", "high", True),
        ((1, 7168), "bf16", "fast", True),
        ((1, 384), "bf16", "fast", False),  # fewer groups than a block has warps
        ((1, 512), "f32", "high", True),
        ((routing_and_rows.MAX_TOKENS, 256), "bf16", "high", True),
        ((routing_and_rows.MAX_TOKENS + 1, 256), "bf16", "high", False),
        ((0, 256), "bf16", "fast", False),
    ],
)
def test_when_rows_are_prepared(shape, kind, precision, expected):
    x = jax.ShapeDtypeStruct(shape, E4M3 if kind == "e4m3" else DTYPES[kind])
    has_rows = routing_and_rows.has_rows_to_prepare(x, kind == "e4m3", precision)
    assert has_rows == expected


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [("bf16", "fast"), ("e4m3", "high")])
def test_the_layer_is_that_of_the_routed_rows(kind, precision):
    """`apply_routed` prepares them in a launch of their own."""
    inputs = make_inputs(9)
    if kind != "e4m3":
        x = np.random.default_rng(5).standard_normal((9, 256)).astype(DTYPES[kind])
        inputs = inputs._replace(hidden_states=x, hidden_states_scale=None)
    with running("interpreted_mosaic") as backend:
        on_it = {"backend": backend, "precision": precision}
        whole = jax_moe.apply(*inputs.arguments, config=SMALL, **on_it)
        chosen = jax_moe.route(
            inputs.routing_logits,
            inputs.routing_bias,
            inputs.routed_scaling_factor,
            config=SMALL,
            backend=backend,
        )
        routed_inputs = inputs.routed(chosen)
        out = jax_moe.apply_routed(*routed_inputs.arguments, num_experts=32, **on_it)
    np.testing.assert_array_equal(bits(whole), bits(out))
