"""The tuners: their inputs, the search with a fake clock, the command line."""

from __future__ import annotations

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import jax_moe
from pallas_kernels import device
from pallas_kernels.mosaic import tilings, tune
from pallas_kernels.mosaic.hopper.grouped_matmul import MatmulConfig
from pallas_kernels.tuning import cache, search
from pallas_kernels.tuning.cache import Pair
from pallas_kernels.tuning.search import Case, Prepared, Sizes, Tuner

TINY = Sizes(hidden=256, intermediate=128, experts=8, local_experts=2, top_k=2)
START = MatmulConfig(block_m=16, num_stages=2, sms=2)
H100 = types.SimpleNamespace(device_kind="An H100", compute_capability="9.0", core_count=2)


class Bar:
    """What `tune` needs of a progress bar."""

    def __init__(self):
        self.total, self.done, self.lines = 0, 0, []

    def update(self, steps):
        self.done += steps

    def write(self, line):
        self.lines.append(line)


def interpreted(case, weights, sizes):
    return tune.prepare(case, weights, sizes, interpret=plgpu.InterpretGPUParams())


def without_kernels(case, weights, sizes):
    return Prepared((jnp.ones(4),), lambda config: jnp.sin, lambda result: result)


def tiny_tuner(prepare=without_kernels, **choices):
    return Tuner(
        kernels="mosaic",
        shipped={16: Pair(START, START)},
        choices=lambda _: choices,
        block_m=lambda *_: 16,
        prepare=prepare,
        check=lambda *_: None,
        tokens=(12,),
    )


