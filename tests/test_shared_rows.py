"""Shared experts, which every token takes: their rows are read where the tokens are.

In the interpreter, with tiles of 128 rows; tokens are more than a tile, and no multiple of one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import entry, nn, stages
from jax_moe.backends import mosaic
from jax_moe.types import GroupPlan, LayerWeights, Quantized
from pallas_kernels.mosaic import permute
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig
from pallas_kernels.mosaic.hopper.up_projection import up_projection
from tests.backend_cases import EVERYWHERE, running, slow
from tests.moe_inputs import bits, make_inputs
from tests.test_kernels_interpreted import E4M3, SCALES_OF_A_REUSED_SLOT, run, weights

BLOCK_M = 128
CONFIG = nn.LayerConfig(
    jax_moe.MoEConfig(1, scoring="softmax"),
    num_experts=2,
    hidden_size=256,
    intermediate_size=128,
    routed_scaling_factor=1.0,
    has_routing_bias=False,
    shared_intermediate_size=256,
)


def plan_of(num_live: int, num_tokens: int) -> GroupPlan:
    """Expert 0 is that of every 50th token; 1 and 2 are shared. Two tiles for each of these."""
    live = np.arange(num_live)
    pair_row = np.full((num_tokens, 3), -1, np.int32)
    pair_row[:num_live:50, 0] = live[: len(live[::50])]
    pair_row[:num_live, 1:] = live[:, None] + [BLOCK_M, 3 * BLOCK_M]
    row_token = np.full(6 * BLOCK_M, -1, np.int32)
    token, choice = np.nonzero(pair_row >= 0)
    row_token[pair_row[token, choice]] = token
    return GroupPlan(
        np.array([len(live[::50]), num_live, num_live], np.int32),
        np.array([0, BLOCK_M, 3 * BLOCK_M], np.int32),
        row_token,
        pair_row,
        np.array([0, 1, 1, 2, 2, 0], np.int32),
        np.array([5], np.int32),
    )


def test_up_projection_of_tokens_in_place_of_permuted_rows():
    """The same bits of all live rows; the last tile, 3 of 32 rows, ends past the last token."""
    num_tokens, num_live = 136, 131
    plan, rng = plan_of(num_live, num_tokens), np.random.default_rng(1)
    tokens = Quantized(
        rng.integers(-3, 4, (num_tokens, 256)).astype(E4M3),
        2.0 ** rng.integers(-3, 4, (2, num_tokens)).astype(np.float32),
    )
    w, w_scale = weights(3, 256, 256)
    config = MatmulConfig(BLOCK_M, num_stages=2, tail_widths=(32, 64, 96), sms=2)
    how = {"config": config, "known_races": SCALES_OF_A_REUSED_SLOT}
    permuted = run(permute.permute_rows, tokens, plan)
    (wanted, wanted_scales), _ = run(up_projection, permuted, plan, w, w_scale, **how)

    rows = run(permute.permute_rows, tokens, plan, num_shared_experts=2)
    for array in (rows.values[BLOCK_M:], rows.scales[:, BLOCK_M:]):
        assert np.isnan(array.astype(np.float32)).all(), "shared experts' rows are left out"

    def of_tokens(rows, plan, w, w_scale, tokens, **options):
        return up_projection(rows, plan, w, w_scale, tokens=tokens, num_shared_experts=2, **options)

    (found, found_scales), _ = run(of_tokens, rows, plan, w, w_scale, tokens, **how)
    live = np.sort(plan.pair_row[plan.pair_row >= 0])
    np.testing.assert_array_equal(bits(found[live]), bits(wanted[live]))
    np.testing.assert_array_equal(found_scales[:, live], wanted_scales[:, live])


@pytest.mark.parametrize("case", [*EVERYWHERE, "interpreted_mosaic"])
@pytest.mark.parametrize("top_k", [3, slow(31)])
def test_routing_names_shared_experts_last(case, top_k):
    """Two of them, of which with 31 choices the second is in another register."""
    config = jax_moe.MoEConfig(top_k, scoring="softmax")
    logits = np.random.default_rng(3).standard_normal((5, 40)).astype(np.float32)
    with running(case) as backend:
        how = {"config": config, "backend": backend}
        wanted = stages.route(logits, None, 2.5, **how)
        found = stages.route_with_shared(logits, None, 2.5, num_shared_experts=2, **how)
    for all_experts, routed in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(all_experts[:, :top_k], routed)
    np.testing.assert_array_equal(found.topk_ids[:, top_k:], [[40, 41]] * 5)
    np.testing.assert_array_equal(found.topk_weights[:, top_k:], np.ones((5, 2)))


@functools.cache
def layer_weights() -> LayerWeights:
    sizes = {"hidden_size": 256, "offset": 0, "seed": 0}
    routed = make_inputs(1, num_experts=2, num_local_experts=2, intermediate_size=128, **sizes)
    shared = make_inputs(1, num_experts=2, num_local_experts=1, intermediate_size=256, **sizes)
    gate = np.random.default_rng(0).standard_normal((2, 256)).astype(ml_dtypes.bfloat16)
    return LayerWeights(routed.weights, gate, None, shared.weights)


def rows_left_out(monkeypatch, params, num_tokens, **options) -> list[tuple[int, int]]:
    """Of a layer that is traced: the experts of each permutation, and those it leaves out."""
    found = []

    def permuted(rows, plan, *, num_shared_experts, interpret):
        found.append((len(plan.group_sizes), num_shared_experts))
        num_rows = len(plan.row_token)
        return Quantized(
            jnp.zeros((num_rows, 256), rows.values.dtype), jnp.zeros((2, num_rows), jnp.float32)
        )

    x = jax.ShapeDtypeStruct((num_tokens, 256), jnp.bfloat16)
    layer = functools.partial(nn.moe_layer, config=CONFIG, backend="mosaic", **options)
    with monkeypatch.context() as patched, jax_moe.interpret_mode():
        patched.setattr(mosaic.permute, "permute_rows", permuted)
        jax.eval_shape(layer, params, x)
    return found


def test_what_a_layer_permutes(monkeypatch):
    """TMA reads tokens by eights, from a tile on; apart, a shared expert has no other rows."""
    apart = layer_weights()
    fused = nn.fuse_shared(apart, CONFIG)
    found = functools.partial(rows_left_out, monkeypatch)
    assert found(fused, 136) == [(4, 2)]
    assert found(apart, 136) == [(2, 0)]
    assert found(fused, 120) == [(4, 0)]
    assert found(apart, 137) == [(2, 0), (1, 0)]
    assert found(fused, 136, precision="high") == [], "smaller tiles, whose rows are gathered"


@pytest.mark.parametrize("form", [slow("fused"), slow("apart")])
def test_layer(form, monkeypatch):
    """The same bits as with all rows permuted."""
    params = layer_weights()
    if form == "fused":
        params = nn.fuse_shared(params, CONFIG)
    x = np.random.default_rng(2).standard_normal((136, 256)).astype(ml_dtypes.bfloat16)

    def all_permuted(inputs, *, num_shared_experts, **options):
        assert num_shared_experts in (0, 1, 2)
        return run_routed(inputs, **options)

    run_routed = entry.run_routed
    layer = functools.partial(
        nn.moe_layer, config=CONFIG, backend="mosaic", num_tokens=np.int32(131)
    )
    with jax_moe.interpret_mode():
        found = jax.jit(layer)(params, x)
        monkeypatch.setattr(entry, "run_routed", all_permuted)
        wanted = jax.jit(lambda *given: layer(*given))(params, x)
    assert np.isfinite(found.astype(np.float32)).all()
    np.testing.assert_array_equal(bits(found), bits(wanted))
