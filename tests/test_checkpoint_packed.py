"""Weights packed for the next start come back; anything else is refused."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import resource
import signal
import struct
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from jax_moe import checkpoint, nn
from jax_moe.checkpoint import packed
from tests import test_nn
from tests.hf_checkpoint import E4M3, make_checkpoint, write_safetensors


def same(new, old):
    assert type(new) is type(old)
    leaves = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    for array, wanted in leaves:
        assert array.dtype == wanted.dtype
        assert np.asarray(array).tobytes() == np.asarray(wanted).tobytes()
    assert jax.tree.structure(new) == jax.tree.structure(old)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "minimax_m2"])
def test_packed_layers_come_back(tmp_path, family):
    made = make_checkpoint(tmp_path, family, intermediate=192)
    layer = checkpoint.load_layer(tmp_path, made.layer, tensor_parallel=(1, 2))
    checkpoint.save_packed(tmp_path / "new/packed", layer)
    same(checkpoint.load_packed(tmp_path / "new/packed"), layer)
    assert os.listdir(tmp_path / "new/packed") == [packed.FILE]
    # In place of the other; NumPy arrays do as well.
    numpy = jax.tree.map(np.asarray, layer.experts)
    checkpoint.save_packed(tmp_path / "new/packed", numpy)
    same(checkpoint.load_packed(tmp_path / "new/packed", progress=True), layer.experts)


@pytest.fixture
def saved(tmp_path):
    make_checkpoint(tmp_path, "qwen3_next")
    layer = checkpoint.load_layer(tmp_path, 3)
    checkpoint.save_packed(tmp_path / "packed", layer)
    return tmp_path / "packed", layer


def contents(folder):
    content = (folder / packed.FILE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    dtypes = {"F8_E4M3": E4M3, "F32": np.float32, "BF16": ml_dtypes.bfloat16}
    arrays = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        array = np.frombuffer(content[begin:end], dtypes[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    return arrays, metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, m: m.pop("format"), "format: expected 'jax_moe packed weights', got None"),
        (lambda a, m: m.update(version="2"), "version: expected '1', got '2'"),
        (lambda a, m: m.update(kind="Layer"), "kind: expected 'ExpertWeights' or 'LayerWeights'"),
        (lambda a, m: m.update(kind="ExpertWeights"), "'gate_weight': unknown tensor"),
        (lambda a, m: a.pop("gate_weight"), "'gate_weight': missing"),
        (lambda a, m: a.pop("experts.gemm2_weights"), "'experts.gemm2_weights': missing"),
        (lambda a, m: a.pop("shared_experts.gemm1_weights"), "gemm1_weights': missing"),
        (lambda a, m: a.update(more=np.zeros(3, np.float32)), "'more': unknown tensor"),
        (lambda a, m: resize(a, "experts.gemm1_weights", 0, 4), "gemm2_weights': expected F8_E4M3"),
        (lambda a, m: resize(a, "experts.gemm1_weights", 1, 255), "with I a multiple of 128"),
        (lambda a, m: resize(a, "experts.gemm1_weights", 2, 192), "H to be a multiple of 128"),
        (lambda a, m: resize(a, "experts.gemm1_weights_scale", 1, 1), "expected F32 [8, 2, 2]"),
        (lambda a, m: resize(a, "shared_gate", 1, 128), "'shared_gate': expected F32 or BF16"),
        (lambda a, m: a.update(e_score_correction_bias=np.zeros(4, np.float32)), "F32 [8], got"),
    ],
)
def test_packed_files_that_do_not_fit_are_refused(saved, change, message):
    folder, _ = saved
    arrays, metadata = contents(folder)
    change(arrays, metadata)
    write_safetensors(folder / packed.FILE, arrays, metadata)
    with pytest.raises(ValueError, match=packed.FILE) as caught:
        checkpoint.load_packed(folder)
    assert message in str(caught.value)


def resize(arrays, name, axis, size):
    arrays[name] = np.take(arrays[name], range(size), axis)


def test_packed_files_that_are_damaged_or_missing_are_refused(saved, tmp_path):
    folder, _ = saved
    content = (folder / packed.FILE).read_bytes()
    (folder / packed.FILE).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{packed.FILE}: tensors take .* the file holds"):
        checkpoint.load_packed(folder)
    (folder / packed.FILE).unlink()
    with pytest.raises(ValueError, match=f"expected {packed.FILE}, as save_packed writes it"):
        checkpoint.load_packed(folder)
    with pytest.raises(ValueError, match=r"nowhere: expected the folder of .*, got nothing"):
        checkpoint.load_packed(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("file", "a file"),
        ("loop", "a link that loops"),
        ("link", "a link to nothing"),
        ("/dev/full", "a link, socket or device"),
    ],
)
def test_what_is_no_folder_is_named(saved, tmp_path, name, found):
    path, (_, layer) = tmp_path / name, saved
    (tmp_path / "file").write_text("text")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"^folder: {path}: expected a folder, got {found}$"):
        checkpoint.save_packed(path, layer)
    said = f"^folder: {path}: expected the folder of .*, got {found}$"
    for read in (checkpoint.load_packed, checkpoint.Checkpoint):
        with pytest.raises(ValueError, match=said):
            read(path)


def test_a_save_that_fails_leaves_what_was_there(saved, monkeypatch):
    import safetensors.numpy

    folder, layer = saved

    def fail(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save_packed(folder, layer.experts)
    assert os.listdir(folder) == [packed.FILE]
    same(checkpoint.load_packed(folder), layer)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_is_honoured(saved, umask):
    folder, layer = saved
    before = os.umask(umask)
    try:
        checkpoint.save_packed(folder, layer.experts)
    finally:
        os.umask(before)
    assert (folder / packed.FILE).stat().st_mode & 0o777 == 0o666 & ~umask
    assert os.listdir(folder) == [packed.FILE]


def test_a_folder_that_cannot_be_written_to_is_named(saved, monkeypatch):
    folder, layer = saved

    def fail(path, *mode):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "mkdir", fail)  # root may write everywhere
    with pytest.raises(PermissionError) as caught:
        checkpoint.save_packed(folder, layer)
    assert caught.value.filename == str(folder)


def test_a_full_disk_names_the_file(saved):
    folder, layer = saved
    before = (folder / packed.FILE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(OSError, match=rf"{packed.FILE}: cannot be written: .*too large"):
            checkpoint.save_packed(folder, layer.experts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(folder) == [packed.FILE]
    assert (folder / packed.FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("field", "dtype", "wanted"),
    [
        ("gate_weight", np.float16, "bfloat16 or float32"),
        ("e_score_correction_bias", ml_dtypes.bfloat16, "float32"),
        ("shared_gate", np.float16, "bfloat16 or float32"),
    ],
)
def test_what_is_saved_is_what_the_layer_takes(tmp_path, field, dtype, wanted):
    pytest.importorskip("flax")
    layer = test_nn.make()
    layer = layer._replace(**{field: getattr(layer, field).astype(dtype)})
    x = test_nn.hidden(2)
    for use in (
        lambda: checkpoint.save_packed(tmp_path / "none", layer),
        lambda: nn.moe_layer(layer, x, config=test_nn.CONFIG, backend="xla"),
        lambda: nn.DeepSeekMoE.from_weights(test_nn.CONFIG, layer, backend="xla"),
    ):
        with pytest.raises(TypeError, match=rf"^{field}: expected {wanted} \["):
            use()


def test_what_is_no_weights_is_not_saved(saved, monkeypatch):
    folder, layer = saved
    none = jax.tree.map(lambda array: np.asarray(array)[:0], layer.experts)
    wide = layer.experts._replace(gemm1_weights_scale=layer.experts.gemm1_weights_scale[:1])
    for weights, error, message in (
        (tuple(layer), TypeError, "weights: expected ExpertWeights or LayerWeights, got tuple"),
        (wide, ValueError, "gemm1_weights_scale: expected"),
        (none, ValueError, r"^gemm1_weights: expected E_local of at least 1, got 0"),
        (layer._replace(experts=none), ValueError, r"^weights\.experts\.gemm1.*at least 1, got 0"),
        (layer._replace(gate_weight=None), TypeError, "gate_weight: expected"),
        (layer._replace(shared_gate=layer.gate_weight), ValueError, "shared_gate: expected"),
        (layer._replace(shared_experts=layer.experts), ValueError, "gemm1_weights: expected"),
        (None, TypeError, "weights: expected ExpertWeights or LayerWeights, got NoneType"),
        (layer._replace(experts=[1]), TypeError, r"weights\.experts: expected .*, got list"),
        (layer._replace(shared_experts=5), TypeError, r"weights\.shared_experts: .*, got int"),
        (layer.experts._replace(gemm2_weights=[1]), TypeError, "gemm2_weights: .*, got list"),
    ):
        with pytest.raises(error, match=message):
            checkpoint.save_packed(folder / "none", weights)
    assert not (folder / "none").exists()
    for name in (None, [], 5, "", "a\0b", "\ud800"):
        with pytest.raises((TypeError, ValueError), match=r"^folder: expected a path, got "):
            checkpoint.save_packed(name, layer)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="save_packed: expected the package safetensors"):
        checkpoint.save_packed(folder / "none", layer)
    same(checkpoint.load_packed(folder), layer)  # which needs no safetensors
