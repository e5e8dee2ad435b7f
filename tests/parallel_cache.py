"""Lowered layers are kept for the next process inside of `jax.shard_map`; needs eight CPU devices.

`tests/test_parallel.py` runs this file in a process of its own.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_moe import entry, lowering_cache
from jax_moe.backends import xla
from pallas_kernels import device
from tests.moe_inputs import bits
from tests.parallel_cases import Case, expected, run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where they are kept, as if the backend on these devices were one whose lowering is slow."""
    gpu = SimpleNamespace(device_kind="H100", compute_capability="9.0", core_count=132)
    monkeypatch.setattr(device, "local_gpu", lambda: gpu)
    monkeypatch.setattr(lowering_cache, "_PLATFORM", "cpu")
    monkeypatch.setattr(xla, "KEEPS_LOWERED", True)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("mesh", ["auto", "explicit"])
def test_the_next_process_does_not_trace_a_layer_over_ranks(folder, monkeypatch, mesh):
    case = Case(ranks=4, tokens=3, mesh=mesh)
    wanted = bits(expected(case))
    for file in folder.iterdir():  # of the oracle's own layers
        file.unlink()
    jax.clear_caches()
    np.testing.assert_array_equal(bits(run(case)[0]), wanted)
    kept = sorted(folder.glob("jax_moe-*"))
    assert len(kept) == 2, "routing at home, and the local layer"

    def never(*_, **__):
        raise AssertionError("traced again")

    jax.clear_caches()
    monkeypatch.setattr(entry, "layer", never)
    monkeypatch.setattr(xla, "route", never)
    for check_vma in (True, False):
        out, _ = run(case._replace(check_vma=check_vma))
        np.testing.assert_array_equal(bits(out), wanted)
    assert sorted(folder.glob("jax_moe-*")) == kept
