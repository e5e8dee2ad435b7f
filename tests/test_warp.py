"""What single-warp code has instead of `lax.while_loop` goes as far, and no further."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pallas_kernels.mosaic import warp


@pytest.mark.parametrize("steps", [0, 1, 31, 32, 33, 100])
@pytest.mark.parametrize("spare", [0, 1, 200])
def test_a_loop_of_known_length_stops_where_while_does(steps, spare):
    def alive(carry):
        return carry[0] < steps

    def step(carry):
        count, total = carry
        return count + 1, total * 3 + count

    initial = jnp.int32(0), jnp.int32(1)
    expected = lax.while_loop(alive, step, initial)
    loop = jax.jit(lambda most: warp.while_loop(most, alive, step, initial))
    assert list(map(int, loop(jnp.int32(steps + spare)))) == list(map(int, expected))
