"""The Mosaic matmuls on a GPU: gathered rows and tiles split along K, against plain ones."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

import jax_moe
from pallas_kernels.mosaic.hopper import gather, zero_rows
from pallas_kernels.mosaic.hopper.down_projection import down_projection
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig
from pallas_kernels.mosaic.hopper.up_projection import up_projection
from pallas_kernels.types import Quantized
from tests.moe_inputs import SMALL, bits, make_inputs, on_device, relative_error
from tests.test_kernels_interpreted import E4M3, grouped_rows, weights
from tests.test_repeatability import NAN, poison

pytestmark = pytest.mark.gpu

HIDDEN = 28 * 128


@functools.cache
def cases(block_m):
    """Rows of the up-projection, tokens in any order; weights that differ everywhere."""
    rows, plan, live = grouped_rows([3, 0, block_m, 2 * block_m - 3, 1], block_m, columns=HIDDEN)
    order = np.random.default_rng(2).permutation(len(live))
    row_token = np.where(live, np.argsort(order), -1).astype(np.int32)
    values, scales = rows.values[order], rows.scales[:, order]
    values = np.where(live[order][:, None], values.astype(np.float32), 0).astype(E4M3)
    scales = np.where(live[order], scales, 0).astype(np.float32)
    tokens = Quantized(values, scales)
    by_plan = weights(5, 256, HIDDEN)
    return (rows, plan, *by_plan), (tokens, plan._replace(row_token=row_token), *by_plan), live


def up(arrays, *, gather_rows=False, **config):
    run = functools.partial(up_projection, config=MatmulConfig(**config), gather_rows=gather_rows)
    return tuple(np.asarray(part).view(np.uint8) for part in jax.jit(run)(*arrays)[0])


@pytest.mark.parametrize(
    ("block_m", "tail_widths"), [(16, ()), (64, (16, 32, 48)), (128, (32, 64, 96))]
)
def test_gathered_rows_are_those_that_tma_copies(block_m, tail_widths):
    contiguous, gathered, live = cases(block_m)
    config = {"block_m": block_m, "num_stages": 4, "tail_widths": tail_widths}
    expected = up(contiguous, **config)
    found = up(gathered, gather_rows=True, **config)
    np.testing.assert_array_equal(found[0][live], expected[0][live])
    in_bytes = np.repeat(live, 4)
    np.testing.assert_array_equal(found[1][:, in_bytes], expected[1][:, in_bytes])
    tokens, plan = gathered[:2]
    by_xla = gather.gather_first(tokens, plan.row_token)
    np.testing.assert_array_equal(
        np.asarray(by_xla.values).view(np.uint8)[live], contiguous[0].values.view(np.uint8)[live]
    )


@pytest.mark.parametrize("split_k_steps", [7, 14])
def test_bits_do_not_depend_on_the_split(split_k_steps):
    """5 tiles are split for 33 CTAs and more, each time elsewhere; for 5, 7 and 8 they are not."""
    _, gathered, live = cases(16)
    config = {"block_m": 16, "num_stages": 5, "stages_per_fill": 1, "split_k_steps": split_k_steps}
    expected = up(gathered, gather_rows=True, sms=5, **config)
    for sms in (7, 8, 33, 40, 77, 132):
        for _ in range(3):
            found = up(gathered, gather_rows=True, sms=sms, **config)
            np.testing.assert_array_equal(found[0][live], expected[0][live], err_msg=f"{sms=}")


def test_a_split_down_projection_is_exact():
    rows, plan, live = grouped_rows([2, 0, 16, 20], 16, columns=2048)
    by_plan = weights(4, 384, 2048)
    results = []
    for sms in (3, 50, 132):
        config = MatmulConfig(16, num_stages=6, stages_per_fill=2, split_k_steps=8, sms=sms)
        run = jax.jit(functools.partial(down_projection, config=config))
        results.append(np.asarray(run(rows, plan, *by_plan))[live].view(np.uint16))
    for found in results[1:]:
        np.testing.assert_array_equal(found, results[0])


@pytest.mark.parametrize("hidden_size", [384, 512])
@pytest.mark.parametrize("num_tokens", [1, 131, 1000])
def test_zeros_are_those_of_the_tokens_without_a_local_pair(num_tokens, hidden_size):
    """Rows of other tokens still hold what was in memory before: NaN where the poison was."""
    rows, plan, live = grouped_rows([128, 5], 128, columns=512)
    arrays = rows, plan, *weights(2, 256, 512)
    rng = np.random.default_rng(num_tokens)
    pair_row = np.where(rng.random((num_tokens, 8)) < 0.1, 3, -1).astype(np.int32)
    config = MatmulConfig(128, num_stages=3, tail_widths=(32,), scheduler="dynamic")

    @jax.jit
    def run(pair_row, *arrays):
        work = zero_rows.zero_rows(pair_row, hidden_size)
        return up_projection(*arrays, config=config, side_job=work)

    expected = up(arrays, **dataclasses.asdict(config))
    run(pair_row, *arrays)
    poison(NAN)
    activations, zeroed = run(pair_row, *arrays)
    values = np.asarray(activations.values).view(np.uint8)
    np.testing.assert_array_equal(values[live], expected[0][live])
    idle = (pair_row < 0).all(axis=1)
    assert (bits(zeroed)[idle] == 0).all()
    assert num_tokens == 1 or not idle.all()
    assert idle.all() or np.isnan(np.asarray(zeroed)[~idle].astype(np.float32)).any()


@pytest.mark.parametrize("precision", ["fast", "high"])
@pytest.mark.parametrize("num_tokens", [7, 200])
def test_gathered_tiles_of_a_single_step_end(num_tokens, precision):
    """Four tiles per CTA and more: their producer and their consumers waited for each other."""
    sizes = {"hidden_size": 128, "intermediate_size": 2048, "num_local_experts": 32, "offset": 0}
    inputs = on_device(make_inputs(num_tokens, **sizes))
    options = {"config": SMALL, "backend": "mosaic", "precision": precision}
    found = jax_moe.apply(*inputs.arguments, **options)
    expected = jax_moe.reference(*inputs.arguments, config=SMALL)
    assert relative_error(found, expected) < (0.03 if precision == "fast" else 0.003)


@pytest.mark.parametrize("hidden_size", [384, 512])
def test_a_layer_that_writes_its_zeros_early_gives_the_bits_of_its_stages(hidden_size):
    inputs = on_device(make_inputs(1024, hidden_size=hidden_size))
    logits, bias, x, x_scale, w13, s13, w2, s2, offset, factor = inputs.arguments
    on = {"backend": "mosaic"}
    routing = jax_moe.route(logits, bias, factor, config=SMALL, **on)
    counts = {"num_local_experts": 8, "num_experts": 32}
    plan = jax_moe.plan_groups(routing.topk_ids, offset, **counts, **on)
    assert plan.block_m == 128, "the tiles whose kernel has warps to spare"
    activations = jax_moe.up_project(x, x_scale, w13, s13, plan, **on)
    rows = jax_moe.down_project(activations, w2, s2, plan, **on)
    expected = bits(jax_moe.unpermute(rows, routing.topk_weights, plan, **on))
    idle = (np.asarray(plan.pair_row) < 0).all(axis=1)
    assert 0 < idle.sum() < len(idle)
    poison(NAN)
    found = bits(jax_moe.apply(*inputs.arguments, config=SMALL, **on))
    np.testing.assert_array_equal(found, expected)
    assert (found[idle] == 0).all()