def clock(times):
    """A timer whose n-th answer is `times[n]`."""
    remaining = iter(times)
    return lambda function, arrays: next(remaining)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_the_plan_is_that_of_the_layer(num_tokens, block_m):
    """The ids that the rows stand for, planned by `jax_moe`, give the same arrays."""
    sizes = Sizes(256, 128, experts=8, local_experts=5, top_k=3)
    plan = search.draw_plan(num_tokens, block_m, sizes)
    ids = [[] for _ in range(num_tokens)]
    for expert, (first, size) in enumerate(zip(plan.group_offsets, plan.group_sizes, strict=True)):
        for token in plan.row_token[first : first + size]:
            ids[token].append(expert)
    assert max(map(len, ids)) <= 3
    topk_ids = np.array([row + [-1] * (3 - len(row)) for row in ids], np.int32)
    counts = {"num_local_experts": 5, "num_experts": 8}
    expected = jax_moe.plan_groups(topk_ids, 0, **counts, backend="xla")
    np.testing.assert_array_equal(plan.group_sizes, expected.group_sizes)
    np.testing.assert_array_equal(plan.group_sizes.sum(), (plan.row_token >= 0).sum())
    tiles = -(-plan.group_sizes // block_m)
    np.testing.assert_array_equal(plan.num_tiles, [tiles.sum()])
    np.testing.assert_array_equal(plan.group_offsets, (tiles.cumsum() - tiles) * block_m)
    live = np.repeat(np.arange(5), tiles)
    np.testing.assert_array_equal(plan.tile_expert[: len(live)], live)
    assert len(plan.row_token) % 32 == 0
    assert len(plan.tile_expert) * block_m == len(plan.row_token)
    if block_m == expected.block_m:
        np.testing.assert_array_equal(plan.group_offsets, expected.group_offsets)


def test_both_matmuls_are_measured_and_the_fastest_tiling_kept():
    bar = Bar()
    # Start, then 3 and 4 stages of the up-projection; start, 3 and 4 of the down-projection.
    timer = clock([10.0, 8.0, 9.0, 10.0, 9.95, 7.0])
    tuner = tiny_tuner(interpreted, num_stages=(2, 3, 4))
    table, rows = search.tune(tuner, timer, TINY, bar)
    assert table[16].up_projection.num_stages == 3
    assert table[16].down_projection.num_stages == 4
    assert [row["us"] for row in rows] == [10.0, 8.0, 9.0, 10.0, 9.9, 7.0]
    assert bar.done == bar.total == 8
    assert len(bar.lines) == len(rows)
    json.dumps(rows)


def test_less_than_a_percent_is_noise():
    timer = clock([10.0, 9.95, 9.91, 10.0, 10.0, 10.0])
    table, _ = search.tune(tiny_tuner(num_stages=(3, 4)), timer, TINY, Bar())
    assert table[16] == Pair(START, START)


def test_a_tiling_that_cannot_be_built_is_a_row_with_the_reason():
    bar = Bar()
    tuner = tiny_tuner(interpreted, num_stages=(1, 99), tail_widths=((24,),))
    table, rows = search.tune(tuner, clock([5.0, 5.0]), TINY, bar)
    assert table[16] == Pair(START, START)
    failures = [row["failure"] for row in rows if "failure" in row]
    assert [f.split(":")[0] for f in failures] == ["ValueError"] * 6
    assert "num_stages: expected at least 2" in failures[0]
    assert "shared memory" in failures[1]
    assert "tail_widths" in failures[2]
    assert bar.done == bar.total


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_wrong_result_has_no_time(factor):
    def prepare(case, weights, sizes):
        def build(config):
            return lambda x: jnp.sin(x) * (factor if config.num_stages == 3 else 1.0)

        return without_kernels(case, weights, sizes)._replace(build=build)

    tuner = tiny_tuner(prepare, num_stages=(3,))
    table, rows = search.tune(tuner, clock([5.0, 5.0]), TINY, Bar())
    assert table[16] == Pair(START, START)
    assert [("failure" in row, "us" in row) for row in rows] == [(False, True), (True, False)] * 2
    assert all("differs from the first" in row["failure"] for row in rows[1::2])


def test_where_the_shipped_tiling_fails_the_first_that_works_is_next():
    config = search.search(
        START,
        {"num_stages": (3, 4, 5)},
        lambda config, changes: {3: 9.0, 4: 7.0}.get(changes.get("num_stages"), float("inf")),
    )
    assert config.num_stages == 4


def test_every_class_is_measured_somewhere():
    tuner = tune.tuner(H100)
    for block_m in tilings.SHIPPED:
        tokens = search.tokens_of(block_m, tuner, search.DEEPSEEK_V3)
        assert tilings.block_m(tokens * 8 / 256) == block_m


def test_the_choices_of_every_shipped_tiling_can_be_made():
    for pair in tilings.SHIPPED.values():
        for config in pair:
            choices = tune.choices(config)
            assert len(choices["num_stages"]) > 1
            for tail_widths in choices["tail_widths"]:
                MatmulConfig(config.block_m, 2, tail_widths)
    assert tune.choices(tilings.SHIPPED[64].up_projection)["tail_widths"] == [
        (),
        (16, 32, 48),
        (32,),
    ]


def test_both_schedulers_are_tried():
    for pair in tilings.SHIPPED.values():
        assert tune.choices(pair.up_projection)["scheduler"] == ("static", "dynamic")


def run_main(monkeypatch, tmp_path, *argv):
    """`main` on a GPU that is not there, with tiny sizes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device, "local_gpu", lambda: H100)
    monkeypatch.setattr(search, "cupti_timer", lambda n: clock([9.0, 5.0, 9.0, 9.0]))
    tuner = tiny_tuner(num_stages=(3,))
    return search.main(list(argv), "here.tune", lambda gpu: tuner, TINY)


def test_the_command_fills_the_cache(monkeypatch, tmp_path, capsys):
    assert run_main(monkeypatch, tmp_path) == 0
    path = cache.path_of("mosaic", H100.device_kind)
    assert f"{path}: written; programs started from now on use it" in capsys.readouterr().out
    shipped = {16: Pair(START, START)}
    table = cache.read(path, "mosaic", H100.device_kind, shipped, lambda *_: None)
    assert table[16] == Pair(MatmulConfig(16, 3, sms=2), START)
    assert [row.get("us") for row in json.loads(path.read_text())["measured"]] == [9, 5, 9, 9]


def test_the_command_writes_where_it_is_told(monkeypatch, tmp_path, capsys):
    path = tmp_path / "new" / "table.json"
    assert run_main(monkeypatch, tmp_path, f"--output={path}") == 0
    assert path.exists()
    assert not (tmp_path / "jax_moe").exists()


def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(search, "tune", functools.partial(pytest.fail, "measured first"))
    assert run_main(monkeypatch, blocked) == 1
    error = capsys.readouterr().err
    assert error.startswith("here.tune: cannot write the table: ")
    assert str(blocked) in error
    assert error.count("\n") == 1


def test_a_disk_that_fills_up_meanwhile_is_one_line(monkeypatch, tmp_path, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write", full)
    assert run_main(monkeypatch, tmp_path) == 1
    assert "cannot write the table: [Errno 28] No space left" in capsys.readouterr().err


def test_without_a_fitting_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(device, "local_gpu", lambda: None)
    assert search.main([], "here.tune", tune.tuner) == 1
    assert capsys.readouterr().err == "here.tune: needs an NVIDIA GPU, and JAX sees none\n"
    ada = types.SimpleNamespace(device_kind="An Ada", compute_capability="8.9")
    monkeypatch.setattr(device, "local_gpu", lambda: ada)
    assert search.main([], "here.tune", tune.tuner) == 1
    assert "needs a Hopper GPU, and this is a An Ada" in capsys.readouterr().err


def test_random_e4m3_is_finite_and_spread():
    values = search.random_e4m3(0, (64, 256)).astype(jnp.float32)
    assert jnp.isfinite(values).all()
    assert len(np.unique(values)) > 100
    assert float(jnp.abs(values).max()) < 2


@pytest.fixture
def tilings_of_triton(monkeypatch, tmp_path):
    """Triton's tables on this GPU."""
    tilings_of_triton = pytest.importorskip("pallas_kernels.triton.tilings")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cache.SWITCH, raising=False)
    monkeypatch.setattr(device, "local_gpu", lambda: H100)
    tilings_of_triton._table_of.cache_clear()
    yield tilings_of_triton
    tilings_of_triton._table_of.cache_clear()


