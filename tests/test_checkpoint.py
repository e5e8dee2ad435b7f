"""FP8 checkpoints of every known family, read onto one device, a mesh, tensor-parallel ranks."""

from __future__ import annotations

import json
import os
import re
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jax_moe
from jax_moe import checkpoint
from jax_moe.checkpoint import transfer
from tests import numpy_oracle
from tests.hf_checkpoint import E4M3, FAMILIES, dequantize, make_checkpoint, write_safetensors


def bits(array):
    return np.asarray(array).view(np.uint8)


def assert_expert(weights, index, stored):
    """One expert of loaded weights against what is stored: gate first there, up first here."""
    gate, up, down, gate_scale, up_scale, down_scale = stored
    size, blocks = len(up), len(up_scale)
    np.testing.assert_array_equal(bits(weights.gemm1_weights[index, :size]), bits(up))
    np.testing.assert_array_equal(bits(weights.gemm1_weights[index, size:]), bits(gate))
    np.testing.assert_array_equal(bits(weights.gemm2_weights[index]), bits(down))
    scales = weights.gemm1_weights_scale[index]
    np.testing.assert_array_equal(scales[:blocks], up_scale.astype(np.float32))
    np.testing.assert_array_equal(scales[blocks:], gate_scale.astype(np.float32))
    np.testing.assert_array_equal(weights.gemm2_weights_scale[index], down_scale.astype(np.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_of_each_family(tmp_path, family):
    made = make_checkpoint(tmp_path, family)
    layer = checkpoint.load_layer(tmp_path, made.layer)
    layer.experts.check()
    for expert in range(8):
        assert_expert(layer.experts, expert, made.expert(expert))
    assert layer.gate_weight.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(bits(layer.gate_weight), bits(made["gate.weight"]))
    if made.family.bias:
        assert layer.e_score_correction_bias.dtype == np.float32
        np.testing.assert_array_equal(layer.e_score_correction_bias, made[made.family.bias])
    else:
        assert layer.e_score_correction_bias is None
    if made.family.shared:
        layer.shared_experts.check()
        assert layer.shared_experts.num_local_experts == 1
        assert_expert(layer.shared_experts, 0, made.expert(made.family.shared))
    else:
        assert layer.shared_experts is None
    if made.family.shared_gate:
        assert layer.shared_gate.shape == (1, 256)
        np.testing.assert_array_equal(bits(layer.shared_gate), bits(made[made.family.shared_gate]))
    else:
        assert layer.shared_gate is None


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("shards", [None, 1, 5])
def test_every_rank_gets_its_experts(tmp_path, monkeypatch, shards, streamed):
    made = make_checkpoint(tmp_path, shards=shards, intermediate=256)
    if streamed:  # as on a GPU: a ring of small buffers, two experts per slab of gemm2
        monkeypatch.setattr(transfer, "_is_streamed", lambda share: True)
        monkeypatch.setattr(transfer, "SLAB_BYTES", 2 * 256 * 256)
        monkeypatch.setattr(transfer, "RING", 2)
    source = checkpoint.Checkpoint(tmp_path)
    for rank in range(2):
        with jax.transfer_guard("disallow"):  # all transfers are explicit
            weights = checkpoint.load_experts(source, made.layer, rank=rank, num_ranks=2)
        weights.check()
        assert weights.gemm1_weights.shape == (4, 512, 256)
        assert not weights.gemm1_weights.committed
        for index in range(4):
            assert_expert(weights, index, made.expert(4 * rank + index))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("intermediate", "ranks", "local"),
    [(1536, 8, 256), (640, 2, 384), (512, 8, 128), (576, 2, 384), (64, 1, 128), (256, 2, 128)],
)
def test_tensor_parallel_ranks_hold_whole_blocks(
    tmp_path, monkeypatch, intermediate, ranks, local, streamed
):
    monkeypatch.setattr(transfer, "_is_streamed", lambda share: streamed)
    made = make_checkpoint(tmp_path, num_experts=2, hidden=128, intermediate=intermediate)
    layers = [checkpoint.load_layer(tmp_path, 3, tensor_parallel=(r, ranks)) for r in range(ranks)]
    for name in (0, 1, made.family.shared):
        gate, up, down, gate_scale, up_scale, down_scale = made.expert(name)
        parts = [
            layer.experts if isinstance(name, int) else layer.shared_experts for layer in layers
        ]
        index = name if isinstance(name, int) else 0
        found = [dequantized_expert(weights, index) for weights in parts]
        for weights in parts:
            assert weights.check().intermediate_size == local
        # Rows of zeros lie between the ranks' parts and nowhere else; the others keep their order.
        for which, values, scale in ((1, gate, gate_scale), (0, up, up_scale)):
            wanted = dequantize(values, scale)
            held = np.concatenate([halves[which] for halves in found])
            padding = np.concatenate(
                [padding_rows(i, intermediate, ranks, local) for i in range(ranks)]
            )
            np.testing.assert_array_equal(held[~padding], wanted)
            assert not held[padding].any()
        held = np.concatenate([halves[2] for halves in found], 1)
        np.testing.assert_array_equal(held[:, ~padding], dequantize(down, down_scale))
        assert not held[:, padding].any()
        for weights in parts:
            assert np.asarray(weights.gemm2_weights_scale[index] > 0).all()


def padding_rows(rank, intermediate, ranks, local):
    """Which rows of a rank's part are padding, of whole blocks shared out evenly."""
    blocks = -(-intermediate // 128)
    first, end = rank * blocks // ranks, (rank + 1) * blocks // ranks
    rows = min(128 * end, intermediate) - min(128 * first, intermediate)
    return np.arange(local) >= rows


def dequantized_expert(weights, index):
    """up, gate and down of one expert, in float64."""
    arrays = [np.asarray(array[index]) for array in weights]
    gemm1, down = dequantize(*arrays[:2]), dequantize(*arrays[2:])
    return gemm1[: len(gemm1) // 2], gemm1[len(gemm1) // 2 :], down


def test_tensor_parallel_ranks_add_up_to_the_layer(tmp_path):
    make_checkpoint(tmp_path, num_experts=8, hidden=256, intermediate=320, seed=1)
    whole = checkpoint.load_layer(tmp_path, 3)
    config = jax_moe.MoEConfig(top_k=4, n_group=4, topk_group=2)
    x = np.random.default_rng(0).standard_normal((40, 256), np.float32)
    logits = x @ np.asarray(whole.gate_weight, np.float32).T

    def run(weights):
        arrays = (logits, whole.e_score_correction_bias, *numpy_oracle.quantize(x), *weights)
        return numpy_oracle.layer(*arrays, 0, 2.5, config=config, requantize=True)

    parts = [checkpoint.load_experts(tmp_path, 3, tensor_parallel=(rank, 2)) for rank in range(2)]
    # Ranks hold whole blocks, so they quantize the activations by the same maxima as the layer.
    np.testing.assert_allclose(sum(map(run, parts)), run(whole.experts), rtol=1e-9)


@pytest.mark.parametrize(
    ("size", "first_row"), [(192, 0), (192, 64), (320, 64), (64, 64), (96, 96)]
)
@pytest.mark.parametrize("module", [np, jnp])
def test_a_shard_that_was_cut_elsewhere_is_padded(size, first_row, module):
    rng = np.random.default_rng(0)
    blocks = -(-(first_row + size) // 128)
    weights = jax_moe.ExpertWeights(
        module.asarray(rng.integers(0, 100, (2, 2 * size, 256), np.uint8).view(E4M3)),
        module.asarray(rng.uniform(1, 2, (2, 2 * blocks, 2)).astype(np.float32)),
        module.asarray(rng.integers(0, 100, (2, 256, size), np.uint8).view(E4M3)),
        module.asarray(rng.uniform(1, 2, (2, 2, blocks)).astype(np.float32)),
    )
    padded = checkpoint.pad_intermediate(weights, first_row=first_row)
    assert padded.intermediate_size == 128 * blocks
    own = slice(first_row, first_row + size)
    for index in range(2):
        up, gate, down = dequantized_expert(padded, index)
        values, scales = np.asarray(weights[0][index]), np.asarray(weights[1][index])
        columns = np.asarray(weights[2][index])
        # By definition: row i of the shard lies in block (first_row + i) // 128.
        rows = np.repeat(scales.reshape(2, blocks, 2), 128, 1)[:, own].astype(np.float64)
        wide = np.repeat(rows, 128, 2) * values.reshape(2, size, 256).astype(np.float64)
        np.testing.assert_array_equal(up[own], wide[0])
        np.testing.assert_array_equal(gate[own], wide[1])
        scale = np.repeat(np.asarray(weights[3][index], np.float64), 128, 1)[:, own]
        wide = np.repeat(scale, 128, 0) * columns.astype(np.float64)
        np.testing.assert_array_equal(down[:, own], wide)
        for padding in (up, gate, down.T):
            assert not np.delete(padding, np.arange(own.start, own.stop), 0).any()
    again = checkpoint.pad_intermediate(padded)
    assert all(a is b for a, b in zip(again, padded, strict=True))


@pytest.mark.parametrize(
    "field", [None, "gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale"]
)
@pytest.mark.parametrize("value", [None, [1], 5, (1, 2, 3, 4)])
def test_only_weights_are_padded(field, value):
    weights = value
    if field is not None:
        shapes = ((1, 256, 128), (1, 2, 1), (1, 128, 128), (1, 1, 1))
        arrays = [np.zeros(s, (E4M3, np.float32)[i % 2]) for i, s in enumerate(shapes)]
        weights = jax_moe.ExpertWeights(*arrays)._replace(**{field: value})
    with pytest.raises(TypeError, match=f"^{field or 'weights'}: expected a .*, got "):
        checkpoint.pad_intermediate(weights)


def test_a_hub_cache_of_symlinks_is_followed(tmp_path):
    made = make_checkpoint(tmp_path / "checkpoint")
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(made.folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    weights = checkpoint.load_experts(snapshot, 3)
    for expert in range(8):
        assert_expert(weights, expert, made.expert(expert))


def test_a_shard_of_more_than_four_gigabytes(tmp_path):
    """Sparse: 5 GB of nothing before the tensors that are read."""
    made = make_checkpoint(tmp_path / "small", shards=None, num_experts=2)
    hole = 5 * 2**30 + 8
    edited = tmp_path / "large"
    edited.mkdir()
    content = (made.folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + hole for offset in entry["data_offsets"]]
    header["nothing"] = {"dtype": "F4", "shape": [2, hole], "data_offsets": [0, hole]}
    text = json.dumps(header).encode()
    with (edited / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(hole, os.SEEK_CUR)
        file.write(content[8 + length :])
    assert (edited / "model.safetensors").stat().st_size > 2**32
    weights = checkpoint.load_experts(edited, 3)
    for expert in range(2):
        assert_expert(weights, expert, made.expert(expert))


def test_single_files_are_found_without_an_index(tmp_path):
    made = make_checkpoint(tmp_path, shards=None)
    write_safetensors(tmp_path / "other.safetensors", {"model.norm.weight": np.ones(3, np.float32)})
    source = checkpoint.Checkpoint(tmp_path)
    assert set(source.weight_map) == set(made.tensors)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("spec", ["mesh", P("expert"), P(), "device"])
def test_where_arrays_go_under_a_transfer_guard(tmp_path, monkeypatch, spec, streamed):
    """Loading is the transfer that was asked for."""
    monkeypatch.setattr(transfer, "_is_streamed", lambda share: streamed)
    made = make_checkpoint(tmp_path, num_experts=2)
    mesh = jax.make_mesh((1,), ("expert",))
    sharding = {"mesh": mesh, "device": SingleDeviceSharding(jax.devices()[0])}.get(spec)
    sharding = sharding or NamedSharding(mesh, spec)
    with jax.transfer_guard("disallow"):
        layer = checkpoint.load_layer(tmp_path, made.layer, sharding=sharding)
        checkpoint.save_packed(tmp_path / "packed", layer)
        again = checkpoint.load_packed(tmp_path / "packed", sharding=sharding)
    wanted = {
        False: NamedSharding(mesh, P("expert")) if spec == "mesh" else sharding,
        True: sharding if spec == "device" else NamedSharding(mesh, P()),
    }
    for path, array in jax.tree.leaves_with_path(layer):
        assert array.sharding == wanted[path[0].name != "experts"]
    for expert in range(2):
        assert_expert(layer.experts, expert, made.expert(expert))
    for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(layer), strict=True):
        assert new.sharding == old.sharding
        np.testing.assert_array_equal(bits(new), bits(old))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (P(None, "expert"), "only axis 0 (experts) split, got P(None, 'expert')"),
        (P("expert", *[None] * 3), "a spec of at most 3 axes, got P('expert', None, None, None)"),
    ],
)
def test_a_sharding_that_no_array_can_have_is_refused(tmp_path, spec, said):
    made = make_checkpoint(tmp_path, num_experts=2)
    sharding = NamedSharding(jax.make_mesh((1,), ("expert",)), spec)
    with pytest.raises(ValueError, match=f"^{re.escape(f'sharding: expected {said}')}$"):
        checkpoint.load_layer(tmp_path, made.layer, sharding=sharding)


def test_files_are_not_read_while_jax_traces(tmp_path):
    made = make_checkpoint(tmp_path, num_experts=2)
    checkpoint.save_packed(tmp_path / "packed", checkpoint.load_layer(tmp_path, made.layer))
    for load in (
        lambda: checkpoint.load_layer(tmp_path, made.layer),
        lambda: checkpoint.load_experts(tmp_path, made.layer),
        lambda: checkpoint.load_packed(tmp_path / "packed"),
    ):
        for traced in (jax.jit(load), lambda load=load: jax.eval_shape(load)):
            with pytest.raises(RuntimeError, match=r"outside of jax\.jit .*, got one while JAX"):
                traced()
