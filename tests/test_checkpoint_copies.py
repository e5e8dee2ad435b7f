"""Copies of what holds open files; a pickled one is made in the same way."""

from __future__ import annotations

import copy

import pytest

from jax_moe import checkpoint
from tests.hf_checkpoint import make_checkpoint
from tests.test_checkpoint import assert_expert


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_checkpoint_opens_its_own_files(tmp_path, copied):
    """A number of an open file means another file elsewhere, or once the first is closed."""
    first, second = (make_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    original = checkpoint.Checkpoint(first.folder)
    checkpoint.load_experts(original, 3)
    again = copied(original)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copied(next(iter(original._shards.values())))
    del original
    other = checkpoint.Checkpoint(second.folder)
    checkpoint.load_experts(other, 3)
    assert_expert(checkpoint.load_experts(again, 3), 5, first.expert(5))
