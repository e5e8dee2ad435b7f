"""How stream-K splits tiles along K: every segment is computed once, and its CTA is found.

And that the two sides of a static scheduler, in a model of it, never wait for each other.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic.hopper import grouped_matmul, stream_k
from pallas_kernels.mosaic.hopper.gather import GATHER_DELAY
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


def through(shape, tiles, slots):
    """How many tiles consumers get through: producer and consumers in turn, as far as each gets.

    Args:
        shape: The matmul.
        tiles: Steps of each tile, or piece of a tile, of a CTA.
        slots: Of the queue.
    """
    delay = GATHER_DELAY if shape.is_gathered else 0
    state = SimpleNamespace(put=0, taken=0, filled=0, committed=0, consumed=0)

    def produce():
        """As `StaticScheduler.produce_tiles`; yields what it waits for."""
        state.put = 1
        for index, steps in enumerate(tiles):
            fills = steps // shape.stages_per_fill
            for i in range(fills):
                if i == fills // 2:
                    yield lambda index=index: state.taken > index + 1 - slots
                    state.put += 1
                last = state.filled + shape.stages_per_fill
                yield lambda last=last: state.consumed > last - 1 - shape.config.num_stages
                state.filled = last
                state.committed = max(last - delay, state.committed)
        state.committed = state.filled

    def consume():
        """As `_consume_whole_tiles`."""
        done = 0
        for index, steps in enumerate(tiles):
            yield lambda index=index: state.put > index
            state.taken += 1
            for _ in range(steps):
                yield lambda done=done: state.committed > done
                done += 1
                state.consumed = done
        yield lambda: state.put > len(tiles)

    sides = [produce(), consume()]
    waits = [next(side) for side in sides]
    while ready := [i for i, wait in enumerate(waits) if wait()]:
        for i in ready:
            waits[i] = next(sides[i], lambda: False)
    return state.taken if state.consumed == sum(tiles) else state.taken - 1


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("stages_per_fill", [1, 2, 4])
@pytest.mark.parametrize("split_k_steps", [None, 1, 2])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
def test_producer_and_consumers_never_wait_for_each_other(
    num_steps, split_k_steps, stages_per_fill, gathered
):
    for num_stages in range(stages_per_fill + 2, 8):
        shape = matmul_shape(
            MatmulConfig(
                16,
                num_stages,
                sms=132,
                stages_per_fill=stages_per_fill,
                split_k_steps=split_k_steps,
            ),
            num_columns=1,
            weight_blocks=lambda column: (column,),
            num_steps=num_steps,
            gathered=gathered,
            interpret=None,
        )
        pieces = range(shape.segment_steps, num_steps + 1, shape.segment_steps)
        for first in pieces:
            for last in pieces:
                tiles = [num_steps] * 5 + [first, last]
                assert through(shape, tiles, shape.queue_slots) == len(tiles)


def test_tiles_of_one_gathered_step_take_a_third_slot():
    """H = 128: an up-projection of three tiles per CTA or more never ended."""
    options = {"num_columns": 8, "weight_blocks": lambda column: (column,), "interpret": None}
    config = MatmulConfig(16, num_stages=6, sms=132)
    one = matmul_shape(config, num_steps=1, gathered=True, **options)
    assert one.queue_slots == 3
    assert through(one, [1, 1], slots=2) == 2
    assert through(one, [1, 1, 1], slots=2) == 0
    assert through(one, [1] * 8, slots=3) == 8
    for num_steps, gathered in ((1, False), (2, True), (56, True)):
        shape = matmul_shape(config, num_steps=num_steps, gathered=gathered, **options)
        assert shape.queue_slots == 2
