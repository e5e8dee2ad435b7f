"""Checkpoints on meshes, by several processes; host memory, failures, the document's examples."""

from __future__ import annotations

import gc
import os
import pathlib
import re
import socket
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_moe import checkpoint
from jax_moe.checkpoint import transfer
from tests.backend_cases import slow
from tests.h100_target import h100_sharding
from tests.hf_checkpoint import E4M3, make_checkpoint

ROOT = pathlib.Path(__file__).parent.parent
LESS_OPTIMIZED = "--xla_backend_optimization_level=0"  # compiled in half of the time


def test_each_process_of_a_mesh_reads_what_its_devices_hold(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{LESS_OPTIMIZED} --xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tests/checkpoint_mesh.py"), str(tmp_path), port]
    running = [
        subprocess.Popen([*command, index], env=environment, stderr=subprocess.PIPE, text=True)
        for index in "01"
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)


@pytest.mark.parametrize("streamed", [False, True])
def test_peak_host_memory(tmp_path, monkeypatch, streamed):
    made = make_checkpoint(tmp_path, num_experts=32, hidden=512, intermediate=512)
    layer_bytes = 32 * 3 * 512 * 512
    monkeypatch.setattr(transfer, "_is_streamed", lambda share: streamed)
    monkeypatch.setattr(transfer, "SLAB_BYTES", 2**20)
    monkeypatch.setattr(transfer, "RING", 4)
    checkpoint.load_experts(tmp_path, made.layer)  # imports, compiles
    tracemalloc.start()
    try:
        weights = checkpoint.load_experts(tmp_path, made.layer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert weights.gemm1_weights.nbytes + weights.gemm2_weights.nbytes == layer_bytes
    # Without a GPU the host has the arrays themselves; with one, only the ring.
    assert peak < (5 * 2**20 if streamed else 1.2 * layer_bytes)


def test_a_slab_is_placed_without_moving_anything_else():
    """Compiled for an H100: the array is updated where it lies, with no memory beside it."""
    h100 = h100_sharding()
    specs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=h100)
        for shape, dtype in (
            ((32, 4096, 7168), E4M3),
            ((1, 4096, 7168), E4M3),
            ((), np.int32),
        )
    ]
    memory = transfer._place.lower(*specs).compile().memory_analysis()
    assert memory.temp_size_in_bytes == 0
    assert memory.alias_size_in_bytes == 32 * 4096 * 7168


@pytest.mark.gpu
def test_onto_a_gpu(tmp_path, monkeypatch):
    made = make_checkpoint(tmp_path, num_experts=32, hidden=512, intermediate=192)
    monkeypatch.setattr(transfer, "SLAB_BYTES", 2**20)
    monkeypatch.setattr(transfer, "RING", 3)
    mesh = Mesh(np.array(jax.devices()[:1]), ("expert",))
    for sharding in (None, mesh):
        layer = checkpoint.load_layer(tmp_path, made.layer, sharding=sharding)
        devices = set().union(*(array.devices() for array in jax.tree.leaves(layer)))
        assert devices == {jax.devices("gpu")[0]}
        assert layer.experts.check().intermediate_size == 256
        for expert in range(32):
            gate, up, down = made.expert(expert)[:3]
            values = np.asarray(layer.experts.gemm1_weights[expert]).view(np.uint8)
            np.testing.assert_array_equal(values[:192], up.view(np.uint8))
            np.testing.assert_array_equal(values[256:448], gate.view(np.uint8))
            assert not values[192:256].any()
            values = np.asarray(layer.experts.gemm2_weights[expert]).view(np.uint8)
            np.testing.assert_array_equal(values[:, :192], down.view(np.uint8))
            assert not values[:, 192:].any()


def test_progress(tmp_path, capsys, monkeypatch):
    make_checkpoint(tmp_path)
    checkpoint.load_layer(tmp_path, 3, progress=True)
    shown = capsys.readouterr().err
    assert "layer 3: 100%" in shown
    assert "885k/885k" in shown  # (8 + 1 shared) * 3 * 128 * 256
    checkpoint.load_layer(tmp_path, 3)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    checkpoint.load_layer(tmp_path, 3)
    with pytest.raises(ImportError, match="progress: expected the package tqdm"):
        checkpoint.load_layer(tmp_path, 3, progress=True)


@pytest.mark.parametrize(
    ("streamed", "failing"),
    [
        (False, "read"),
        (True, "transfer"),
        slow(False, "transfer"),
        slow(True, "read"),
    ],
)
def test_nothing_is_half_loaded(tmp_path, monkeypatch, streamed, failing):
    make_checkpoint(tmp_path, num_experts=16)
    monkeypatch.setattr(transfer, "_is_streamed", lambda share: streamed)
    monkeypatch.setattr(transfer, "RING", 3)
    gc.collect()
    before = len(jax.live_arrays())
    calls = []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("the second one fails")
        return real(*arguments, **options)

    where = (transfer, "_read") if failing == "read" else (jax, "device_put")
    real = getattr(*where)
    monkeypatch.setattr(*where, fail)
    with pytest.raises(ValueError, match="the second one fails"):
        checkpoint.load_experts(tmp_path, 3, num_threads=2)
    monkeypatch.undo()
    gc.collect()  # the frames of the traceback
    assert len(jax.live_arrays()) == before
    assert checkpoint.load_experts(tmp_path, 3).num_local_experts == 16


def test_the_examples_of_the_document_run(tmp_path):
    make_checkpoint(tmp_path / "DeepSeek-V3", num_experts=16, intermediate=256)
    document = (ROOT / "docs/checkpoints.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert len(examples) == 7
    examples.append("assert out.shape == x.shape and jnp.isfinite(out).all()\n")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{LESS_OPTIMIZED} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", "".join(examples)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = ["(16, 512, 256) float8_e4m3fn", "P('expert',)", "256 128", "256"]
    assert done.stdout.splitlines() == lines
