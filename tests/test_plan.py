"""The group plan: rows, tiles and their bounds."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from pallas_kernels.shapes import cdiv, max_rows
from tests.backend_cases import EVERYWHERE, running, slow


def draw_ids(num_tokens, num_experts, top_k, seed=0):
    scores = np.random.default_rng(seed).random((num_tokens, num_experts))
    return np.argsort(scores, axis=1)[:, :top_k].astype(np.int32)


@functools.cache
def traced_plan(backend, num_local_experts, num_experts):
    """A program whose offset is known to the GPU alone."""
    sizes = {"num_local_experts": num_local_experts, "num_experts": num_experts}
    return jax.jit(lambda ids, offset: jax_moe.plan_groups(ids, offset, **sizes, backend=backend))


def make_plan(case, ids, offset, num_local_experts, num_experts):
    with running(case) as backend:
        plan = jax_moe.plan_groups(
            ids,
            offset,
            num_local_experts=num_local_experts,
            num_experts=num_experts,
            backend=backend,
        )
    return jax.tree.map(np.asarray, plan)


def check_plan(plan, ids, offset, num_local_experts, num_experts):
    """Compares with the plan as its docstring tells it, built token by token."""
    num_tokens, top_k = ids.shape
    block_m = plan.block_m
    least = max_rows(num_tokens, top_k, num_local_experts, block_m)
    assert least <= len(plan.row_token) < least + 32  # a backend may round up for its copies
    in_range = (ids >= 0) & (ids < num_experts)
    groups = [
        np.flatnonzero(((ids == offset + e) & in_range).any(axis=1))
        for e in range(num_local_experts)
    ]
    row, tile = 0, 0
    for expert, tokens in enumerate(groups):
        assert plan.group_sizes[expert] == len(tokens)
        assert plan.group_offsets[expert] % block_m == 0
        if len(tokens):
            assert plan.group_offsets[expert] == row
        tiles = cdiv(len(tokens), block_m)
        rows = plan.row_token[row : row + tiles * block_m]
        np.testing.assert_array_equal(rows[: len(tokens)], tokens)
        np.testing.assert_array_equal(rows[len(tokens) :], -1)
        np.testing.assert_array_equal(plan.tile_expert[tile : tile + tiles], expert)
        for position, token in enumerate(tokens):
            choice = np.flatnonzero(ids[token] == offset + expert)
            np.testing.assert_array_equal(plan.pair_row[token, choice], row + position)
        row, tile = row + tiles * block_m, tile + tiles
    np.testing.assert_array_equal(plan.num_tiles, [tile])
    np.testing.assert_array_equal(plan.tile_expert[tile:], 0)
    is_local = (ids >= offset) & (ids < offset + num_local_experts) & in_range
    np.testing.assert_array_equal(plan.pair_row >= 0, is_local)
    assert (plan.pair_row[~is_local] == -1).all()


SIZES = [(32, 8, 4, 8), (32, 32, 4, 0), (16, 1, 2, 15), (256, 32, 8, 96), (7, 3, 7, 2)]


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_local_experts", "top_k", "offset"),
    [
        *((num_tokens, *SIZES[0]) for num_tokens in (1, 7, 62, 257)),
        *((62, *sizes) for sizes in SIZES[1:]),
        *(slow(num_tokens, *sizes) for sizes in SIZES[1:] for num_tokens in (1, 7, 257)),
    ],
)
def test_plan(case, num_tokens, num_experts, num_local_experts, top_k, offset):
    ids = draw_ids(num_tokens, num_experts, top_k)
    plan = make_plan(case, ids, offset, num_local_experts, num_experts)
    check_plan(plan, ids, offset, num_local_experts, num_experts)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_local_experts", "top_k", "offset"),
    [
        (600, 384, 48, 8, 336),
        (600, 512, 300, 10, 200),
        (1, 512, 512, 16, 0),
        slow(1, 384, 48, 8, 336),
        slow(1, 512, 300, 10, 200),
        slow(600, 512, 512, 16, 0),
    ],
)
def test_many_experts(case, num_tokens, num_experts, num_local_experts, top_k, offset):
    ids = draw_ids(num_tokens, num_experts, top_k)
    plan = make_plan(case, ids, offset, num_local_experts, num_experts)
    check_plan(plan, ids, offset, num_local_experts, num_experts)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("num_tokens", [9, 700])
def test_pairs_of_a_token_with_one_id_share_a_row(case, num_tokens):
    ids = np.random.default_rng(0).integers(-1, 12, (num_tokens, 8)).astype(np.int32)
    ids[1] = 5  # all eight
    plan = make_plan(case, ids, 4, 6, 12)
    check_plan(plan, ids, 4, 6, 12)
    assert plan.pair_row[1].min() == plan.pair_row[1].max() >= 0


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 300])
def test_all_tokens_to_one_expert(case, num_tokens):
    ids = np.full((num_tokens, 1), 3, np.int32)
    check_plan(make_plan(case, ids, 2, 4, 8), ids, 2, 4, 8)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_ids_that_are_no_expert_are_skipped(case):
    ids = draw_ids(40, 16, 4)
    ids[::3] = -1
    ids[1::7, 2] = 16
    ids[2::7, 1] = np.iinfo(np.int32).max
    ids[4::7, 1] = np.iinfo(np.int32).min
    check_plan(make_plan(case, ids, 8, 8, 16), ids, 8, 8, 16)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("offset", [-5, 13, 200, -(2**31), 2**31 - 1])
def test_traced_offset_out_of_range_skips_what_is_no_expert(case, offset):
    ids = draw_ids(40, 16, 4)
    ids[::5] = -1
    with running(case) as backend:
        plan = traced_plan(backend, 8, 16)(ids, jnp.int32(offset))
    check_plan(jax.tree.map(np.asarray, plan), ids, offset, 8, 16)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_ids_from_num_experts_on_are_skipped_where_the_local_range_covers_them(case):
    ids = np.array([[14, 17], [16, 15]], np.int32)
    with running(case) as backend:
        plan = traced_plan(backend, 8, 16)(ids, jnp.int32(13))
    check_plan(jax.tree.map(np.asarray, plan), ids, 13, 8, 16)
    np.testing.assert_array_equal(plan.pair_row[:, 1] >= 0, [False, True])
    np.testing.assert_array_equal(plan.pair_row[:, 0] >= 0, [True, False])


@pytest.mark.parametrize("case", EVERYWHERE)
def test_no_local_pair(case):
    ids = np.tile(np.arange(4, dtype=np.int32), (9, 1))
    plan = make_plan(case, ids, 8, 8, 16)
    check_plan(plan, ids, 8, 8, 16)
    assert plan.num_tiles[0] == 0


def test_no_token():
    plan = make_plan("xla", np.zeros((0, 4), np.int32), 0, 8, 16)
    assert plan.row_token.shape == (0,)
    assert plan.num_tiles[0] == 0


def test_max_rows_is_reached_and_never_passed():
    for num_tokens, local, top_k, block_m in itertools.product(range(5), [1, 2, 3], [1, 2], [1, 2]):
        # Every way to give each token `top_k` of the local experts or of one that is elsewhere.
        choices = list(itertools.combinations(range(local + top_k), top_k))
        worst = max(
            sum(
                block_m * cdiv(sum(e in picked for picked in routing), block_m)
                for e in range(local)
            )
            for routing in itertools.combinations_with_replacement(choices, num_tokens)
        )
        assert worst <= max_rows(num_tokens, top_k, local, block_m)
        if block_m == 1:
            assert worst == max_rows(num_tokens, top_k, local, block_m)
    assert max_rows(14107, 8, 32, 128) <= 14107 * 8 + 32 * 127
    assert max_rows(1, 8, 32, 64) == 8 * 64
    assert max_rows(1, 8, 4, 64) == 4 * 64
