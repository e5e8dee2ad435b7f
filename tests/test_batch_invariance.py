"""`batch_invariant=True`: a token's bits are the same in any batch, on every backend."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import nn
from jax_moe.backends import mosaic, xla
from jax_moe.numerics import matmul, matmul_in_tiles
from jax_moe.types import GroupPlan, Quantized, RoutedInputs, Routing
from pallas_kernels.mosaic import tilings
from pallas_kernels.tuning.table_format import Pair
from tests import h100_target, numpy_oracle, test_nn
from tests.backend_cases import running
from tests.moe_inputs import (
    E4M3,
    SMALL,
    array_arguments,
    bits,
    make_inputs,
    rank_specs,
    scalar_arguments,
)

MOST = 130
COUNTS = (1, 16, 17, 64, MOST)
HIDDEN, INTERMEDIATE = 512, 256
PRECISIONS = ("fast", "high")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# ---- what any backend promises, on one that runs here ----


@functools.cache
def routed_inputs(kind: str, experts: str) -> RoutedInputs:
    """130 tokens of 32 experts, 8 of them local; "skewed" sends all but a few to one expert."""
    inputs = make_inputs(MOST, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((MOST, 32)), axis=1)[:, :4].astype(np.int32)
    if experts == "skewed":
        ids[:, 0], ids[:, 1:] = 9, np.where(rng.random((MOST, 3)) < 0.9, -1, ids[:, 1:])
        ids[:, 1:][ids[:, 1:] == 9] = -1
    weights = rng.random((MOST, 4), np.float32)
    rows = inputs.hidden_states, inputs.hidden_states_scale
    if kind == "bf16":
        rows = rng.standard_normal((MOST, HIDDEN), np.float32).astype(ml_dtypes.bfloat16), None
    return RoutedInputs(*rows, inputs.weights, Routing(ids, weights), 8)


def taken(inputs: RoutedInputs, tokens: Any) -> RoutedInputs:
    """The same tokens, in that order."""
    scale = inputs.hidden_states_scale
    return inputs._replace(
        hidden_states=inputs.hidden_states[tokens],
        hidden_states_scale=None if scale is None else np.ascontiguousarray(scale[:, tokens]),
        routing=Routing(*(array[tokens] for array in inputs.routing)),
    )


def invariant(**options: Any) -> Callable[..., np.ndarray]:
    call = functools.partial(jax_moe.apply_routed, num_experts=32, batch_invariant=True, **options)
    return lambda inputs, **more: bits(call(*inputs.arguments, **more))


def test_a_token_has_its_bits_alone_and_among_others():
    inputs, layer = taken(routed_inputs("e4m3", "even"), np.arange(64)), invariant(backend="xla")
    whole = layer(inputs)
    for tokens in (np.array([33]), np.arange(64)[::-1]):
        assert whole[tokens].any()
        np.testing.assert_array_equal(layer(taken(inputs, tokens)), whole[tokens])


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("kind", "experts"), [("e4m3", "even"), ("bf16", "skewed"), ("e4m3", "skewed")]
)
def test_a_token_has_its_bits_in_any_batch(precision, kind, experts):
    inputs, layer = routed_inputs(kind, experts), invariant(backend="xla", precision=precision)
    whole = layer(inputs)
    assert whole.any(axis=1).sum() > MOST / 2
    rng = np.random.default_rng(7)
    for count in COUNTS:
        for tokens in (np.arange(MOST)[-count:], rng.permutation(MOST)[:count]):
            np.testing.assert_array_equal(layer(taken(inputs, tokens)), whole[tokens])
    # Neighbours of all kinds, and rows that are not live.
    broken = np.asarray(inputs.hidden_states).copy()
    broken[17:] = np.nan
    poisoned = inputs._replace(hidden_states=broken)
    np.testing.assert_array_equal(layer(poisoned)[:17], whole[:17])
    np.testing.assert_array_equal(layer(poisoned, num_tokens=17)[:17], whole[:17])
    crowded = inputs._replace(routing=inputs.routing._replace(topk_ids=others(inputs, 40)))
    np.testing.assert_array_equal(layer(crowded)[40], whole[40])
    for rows in (0.5, 300.0):
        np.testing.assert_array_equal(layer(inputs, expected_rows=rows), whole)


def test_the_weights_of_a_router():
    """Without the option XLA adds a token's scores in another order where T is large."""
    logits = np.random.default_rng(0).standard_normal((2048, 32), np.float32)
    route = functools.partial(jax_moe.route, config=SMALL, backend="xla", batch_invariant=True)
    whole = bits(route(logits, None, 2.5).topk_weights)
    few = bits(route(logits[-33:], None, 2.5).topk_weights)
    np.testing.assert_array_equal(few, whole[-33:])


