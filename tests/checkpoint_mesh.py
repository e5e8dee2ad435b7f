"""One of two processes that load a checkpoint onto meshes of the 8 CPU devices of both.

usage: checkpoint_mesh.py FOLDER PORT INDEX
"""

from __future__ import annotations

import collections
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_moe import checkpoint
from jax_moe.checkpoint import shards, transfer
from tests.hf_checkpoint import make_checkpoint

UNEVEN = "^sharding: expected mesh axes that split 4 experts evenly, got 'expert' of size 8$"
READS: collections.Counter[str] = collections.Counter()


def record_reads() -> None:
    """Counts the bytes that are read of each expert's values."""
    read_into = shards.Tensor.read_into

    def record(self, begin, target):
        if self.info.dtype == "F8_E4M3":
            expert = re.search(r"experts\.(\d+)", self.name)
            READS[expert[1] if expert else "shared"] += len(target)
        return read_into(self, begin, target)

    shards.Tensor.read_into = record  # type: ignore[method-assign]


def load(function, made, packed="", **options):
    READS.clear()
    with jax.transfer_guard("disallow"):  # all transfers are explicit
        return function(made.folder / packed, *([] if packed else [made.layer]), **options)


def check(made, weights, offset: int = 0) -> set[str]:
    """Each shard of this process against what is stored; gives the experts that it holds."""
    held = set()
    for field in ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale"):
        array = getattr(weights, field)
        for shard in array.addressable_shards:
            first = shard.index[0].start or 0
            for position, matrix in enumerate(np.asarray(shard.data)):
                gate, up, down, *scales = made.expert(offset + first + position)
                up_gate = np.concatenate([up, gate])
                stored = {
                    "gemm1_weights": up_gate,
                    "gemm1_weights_scale": np.concatenate([scales[1], scales[0]]),
                    "gemm2_weights": down,
                    "gemm2_weights_scale": scales[2],
                }[field]
                assert matrix.tobytes() == stored.tobytes(), (field, first, position)
                held.add(str(offset + first + position))
    return held


def main(folder: str, port: str, index: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    made = make_checkpoint(pathlib.Path(folder, index), num_experts=16)  # the same in each process
    record_reads()
    expert_bytes = 3 * 128 * 256
    flat = jax.make_mesh((8,), ("expert",))
    grid = jax.make_mesh((2, 4), ("data", "expert"))
    both = NamedSharding(grid, P(("data", "expert")))
    for streamed in (False, True):
        transfer._is_streamed = lambda share, streamed=streamed: streamed  # type: ignore
        for sharding in (flat, grid, NamedSharding(grid, P("expert")), both):
            weights = load(checkpoint.load_experts, made, sharding=sharding)
            assert weights.gemm1_weights.shape == (16, 256, 256)
            held = check(made, weights)
            # Each is read once, however many devices hold it; nothing else is read.
            assert dict(READS) == dict.fromkeys(held, expert_bytes)
            if sharding in (flat, both):
                assert held == {str(8 * int(index) + expert) for expert in range(8)}
    layer = load(checkpoint.load_layer, made, sharding=flat, rank=1, num_ranks=2)
    held = check(made, layer.experts, offset=8)
    assert dict(READS) == dict.fromkeys((*held, "shared"), expert_bytes)
    for array in jax.tree.leaves(layer[1:]):
        assert array.is_fully_replicated
        assert array.sharding.device_set == set(jax.devices())
    with pytest.raises(ValueError, match="expected an array of this process"):
        checkpoint.save_packed(f"{folder}/{index}/packed", layer)
    for sharding, error in (
        (jax.make_mesh((2, 4), ("a", "b")), "expected a mesh with an axis 'expert'"),
        (NamedSharding(grid, P(None, "expert")), "expected only axis 0"),
    ):
        with pytest.raises(ValueError, match=error):
            checkpoint.load_experts(made.folder, 3, sharding=sharding)
    with pytest.raises(ValueError, match=UNEVEN):
        checkpoint.load_experts(made.folder, 3, num_ranks=4, sharding=flat)
    own = Mesh(np.array(jax.local_devices()), ("expert",))
    with jax.set_mesh(own):  # which a load without sharding does not follow
        weights = checkpoint.load_experts(made.folder, 3)
        assert {array.device for array in weights} == {jax.local_devices()[0]}
        layer = checkpoint.load_layer(made.folder, 3, sharding=own)
    checkpoint.save_packed(f"{folder}/{index}/packed", layer)
    again = load(checkpoint.load_packed, made, "packed", sharding=own)
    assert check(made, again.experts) == {str(expert) for expert in range(16)}
    for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(layer), strict=True):
        assert new.sharding == old.sharding
        np.testing.assert_array_equal(new, old)


main(*sys.argv[1:])
