"""Scalar arguments that are traced: what test_validate.py says of those whose value is known."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import jax_moe
from jax_moe import scalars


def test_traced_integers_that_int32_cannot_hold_are_clipped():
    """A cast alone would wrap them; what int32 holds stays as it is."""
    narrow = jax.jit(lambda value: scalars.integer("offset", value, 0, 24))
    found = [narrow(np.uint32(value)).item() for value in (7, 2**31, 2**32 - 1)]
    assert found == [7, 2**30, 2**30]
    with jax.enable_x64(True):
        found = [narrow(np.int64(value)).item() for value in (-(2**40), -5, 7, 2**40)]
    assert found == [-(2**30), -5, 7, 2**30]


def test_a_static_count_that_is_traced():
    ids = np.zeros((1, 2), np.int32)
    plan = functools.partial(jax_moe.plan_groups, ids, 0, num_local_experts=2)
    with pytest.raises(TypeError, match="num_experts: expected a static integer, got a traced int"):
        jax.jit(lambda count: plan(num_experts=count))(8)