def write_triton(tilings_of_triton, **changes):
    table = {
        block_m: Pair(*(dataclasses.replace(config, **changes) for config in pair))
        for block_m, pair in tilings_of_triton.shipped(90).items()
    }
    path = cache.path_of(tilings_of_triton.KERNELS, H100.device_kind)
    cache.write(path, tilings_of_triton.KERNELS, H100.device_kind, table, [])
    return table


def test_triton_takes_the_same_way(tilings_of_triton):
    """The user's table counts for this device, not for others that are compiled for."""
    table = write_triton(tilings_of_triton, num_warps=4, num_stages=2)
    assert table != tilings_of_triton.shipped(90)
    assert {block_m: tilings_of_triton.choose(block_m, 90) for block_m in table} == table
    for block_m, pair in tilings_of_triton.shipped(100).items():
        assert tilings_of_triton.choose(block_m, 100) == pair


def test_a_triton_tiling_that_does_not_fit_is_ignored(tilings_of_triton):
    write_triton(tilings_of_triton, num_stages=8)
    with pytest.warns(UserWarning, match="bytes of shared memory"):
        assert tilings_of_triton.choose(128, 90) == tilings_of_triton.shipped(90)[128]


@pytest.mark.parametrize("role", Pair._fields)
def test_cases_are_what_the_triton_kernels_take(tilings_of_triton, monkeypatch, role):
    triton_tune = pytest.importorskip("pallas_kernels.triton.tune")
    monkeypatch.setattr(jax, "local_devices", lambda: [H100])
    case, weights = Case(role, 16, 12), search.random_weights(TINY)
    prepared = triton_tune.prepare(case, weights, TINY)
    kernel = prepared.build(tilings_of_triton.shipped(90)[16].up_projection)
    outputs = jax.eval_shape(kernel, *prepared.arrays)
    rows = prepared.rows([jnp.ones(out.shape, out.dtype) for out in outputs])
    live = (search.draw_plan(12, 16, TINY).row_token >= 0).sum()
    columns = {"up_projection": TINY.intermediate, "down_projection": TINY.hidden}[role]
    assert rows.shape == (live, columns)


@pytest.mark.parametrize("capability", ["8.9", "9.0", "12.0"])
def test_every_triton_class_is_measured_somewhere(tilings_of_triton, capability):
    triton_tune = pytest.importorskip("pallas_kernels.triton.tune")
    gpu = types.SimpleNamespace(device_kind="Some", compute_capability=capability)
    tuner = triton_tune.tuner(gpu)
    for block_m in tuner.shipped:
        search.tokens_of(block_m, tuner, search.DEEPSEEK_V3)
