"""The tuner of the Triton kernels: its tables, and what they are measured with."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

import jax_moe
import jax_moe.tune
from jax_moe.models import MODELS
from pallas_kernels import device
from pallas_kernels.tuning import cache, search, table_format
from pallas_kernels.tuning.cache import Gpu
from pallas_kernels.tuning.search import Case
from pallas_kernels.tuning.table_format import Key, Pair
from tests.test_tune import H100, TINY


@pytest.fixture
def tilings_of_triton(monkeypatch, tmp_path):
    """Triton's tables on this GPU."""
    tilings_of_triton = pytest.importorskip("pallas_kernels.triton.tilings")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cache.SWITCH, raising=False)
    monkeypatch.setattr(device, "local_gpu", lambda: H100)
    cache.choose.cache_clear()
    yield tilings_of_triton
    cache.choose.cache_clear()


def shipped_of(tilings_of_triton, capability):
    kernels = tilings_of_triton.kernels(capability)
    gpu = Gpu("{}.{}".format(*divmod(capability, 10)))
    return cache.nearest_shipped(kernels, gpu, table_format.DEEPSEEK_V3)


def write_triton(tilings_of_triton, **changes):
    table = {
        block_m: Pair(*(dataclasses.replace(config, **changes) for config in pair))
        for block_m, pair in shipped_of(tilings_of_triton, 90).items()
    }
    path = cache.path_of("triton", H100.device_kind, table_format.DEEPSEEK_V3)
    table_format.write(path, Key("triton", H100.device_kind, table_format.DEEPSEEK_V3), table, [])
    return table


def test_triton_takes_the_same_way(tilings_of_triton):
    """The user's table counts for this device, not for others that are compiled for."""
    table = write_triton(tilings_of_triton, num_warps=4, num_stages=2)
    assert table != shipped_of(tilings_of_triton, 90)
    sizes = table_format.DEEPSEEK_V3
    assert {block_m: tilings_of_triton.choose(block_m, 90, *sizes) for block_m in table} == table
    for block_m, pair in shipped_of(tilings_of_triton, 100).items():
        assert tilings_of_triton.choose(block_m, 100, *sizes) == pair


def test_a_triton_tiling_that_does_not_fit_is_ignored(tilings_of_triton):
    write_triton(tilings_of_triton, num_stages=8)
    with pytest.warns(UserWarning, match="bytes of shared memory"):
        chosen = tilings_of_triton.choose(128, 90, *table_format.DEEPSEEK_V3)
    assert chosen == shipped_of(tilings_of_triton, 90)[128]


@pytest.mark.parametrize("role", Pair._fields)
def test_cases_are_what_the_triton_kernels_take(tilings_of_triton, monkeypatch, role):
    triton_tune = pytest.importorskip("pallas_kernels.triton.tune")
    monkeypatch.setattr(jax, "local_devices", lambda: [H100])
    case, weights = Case(role, 16, 12), search.random_weights(TINY)
    prepared = triton_tune.prepare(case, weights, TINY)
    kernel = prepared.build(shipped_of(tilings_of_triton, 90)[16].up_projection)
    outputs = jax.eval_shape(kernel, *prepared.arrays)
    rows = prepared.rows([jnp.ones(out.shape, out.dtype) for out in outputs])
    live = (search.draw_plan(12, 16, TINY).row_token >= 0).sum()
    columns = {"up_projection": TINY.intermediate_size, "down_projection": TINY.hidden_size}[role]
    assert rows.shape == (live, columns)


@pytest.mark.parametrize("capability", ["8.9", "9.0", "10.0", "12.0"])
def test_every_triton_class_is_measured_somewhere(tilings_of_triton, capability):
    triton_tune = pytest.importorskip("pallas_kernels.triton.tune")
    gpu = types.SimpleNamespace(device_kind="Some", compute_capability=capability)
    tuner = triton_tune.tuner(gpu)
    for model in MODELS:
        for block_m in tuner.kernels.block_ms:
            search.tokens_of(block_m, tuner, jax_moe.tune.sizes_of(model))


def test_the_triton_tuner_refuses_a_gpu_without_fp8(tilings_of_triton):
    triton_tune = pytest.importorskip("pallas_kernels.triton.tune")
    gpu = types.SimpleNamespace(device_kind="An A100", compute_capability="8.0")
    reason = triton_tune.tuner(gpu)
    assert reason == "needs compute capability 8.9 or newer, got An A100"
