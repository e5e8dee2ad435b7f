"""`batch_invariant=True` at full size on a GPU: the same bits of a token in any batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from bench import inputs, routing
from bench.workloads import FULL, WORKLOADS
from jax_moe import LayerInputs
from tests.backend_cases import running

pytestmark = pytest.mark.gpu

LARGEST = max(WORKLOADS, key=lambda workload: workload.num_tokens)
COUNTS = (1, 16, 17, 64, 901, 1537, 4096)
CLASSES = (2.0, 20.0, 100.0)  # expected rows: tiles of every height, whatever the number of tokens


@functools.cache
def tokens_of(dtype: str) -> LayerInputs:
    """14107 tokens of DeepSeek-V3's rank on the device, as the benchmark draws them."""
    weights = inputs.draw_weights("realistic", FULL, seed=0)
    drawn = routing.draw(LARGEST, FULL, seed=0)
    given = inputs.make_arguments("realistic", LARGEST, FULL, 0, 0, weights, drawn)
    if dtype == "bf16":
        x = jax.random.normal(jax.random.key(0), given.hidden_states.shape, jnp.bfloat16)
        given = given._replace(hidden_states=x, hidden_states_scale=None)
    return given


def taken(given: LayerInputs, tokens: np.ndarray) -> LayerInputs:
    """The same tokens, in that order."""
    scale = given.hidden_states_scale
    return given._replace(
        routing_logits=jnp.asarray(given.routing_logits)[tokens],
        hidden_states=jnp.asarray(given.hidden_states)[tokens],
        hidden_states_scale=None if scale is None else jnp.asarray(scale)[:, tokens],
    )


def bits(array: jax.Array) -> np.ndarray:
    return np.asarray(jax.lax.bitcast_convert_type(array, jnp.uint16))


CASES = [
    pytest.param(backend, *rows, marks=pytest.mark.xdist_group("-".join((backend, *rows))))
    for backend in ("mosaic", "triton")
    for rows in (("fast", "e4m3"), ("high", "bf16"))
]
"""Each in a process of its own: a case compiles a dozen layers."""


@pytest.mark.parametrize(("backend", "precision", "dtype"), CASES)
def test_batches_of_every_class(backend, precision, dtype):
    """Tokens of the largest workload, alone and in batches, both ways round, eager and jitted."""
    given = tokens_of(dtype)
    with running(backend) as name:
        apply = functools.partial(
            jax_moe.apply, backend=name, precision=precision, batch_invariant=True
        )

        def layer(given, **options):
            return bits(apply(*given.arguments, **options))

        whole = layer(given)
        with_experts = np.flatnonzero(whole.any(axis=1))
        rng = np.random.default_rng(0)
        for count in COUNTS:
            pool = with_experts if count <= 64 else np.arange(given.tokens)
            tokens = rng.choice(pool, count, replace=False)
            for order in (tokens, tokens[::-1]):
                found = layer(taken(given, order))
                np.testing.assert_array_equal(found, whole[order], err_msg=f"T={count}")
        np.testing.assert_array_equal(layer(given, num_tokens=64)[:64], whole[:64])
        few = taken(given, tokens)
        for rows in CLASSES:
            found = layer(few, expected_rows=rows)
            np.testing.assert_array_equal(found, whole[tokens], err_msg=f"expected_rows={rows}")
        jitted = jax.jit(lambda given: apply(*given.arguments))
        np.testing.assert_array_equal(bits(jitted(few)), whole[tokens])


@pytest.mark.parametrize("precision", ["fast", "high"])
def test_one_expert_with_one_or_many_tokens(precision):
    """A token has its expert to itself, or shares it: tiles of every width, full and not."""
    given = tokens_of("e4m3")
    count = 4096
    rows = given.hidden_states[:count], given.hidden_states_scale[:, :count]
    weights = jnp.ones((count, 8), jnp.float32)
    reference = None
    with running("mosaic") as name:
        layer = functools.partial(
            jax_moe.apply_routed,
            num_experts=256,
            backend=name,
            precision=precision,
            batch_invariant=True,
        )
        for crowd in (1, 2, 16, 17, 32, 34, 64, 65, 98, 128, 129, 200, count):
            ids = jnp.full((count, 8), -1, jnp.int32).at[:crowd, 0].set(5)
            for expected_rows in CLASSES:
                out = layer(*rows, *given.weights, ids, weights, 0, expected_rows=expected_rows)
                found = bits(out)[0]
                reference = found if reference is None else reference
                assert found.any()
                np.testing.assert_array_equal(found, reference, err_msg=f"{crowd} tokens")


def test_the_default_sums_in_another_order_where_rows_are_few():
    """What the option is for: K in segments in tiles of 16 rows, in one chain in others."""
    given = tokens_of("e4m3")
    few = taken(given, np.arange(4096))
    with running("mosaic") as name:
        apply = functools.partial(jax_moe.apply, *few.arguments, backend=name)
        one, other = (bits(apply(expected_rows=rows)) for rows in (2.0, 100.0))
    assert (one != other).any()