def test_the_sum_over_a_tokens_experts():
    """Without the option XLA fuses products and sums of two tokens, at this width."""
    rng = np.random.default_rng(0)
    rows, weights = rng.standard_normal((64, 7168), np.float32), rng.random((17, 8), np.float32)
    pair_row = rng.integers(-1, 64, (17, 8)).astype(np.int32)

    # At XLA's own level: at the lowest, which `make test` has, it fuses nothing.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def unpermute(weights, pair_row):
        empty = jnp.zeros(1, jnp.int32)
        plan = GroupPlan(empty, empty, empty, pair_row, empty, empty)
        options = {"batch_invariant": True, "output_dtype": "float32"}
        return xla.unpermute(rows, weights, plan, **options)

    whole = bits(unpermute(weights, pair_row))
    for count in (1, 2):
        np.testing.assert_array_equal(
            bits(unpermute(weights[:count], pair_row[:count])), whole[:count]
        )


def others(inputs: RoutedInputs, token: int) -> np.ndarray:
    """Expert ids with which all other tokens go to the first expert of that one."""
    ids = np.full_like(inputs.routing.topk_ids, -1)
    ids[:, 0] = inputs.routing.topk_ids[token].max()
    ids[token] = inputs.routing.topk_ids[token]
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_jitted_or_eager_with_the_router(precision):
    inputs = make_inputs(MOST)
    layer = functools.partial(
        jax_moe.apply, config=SMALL, backend="xla", precision=precision, batch_invariant=True
    )
    whole = bits(layer(*inputs.arguments))
    for count in (1, 17, MOST):
        few = inputs._replace(
            routing_logits=inputs.routing_logits[:count],
            hidden_states=inputs.hidden_states[:count],
            hidden_states_scale=inputs.hidden_states_scale[:, :count],
        )
        for function in (layer, jax.jit(layer)):
            np.testing.assert_array_equal(bits(function(*few.arguments)), whole[:count])


