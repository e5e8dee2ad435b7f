"""`python -m bench.loading`: the checkpoint that it writes is one, and all of it is read."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors import SafetensorError

from bench import loading
from bench.failures import FileError
from bench.workloads import REDUCED
from jax_moe import checkpoint


def test_a_run_without_a_gpu(tmp_path, capsys):
    scratch = tmp_path / "new" / "scratch"
    assert loading.main([f"--output={tmp_path / 'out'}", f"--scratch={scratch}"]) == 0
    assert not scratch.parent.exists()
    assert "times mean nothing" in capsys.readouterr().out
    assert [one.name for one in tmp_path.iterdir()] == ["out"]  # the checkpoint is gone
    written = json.loads((tmp_path / "out" / "loading.json").read_text())
    values = REDUCED.num_local_experts * 3 * REDUCED.hidden_size * REDUCED.intermediate_size
    assert written["bytes"] > values
    assert {name: len(times) for name, times in written["seconds"].items()} == {
        "load": loading.REPEATS,
        "read": loading.REPEATS,
    }
    assert written["share"] is None
    assert (written["about"]["sizes"], written["about"]["reduced"]) == (REDUCED._asdict(), True)


def test_a_checkpoint_that_the_disk_has_no_room_for_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(SystemExit, match="safetensors: cannot be written: I/O error: No space"):
        loading.main([f"--output={tmp_path / 'out'}", f"--scratch={tmp_path}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_so_is_a_small_file_of_it(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(FileError, match=f"{re.escape(name)}: cannot be written: Is a directory"):
        loading.write_checkpoint(tmp_path, REDUCED)


def test_the_checkpoint_is_that_of_a_rank(tmp_path):
    loading.write_checkpoint(tmp_path, REDUCED)
    weights = checkpoint.load_experts(tmp_path, loading.LAYER)
    assert weights.num_local_experts == REDUCED.num_local_experts
    assert weights.hidden_size == REDUCED.hidden_size
    assert weights.intermediate_size == REDUCED.intermediate_size
    bits = np.asarray(weights.gemm1_weights).view(np.uint8)
    assert len(np.unique(bits[0])) == len(np.unique(bits[-1])) == 127
    assert (bits[0] != bits[1]).mean() > 0.9


def test_every_byte_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_PIECE", 7)
    files = [tmp_path / "a", tmp_path / "b"]
    for file, size in zip(files, (20, 3), strict=True):
        file.write_bytes(bytes(size))
    assert loading.read_all(files, 2) == 23
