"""The layer over one GPU as a mesh of one, and the kernels' copies in that GPU's own memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

import jax_moe
from pallas_kernels.mosaic import launch, peers
from tests.moe_inputs import SMALL, bits, make_inputs, sharded_arguments

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("num_tokens", [1, 64, 1500])
def test_a_mesh_of_one_gives_the_bits_of_apply(kind, num_tokens):
    inputs = make_inputs(num_tokens, num_local_experts=32, offset=0)
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(kind,), devices=jax.devices()[:1])
    layer = jax_moe.expert_parallel(mesh, "expert", config=SMALL, with_load=True)
    out, load = layer(*sharded_arguments(inputs))
    apply = jax.jit(functools.partial(jax_moe.apply, config=SMALL))
    np.testing.assert_array_equal(bits(out), bits(apply(*inputs.arguments)))
    assert load.sum() == num_tokens * SMALL.top_k


@pytest.mark.parametrize("num_tokens", [64, 1500])
def test_pieces_give_the_bits_of_their_own_calls(num_tokens):
    inputs = make_inputs(num_tokens, num_local_experts=32, offset=0)
    mesh = jax.make_mesh((1,), ("expert",), devices=jax.devices()[:1])
    half = num_tokens // 2
    layer = jax_moe.expert_parallel(mesh, "expert", config=SMALL, max_rows_at_once=half)
    apply = jax.jit(functools.partial(jax_moe.apply, config=SMALL))
    logits, bias, x, scale, *rest = inputs.arguments
    parts = [
        apply(logits[rows], bias, x[rows], scale[:, rows], *rest)
        for rows in (slice(half), slice(half, None))
    ]
    out = layer(*sharded_arguments(inputs))
    np.testing.assert_array_equal(bits(out), np.concatenate([bits(part) for part in parts]))


@pytest.mark.parametrize("columns", [128, 384, 2048, 7168])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16"])
def test_rows_and_words_are_copied_whole(columns, dtype):
    """What `dispatch` and `combine` do with a peer's memory, in this GPU's own."""
    rows = np.random.default_rng(0).integers(0, 2**32, (3, columns * 2 // 4), np.uint32)
    rows = jnp.asarray(rows.view(np.uint8)[:, : columns * jnp.dtype(dtype).itemsize])
    rows = lax.bitcast_convert_type(
        rows.reshape(3, columns, -1) if dtype == "bfloat16" else rows, jnp.dtype(dtype)
    )
    words = jnp.arange(56 * 3, dtype=jnp.float32).reshape(56, 3)
    assert_copied(rows, words)


def copies(rows, words):
    """Each row by `load_bytes` and `store_bytes`, each column of `words` to a row."""

    def body(rows_gmem, words_gmem, out_gmem, columns_gmem):
        token = lax.axis_index("block")
        peers.store_bytes(out_gmem.at[token], peers.load_bytes(rows_gmem.at[token]))
        peers.store_words(columns_gmem.at[token], peers.load_words(words_gmem.at[:, token]))

    out_type = (
        jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        jax.ShapeDtypeStruct(words.shape[::-1], words.dtype),
    )
    kernel = launch.kernel(
        body, out_type=out_type, grid=(len(rows),), grid_names=("block",), kernel_name="copies"
    )
    return kernel(rows, words)


def assert_copied(rows, words):
    out, columns = jax.jit(copies)(rows, words)
    np.testing.assert_array_equal(bits(out), bits(rows))
    np.testing.assert_array_equal(columns, words.T)
