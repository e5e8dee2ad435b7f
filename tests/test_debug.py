"""Damaged group plans are found under checkify, sound ones pass, and nothing is checked else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jax_moe
from jax_moe import debug
from tests.moe_inputs import E4M3, bits, make_inputs, on_device
from tests.test_plan import draw_ids

INPUTS = make_inputs(20)


def plan_of(num_tokens=20, **sizes):
    counts = {"num_local_experts": 8, "num_experts": 32, **sizes}
    ids = draw_ids(num_tokens, counts["num_experts"], 4)
    return jax_moe.plan_groups(ids, 8, **counts, backend="xla")


def combined(plan):
    rows = plan.row_token.shape[0]
    outputs, weights = jnp.ones((rows, 256), jnp.bfloat16), jnp.ones(plan.pair_row.shape)
    return jax_moe.unpermute(outputs, weights, plan, backend="xla")


def projected_up(plan):
    _, _, x, x_scale, w13, s13, *_ = on_device(INPUTS).arguments
    return jax_moe.up_project(x, x_scale, w13, s13, plan, backend="xla")


def projected_down(plan):
    rows = plan.row_token.shape[0]
    activations = jax_moe.Quantized(jnp.ones((rows, 128), E4M3), jnp.ones((1, rows)))
    _, _, _, _, _, _, w2, s2, *_ = on_device(INPUTS).arguments
    return jax_moe.down_project(activations, w2, s2, plan, backend="xla")


STAGES = [projected_up, projected_down, combined]
checked_combined = jax.jit(checkify.checkify(combined))


def at(index, value):
    return lambda field: field.at[index].set(value)


DAMAGES = [
    ("group_sizes", at(3, -1), "group_sizes: negative"),
    ("group_sizes", at(-1, 10_000), "more rows than there are"),
    ("group_sizes", lambda sizes: sizes + 8, "groups overlap"),
    ("group_offsets", lambda offsets: offsets[::-1], "group_offsets: not ascending"),
    ("group_offsets", lambda offsets: offsets + 1, "not a multiple of block_m"),
    ("group_offsets", lambda offsets: offsets - 1024, "more rows than there are"),
    ("num_tiles", lambda tiles: tiles + 1, "num_tiles: not that of group_sizes"),
    ("tile_expert", at(0, 8), "tile_expert: out of range"),
    ("tile_expert", at(-1, -1), "tile_expert: out of range"),
    ("row_token", at(0, 20), "row_token: out of range"),
    ("pair_row", at((0, 0), 10_000), "pair_row: out of range"),
    ("pair_row", at((0, 0), -2), "pair_row: out of range"),
]


@pytest.mark.parametrize(("field", "damage", "said"), DAMAGES)
def test_a_damaged_plan_is_found(field, damage, said):
    plan = plan_of()
    error, _ = checked_combined(plan._replace(**{field: damage(getattr(plan, field))}))
    assert said in str(error.get())


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_that_takes_a_plan_looks_at_it(stage):
    plan = plan_of()
    checked = checkify.checkify(jax.jit(stage))
    error, out = checked(plan)
    error.throw()
    expected = stage(plan)
    for found, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(bits(found), bits(wanted))
    error, _ = checked(plan._replace(num_tiles=plan.num_tiles + 1))
    with pytest.raises(checkify.JaxRuntimeError, match=r"plan\.num_tiles"):
        error.throw()


@pytest.mark.parametrize("num_tokens", [0, 1, 300])
def test_sound_plans_pass(num_tokens):
    checked_combined(plan_of(num_tokens))[0].throw()


def test_outside_of_checkify_nothing_is_computed_for_the_checks(monkeypatch):
    def instructions():
        compiled = jax.jit(lambda plan: combined(plan)).lower(plan_of()).compile()
        return compiled.as_text().count(" = ")

    with_checks = instructions()
    monkeypatch.setattr(debug, "check_plan", lambda plan: None)
    assert with_checks == instructions()
