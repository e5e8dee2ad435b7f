"""How stream-K splits tiles along K: every segment is computed once, and its CTA is found."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic.hopper import grouped_matmul, stream_k
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig, matmul_shape
from pallas_kernels.mosaic.hopper.stream_k import Partition

TOTALS = [0, 1, 2, 5, 32, 33, 56, 131, 132, 136, 224, 384, 400, 416, 448, 512, 1568]


@functools.partial(jax.jit, static_argnums=(0, 1))
def pieces(segments, sms, total):
    """tile, begin, end of every (CTA, index), of more indices than any total has."""
    partition = Partition(segments, sms, total)
    count = TOTALS[-1] // sms + segments + 3
    ctas, indices = (jnp.arange(n, dtype=jnp.int32) for n in (sms, count))

    def piece(cta, index):
        number, is_whole = partition.whole(cta, index)
        whole = number, jnp.int32(0), jnp.int32(segments)
        pairs = zip(whole, partition.piece(cta, index), strict=True)
        return tuple(jnp.where(is_whole, a, b) for a, b in pairs)

    return jax.vmap(lambda cta: jax.vmap(lambda index: piece(cta, index))(indices))(ctas)


@functools.partial(jax.jit, static_argnums=(0, 1))
def split(segments, sms, total):
    """Of the tiles that are split: their number, owners of segments, each CTA's first segment."""
    partition = Partition(segments, sms, total)
    numbers = jnp.arange(2 * sms * segments, dtype=jnp.int32)
    ctas = jnp.arange(sms + 1, dtype=jnp.int32)
    owners, first = jax.vmap(partition.owner_of)(numbers), jax.vmap(partition.first_segment)(ctas)
    return partition.split_tiles, owners, first


@pytest.mark.parametrize(("segments", "sms"), [(4, 132), (7, 132), (2, 5), (3, 1)])
@pytest.mark.parametrize("total", TOTALS)
def test_pieces_cover_every_segment_once(segments, sms, total):
    tile, begin, end = map(np.asarray, pieces(segments, sms, jnp.int32(total)))
    seen = np.zeros((total, segments), int)
    finishers = {}
    for cta in range(sms):
        live = end[cta] > begin[cta]
        num_pieces = int(live.sum())
        assert live[:num_pieces].all(), "a CTA stops at its first dead piece"
        for index in range(num_pieces):
            t, b, e = int(tile[cta, index]), int(begin[cta, index]), int(end[cta, index])
            seen[t, b:e] += 1
            if b == 0:
                finishers[t] = cta
                assert e == segments or index == num_pieces - 1, "a split one to finish is last"
            else:
                assert index == total // sms, "what another CTA finishes begins the run"
    np.testing.assert_array_equal(seen, 1)
    assert set(finishers) == set(range(total))
    split_tiles, owner, first = map(np.asarray, split(segments, sms, jnp.int32(total)))
    numbers = np.arange(split_tiles * segments)
    assert numbers.size <= owner.size
    owner = owner[: numbers.size]
    if numbers.size:
        assert ((first[owner] <= numbers) & (numbers < first[owner + 1])).all()
        assert np.diff(first).max() - np.diff(first).min() <= 1, "equal runs"


@pytest.mark.parametrize(
    ("segments", "total", "expected"),
    [
        pytest.param(4, 32, 32, id="one round, a quarter of the CTAs busy"),
        pytest.param(2, 56, 0, id="one round, more of them busy"),
        pytest.param(4, 448, 52, id="the last of four rounds becomes two segments"),
        pytest.param(4, 224, 92, id="the last of two rounds becomes three segments"),
        pytest.param(2, 224, 0, id="of two segments neither could be saved"),
        pytest.param(2, 448, 52, id="one of two segments is saved"),
        pytest.param(4, 384, 0, id="a last round that is almost full"),
        pytest.param(4, 264, 0, id="no tile left over"),
    ],
)
def test_tiles_are_split_where_that_saves_a_segment(segments, total, expected):
    assert Partition(segments, 132, jnp.int32(total)).split_tiles == expected


@pytest.mark.parametrize(("total", "expected"), [(56, 56), (66, 0)])
def test_of_widened_weights_more_tiles_of_one_round_are_split(total, expected):
    partition = Partition(2, 132, jnp.int32(total), stream_k.WIDENED_BUSY_SHARE)
    assert partition.split_tiles == expected


@pytest.mark.parametrize(("is_widened", "expected"), [(True, 56), (False, 0)])
def test_only_widened_matmuls_split_them(is_widened, expected):
    """56 tiles in one round: the down-projection of two experts."""
    shape = matmul_shape(
        MatmulConfig(16, num_stages=2, sms=132, split_k_steps=8),
        num_columns=28,
        weight_blocks=lambda column: (2 * column, 2 * column + 1),
        num_steps=16,
        gathered=False,
        interpret=None,
        widened=is_widened,
    )
    plan = SimpleNamespace(num_tiles=[jnp.int32(2)])
    scheduler = grouped_matmul._scheduler(shape, SimpleNamespace(plan=plan, zeros=None))
    assert scheduler.partition.split_tiles == expected