def test_the_products_of_gates_have_one_shape():
    rng = np.random.default_rng(0)
    x, gate = (rng.standard_normal((n, 384), np.float32) for n in (MOST, 9))
    whole = bits(jax.jit(matmul_in_tiles)(x, gate))
    np.testing.assert_allclose(whole.view(np.float32), x @ gate.T, rtol=1e-4, atol=1e-4)
    for count in (0, 1, 17, 128):
        np.testing.assert_array_equal(
            bits(jax.jit(matmul_in_tiles)(x[:count], gate)), whole[:count]
        )
    # XLA takes another algorithm for one row.
    assert (bits(jax.jit(matmul)(x[:1], gate)) != bits(jax.jit(matmul)(x, gate))[:1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_the_whole_layer(fused):
    params, x = test_nn.make(), test_nn.hidden(MOST)
    if fused:
        params = nn.fuse_shared(params, test_nn.CONFIG)
    layer = functools.partial(
        nn.moe_layer, params, config=test_nn.CONFIG, backend="xla", batch_invariant=True
    )
    whole = bits(layer(x))
    for count in (1, 17):
        np.testing.assert_array_equal(bits(layer(x[:count])), whole[:count])
        np.testing.assert_array_equal(bits(jax.jit(layer)(x[-count:])), whole[-count:])
    np.testing.assert_array_equal(bits(jax.vmap(layer)(x[:6].reshape(3, 2, -1)))[1], whole[2:4])


# ---- the order of sums in the Mosaic kernels ----


def split(config, steps):
    return dataclasses.replace(config, scheduler="static", split_k_steps=steps)


@pytest.fixture
def a_table_that_splits(monkeypatch):
    """Small K in two segments, where tiles have 16 rows: as the shipped one does with large K."""
    shipped = tilings.table

    def table(*sizes):
        return {
            block_m: Pair(*(split(config, 2 if block_m == 16 else None) for config in pair))
            for block_m, pair in shipped(*sizes).items()
        }

    monkeypatch.setattr(tilings, "table", table)


def rows_of_down_projection(expected_rows, precision, batch_invariant):
    """f32 or bf16[T,H] of five tokens, an expert each; four steps of K."""
    rng = np.random.default_rng(0)
    inputs = make_inputs(1, num_local_experts=2, hidden_size=128, intermediate_size=512)
    ids = rng.integers(0, 2, (5, 1)).astype(np.int32)
    values, scales = numpy_oracle.quantize(rng.standard_normal((5, 512), np.float32))
    options = {"backend": "mosaic", "batch_invariant": batch_invariant}
    with running("interpreted_mosaic"):
        plan = jax_moe.plan_groups(
            ids,
            0,
            num_local_experts=2,
            num_experts=2,
            expected_rows=expected_rows,
            precision=precision,
            **options,
        )
        pair_row = np.asarray(plan.pair_row)[:, 0]
        row_token = np.zeros(plan.row_token.shape[0], np.int32)
        row_token[pair_row] = np.arange(5)
        dtype = E4M3 if precision == "fast" else np.float16
        rows = Quantized(values[row_token].astype(dtype), scales[:, row_token])
        weights = inputs.weights.gemm2_weights, inputs.weights.gemm2_weights_scale
        return bits(jax_moe.down_project(rows, *weights, plan, **options))[pair_row]


@pytest.mark.slow
def test_segments_change_the_order_of_sums(a_table_that_splits):
    """In f32, which bf16 mostly hides; without the option the tiles of 16 rows sum in segments."""
    few, many = (rows_of_down_projection(n, "high", False) for n in (2.0, 20.0))
    assert (few != many).mean() > 0.1
    for rows in (2.0, 20.0):
        np.testing.assert_array_equal(rows_of_down_projection(rows, "high", True), many)
    few, many = (rows_of_down_projection(n, "fast", True) for n in (2.0, 100.0))
    np.testing.assert_array_equal(few, many)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_layer_in_the_interpreter(a_table_that_splits, precision):
    """Tiles of 16 and of 64 rows, tokens that move."""
    inputs, layer = routed_inputs("bf16", "even"), invariant(backend="mosaic", precision=precision)
    tokens = np.array([40, 3, 77, 8, 21])
    with running("interpreted_mosaic"):
        found = layer(taken(inputs, tokens), expected_rows=2.0)
        again = layer(taken(inputs, tokens[[1, 4, 0]]), expected_rows=20.0)
    np.testing.assert_array_equal(again, found[[1, 4, 0]])


def on_hopper(**options: Any) -> Callable[..., jax.Array]:
    """The layer of DeepSeek-V3's rank, to be traced or compiled."""

    def layer(*arrays):
        with jax_moe.assume_device("sm_90"):
            return jax_moe.apply(*arrays, **options)

    return layer


def program_of(num_tokens: int, **options: Any) -> str:
    return str(jax.make_jaxpr(on_hopper(**options))(*rank_specs(num_tokens).arguments))


def test_no_tile_of_mosaic_is_split():
    """Traced for Hopper at DeepSeek-V3's sizes, where partial sums are an output of the kernels."""
    partial_sums = re.compile(r"f32\[132,[24],2,2,64,16\]")
    assert len(set(partial_sums.findall(program_of(1, backend="mosaic")))) == 2
    assert not partial_sums.findall(program_of(1, backend="mosaic", batch_invariant=True))


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [2048, 14107])
def test_mosaic_has_nothing_to_change_where_rows_are_many(num_tokens):
    default = program_of(num_tokens, backend="mosaic")
    assert program_of(num_tokens, backend="mosaic", batch_invariant=True) == default


def test_a_tuned_table_does_not_split_either():
    for block_m in tilings.KERNELS.block_ms:
        config = split(tilings.table(7168, 2048, 32)[block_m].up_projection, 7)
        assert config.segments(56) == 8
        assert mosaic._adapted(config, batch_invariant=True).segments(56) == 1
        assert mosaic._adapted(config, batch_invariant=False) == config


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_form_of_a_tile_adds_the_same_way(precision):
    """Of each accumulator: one fused multiply-add per 128 columns of K, and no other addition.

    A form that rounded products on their own, or summed otherwise, would give other bits.
    """
    widths = {"fast": {}, "high": {}}
    widths["fast"] = {1: (16,), 901: (16, 32, 48, 64), 4096: (32, 64, 96, 128)}
    widths["high"] = {1: (16,), 4096: (16, 32, 48, 64)}
    for num_tokens, forms in widths[precision].items():
        layer = on_hopper(backend="mosaic", precision=precision, batch_invariant=True)
        ptx = h100_target.ptx_for_h100(layer, *rank_specs(num_tokens).arguments)
        activations = sum(forms) // 2  # of a thread; a thread has two sums for each
        for name, additions in (("up", activations), ("down", 0)):
            code = ptx[f"moe_{name}_projection"]
            assert code.count("fma.rn.f32") == 2 * activations, (num_tokens, name)
            assert code.count("add.f32") == additions, (num_tokens, name)  # of 1 + exp(-gate)
        unpermute = ptx.get("moe_unpermute") or ptx["moe_unpermute_local"]
        assert "add.f32" not in unpermute
        assert unpermute.count("fma.rn.f32") % 8 == 0


# ---- one program of the Triton backend ----


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_triton_has_one_program_for_any_number_of_tokens(precision):
    pytest.importorskip("jax_triton")
    layer = on_hopper(backend="triton", precision=precision, batch_invariant=True)
    one, few, many = (
        h100_target.ptx_for_h100(layer, *rank_specs(count).arguments) for count in (1, 2, 14107)
    )
    arithmetic = re.compile(r"\t(wgmma\S+|\S+\.f32\S*|\S+e4m3\S*)[ \t]")
    names = ("routing_kernel", "up_projection_kernel", "down_projection_kernel", "unpermute_kernel")
    for name in names:
        assert few[name] == many[name]
        # A stride of 1 is a constant.
        assert arithmetic.findall(one[name]) == arithmetic.findall(many[name])


# ---- the option ----


@pytest.mark.parametrize("backend", ["xla", slow("triton"), slow("mosaic")])
def test_false_is_the_default(backend):
    inputs = make_inputs(3)

    def program(**options):
        def layer(*arrays):
            scalars = scalar_arguments(inputs)
            return jax_moe.apply(*arrays, *scalars, config=SMALL, backend=backend, **options)

        with jax_moe.assume_device("sm_90"):
            return str(jax.make_jaxpr(layer)(*array_arguments(inputs)))

    default = program()
    assert program(batch_invariant=False) == default
    if backend != "mosaic":  # which does not split so small a K
        assert program(batch_invariant=True) != default


def test_what_is_no_bool_is_refused_by_name():
    message = r"batch_invariant: expected a bool, got 1 \(int\)"
    inputs = make_inputs(2)
    ids, weights = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
    with pytest.raises(TypeError, match=message):
        jax_moe.apply(*inputs.arguments, config=SMALL, batch_invariant=1)
    routed = (inputs.hidden_states, inputs.hidden_states_scale, *inputs.weights, ids, weights, 8)
    with pytest.raises(TypeError, match=message):
        jax_moe.apply_routed(*routed, num_experts=32, batch_invariant=1)
    sizes = {"num_local_experts": 8, "num_experts": 32}
    with pytest.raises(TypeError, match=message):
        jax_moe.plan_groups(ids, 0, **sizes, batch_invariant=1)
    plan = jax_moe.plan_groups(ids, 0, **sizes, backend="xla", batch_invariant=np.True_)
    assert plan.block_m == 128
    gemm1 = inputs.weights.gemm1_weights, inputs.weights.gemm1_weights_scale
    with pytest.raises(TypeError, match=message):
        jax_moe.up_project(*routed[:2], *gemm1, plan, batch_invariant=1)
    rows = Quantized(jnp.zeros((256, 128), E4M3), jnp.ones((1, 256)))
    gemm2 = inputs.weights.gemm2_weights, inputs.weights.gemm2_weights_scale
    with pytest.raises(TypeError, match=message):
        jax_moe.down_project(rows, *gemm2, plan, batch_invariant=1)
    with pytest.raises(TypeError, match=message):
        jax_moe.unpermute(jnp.zeros((256, 256)), weights, plan, batch_invariant=1)
    with pytest.raises(TypeError, match=message):
        jax_moe.route(inputs.routing_logits, None, 1.0, config=SMALL, batch_invariant=1)
    with pytest.raises(TypeError, match=message):
        nn.moe_layer(test_nn.make(), test_nn.hidden(2), config=test_nn.CONFIG, batch_invariant=1)
