"""The kernels between GPUs: what they write, read and wait for, in a model; what compiles of them.

The layer with them is in `tests/parallel_layer.py`, by another model.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.mosaic import combine, dispatch
from tests.nvlink_model import Machine, run

EACH, TOP_K = 3, 4  # experts of a rank


def tokens_of(num_ranks, num_tokens, seed, columns=256):
    """Each rank's rows, scales, ids and weights; some ids are no expert, some tokens have none."""
    rng = np.random.default_rng(seed)
    ids = rng.random((num_ranks, num_tokens, num_ranks * EACH)).argsort(axis=2)[:, :, :TOP_K]
    ids = np.pad(ids, ((0, 0), (0, 0), (0, TOP_K - ids.shape[2])), constant_values=-1)
    ids = np.where(rng.random(ids.shape) < 0.3, -1, ids).astype(np.int32)
    ids[rng.random((num_ranks, num_tokens)) < 0.2] = -1
    rows = rng.integers(0, 100, (num_ranks, num_tokens, columns)).astype(np.uint8)
    scales = rng.random((num_ranks, columns // 128, num_tokens), np.float32)
    weights = rng.random((num_ranks, num_tokens, TOP_K), np.float32)
    return rows, scales, ids, weights


def goes_to(ids, rank):
    return ((ids >= 0) & (ids // EACH == rank)).any(axis=-1)


@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(1, 2), (2, 1), (4, 7), (8, 3)])
@pytest.mark.parametrize("has_scales", [True, False])
def test_dispatch_writes_each_token_where_it_is_needed_and_nowhere_else(
    monkeypatch, num_ranks, num_tokens, has_scales
):
    monkeypatch.setattr(dispatch, "_BLOCKS", 3)
    rows, scales, ids, weights = tokens_of(num_ranks, num_tokens, seed=num_tokens)
    machine = Machine(num_ranks)
    given = [(r, s if has_scales else None, i, w) for r, s, i, w in zip(
        rows, scales, ids, weights, strict=True)]  # fmt: skip
    run(machine, monkeypatch, dispatch.dispatch, given, EACH)
    assert machine.blocks == min(3, num_tokens)
    assert machine.signals == [num_ranks * machine.blocks] * num_ranks
    sent = [rows.reshape(-1, rows.shape[2]), weights.reshape(-1, TOP_K)]
    if has_scales:
        sent.append(np.concatenate([s.T for s in scales]))
    all_ids = ids.reshape(-1, TOP_K)
    for rank, (row_slots, id_slots, *others) in enumerate(machine.outputs):
        np.testing.assert_array_equal(id_slots, all_ids)
        here = goes_to(all_ids, rank)
        for slots, values in zip((row_slots, *others), sent, strict=True):
            np.testing.assert_array_equal(slots[here], values[here])
            assert (slots[~here].view(np.uint8) == 0xA5).all(), "written, though not needed"


@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(1, 2), (2, 1), (4, 7), (8, 3)])
def test_combine_adds_in_the_order_of_ranks_and_reads_what_was_made(
    monkeypatch, num_ranks, num_tokens
):
    monkeypatch.setattr(combine, "_BLOCKS", 5)
    columns = 2048 if num_tokens == 7 else 256
    _, _, ids, _ = tokens_of(num_ranks, num_tokens, seed=num_tokens)
    rng = np.random.default_rng(1)
    made = rng.standard_normal((num_ranks, num_ranks, num_tokens, columns), np.float32)
    made = made.astype(ml_dtypes.bfloat16)
    wanted = np.zeros((num_ranks, num_tokens, columns), np.float32)
    for rank in range(num_ranks):  # that made them
        here = goes_to(ids, rank)
        wanted[here] += made[rank][here].astype(np.float32)
        made[rank][~here] = np.nan
    machine = Machine(num_ranks)
    given = [(sums.reshape(-1, columns), i) for sums, i in zip(made, ids, strict=True)]
    run(machine, monkeypatch, combine.combine, given, EACH)
    assert machine.signals == [num_ranks * machine.blocks] * num_ranks
    for (out,), sums in zip(machine.outputs, wanted, strict=True):
        np.testing.assert_array_equal(out.astype(np.float32), sums.astype(out.dtype))


def test_every_block_ends_with_a_signal_to_all_and_block_0_waits_for_all(monkeypatch):
    """Whoever leaves may overwrite what others read, and read what others have written."""
    monkeypatch.setattr(dispatch, "_BLOCKS", 4)
    num_ranks, num_tokens = 3, 9
    machine = Machine(num_ranks)
    given = list(zip(*tokens_of(num_ranks, num_tokens, seed=0), strict=True))
    run(machine, monkeypatch, dispatch.dispatch, given, EACH)
    for rank in range(num_ranks):
        for block in range(machine.blocks):
            done = [what for r, b, what in machine.log if (r, b) == (rank, block)]
            end = ["signal"] * num_ranks + ["wait"] * (block == 0)
            assert done[-len(end) :] == end
            assert set(done[: -len(end)]) == {"access"}
    assert machine.signals == [num_ranks * machine.blocks] * num_ranks
