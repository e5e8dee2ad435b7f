"""The tuners: their inputs, the search with a fake clock, the command line."""

from __future__ import annotations

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import jax_moe
import jax_moe.tune
from jax_moe.models import MODELS
from pallas_kernels import device
from pallas_kernels.mosaic import tilings, tune
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig
from pallas_kernels.tuning import cache, command, search, table_format
from pallas_kernels.tuning.cache import Gpu
from pallas_kernels.tuning.search import Prepared, Sizes, Tuner
from pallas_kernels.tuning.table_format import Kernels, Pair

TINY = Sizes(hidden_size=256, intermediate_size=128, num_experts=8, num_local_experts=2, top_k=2)
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


def built_only(case, weights, sizes):
    """Builds the kernels, whose checks are real, and runs none: results are ones."""
    prepared = interpreted(case, weights, sizes)

    def build(config):
        outputs = jax.eval_shape(prepared.build(config), *prepared.arrays)
        return lambda *_: jax.tree.map(lambda out: jnp.ones(out.shape, out.dtype), outputs)

    return prepared._replace(build=build)


def without_kernels(case, weights, sizes):
    return Prepared((jnp.ones(4),), lambda config: jnp.sin, lambda result: result)


TABLE = {16: Pair(START, START)}
KERNELS = Kernels("mosaic", MatmulConfig, (16,), lambda *_: None)


def tiny_tuner(prepare=without_kernels, **choices):
    return Tuner(
        kernels=KERNELS,
        gpu=Gpu("9.0", H100.device_kind),
        choices=lambda *_: choices,
        block_m=lambda *_: 16,
        prepare=prepare,
        tokens=(12,),
    )


def measure(tuner, timer, bar=None):
    return search.tune(tuner, TABLE, timer, TINY, bar or Bar())


def clock(times):
    """A timer whose n-th answer is `times[n]`."""
    remaining = iter(times)
    return lambda function, arrays: next(remaining)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_the_plan_is_that_of_the_layer(num_tokens, block_m):
    """The ids that the rows stand for, planned by `jax_moe`, give the same arrays."""
    sizes = Sizes(256, 128, num_experts=8, num_local_experts=5, top_k=3)
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
    tokens, choices = np.nonzero(plan.pair_row >= 0)
    assert len(tokens) == plan.group_sizes.sum()
    np.testing.assert_array_equal(plan.row_token[plan.pair_row[tokens, choices]], tokens)
    if block_m == expected.block_m:
        np.testing.assert_array_equal(plan.group_offsets, expected.group_offsets)
        np.testing.assert_array_equal(plan.pair_row, expected.pair_row)


@pytest.mark.slow
def test_both_matmuls_are_measured_and_the_fastest_tiling_kept():
    bar = Bar()
    # Start, then 3 stages of the up-projection; start, then 3 of the down-projection.
    timer = clock([10.0, 8.0, 10.0, 9.95])
    tuner = tiny_tuner(interpreted, num_stages=(2, 3))
    table, rows = measure(tuner, timer, bar)
    assert table[16].up_projection.num_stages == 3
    assert table[16].down_projection.num_stages == 2
    assert [row["us"] for row in rows] == [10.0, 8.0, 10.0, 9.9]
    assert bar.done == bar.total == 6
    assert len(bar.lines) == len(rows)
    json.dumps(rows)


def test_less_than_a_percent_is_noise():
    timer = clock([10.0, 9.95, 9.91, 10.0, 10.0, 10.0])
    table, _ = measure(tiny_tuner(num_stages=(3, 4)), timer)
    assert table[16] == Pair(START, START)


def test_a_tiling_that_cannot_be_built_is_a_row_with_the_reason():
    bar = Bar()
    tuner = tiny_tuner(built_only, num_stages=(1, 99), tail_widths=((24,),))
    table, rows = measure(tuner, clock([5.0, 5.0]), bar)
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
    table, rows = measure(tuner, clock([5.0, 5.0]))
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


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_class_is_measured_somewhere(model):
    sizes = jax_moe.tune.sizes_of(model)
    for block_m in tilings.KERNELS.block_ms:
        tokens = search.tokens_of(block_m, tune.tuner(H100), sizes)
        assert tilings.block_m(tokens * model.top_k / model.num_experts) == block_m


def test_a_class_that_no_token_count_has_is_an_error():
    tuner = tiny_tuner()._replace(block_m=lambda rows: 32)
    with pytest.raises(ValueError, match="block_m=16: expected a token count of this class"):
        search.tokens_of(16, tuner, TINY)


def test_the_choices_of_every_shipped_tiling_can_be_made():
    shipped = cache.nearest_shipped(tilings.KERNELS, Gpu("9.0"), table_format.DEEPSEEK_V3)
    for pair in shipped.values():
        for config in pair:
            choices = tune.choices(config, 56)
            assert len(choices["num_stages"]) > 1
            assert choices["scheduler"] == ("static", "dynamic")
            for tail_widths in choices["tail_widths"]:
                MatmulConfig(config.block_m, 2, tail_widths)
    widths = tune.choices(shipped[64].up_projection, 56)["tail_widths"]
    assert widths == [(), (16, 32, 48), (32,)]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_split_that_is_tried_splits(model):
    start = MatmulConfig(16, 5)
    for columns in (model.hidden_size, model.intermediate_size):
        steps = columns // 128
        none, *splits = tune.choices(start, steps)["split_k_steps"]
        assert none is None
        segments = {MatmulConfig(16, 5, split_k_steps=split).segments(steps) for split in splits}
        assert segments == {n for n in range(2, 9) if steps % n == 0}
    assert tune.choices(start, 56)["split_k_steps"] == (None, 7, 8, 14, 28)
    assert tune.choices(MatmulConfig(64, 4), 56)["split_k_steps"] == (None, 7, 8, 14, 28)
    assert tune.choices(MatmulConfig(128, 4), 56)["split_k_steps"] == (None,)


def run_main(monkeypatch, tmp_path, *argv):
    """`main` on a GPU that is not there, with tiny sizes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device, "local_gpu", lambda: H100)
    monkeypatch.setattr(search, "cupti_timer", lambda n: clock([9.0, 5.0, 9.0, 9.0]))
    monkeypatch.setattr(cache, "nearest_shipped", lambda *_: TABLE)
    tuner = tiny_tuner(num_stages=(3,))
    return command.main(list(argv), "here.tune", lambda gpu: tuner, TINY)


def test_the_command_fills_the_cache(monkeypatch, tmp_path, capsys):
    assert run_main(monkeypatch, tmp_path) == 0
    path = cache.path_of("mosaic", H100.device_kind, TINY.of_table)
    assert f"{path}: written; programs started from now on use it" in capsys.readouterr().out
    table = cache.read(path, KERNELS, Gpu("9.0", H100.device_kind), TINY.of_table)
    assert table[16] == Pair(MatmulConfig(16, 3, sms=2), START)
    content = json.loads(path.read_text())
    assert [row.get("us") for row in content["measured"]] == [9, 5, 9, 9]
    assert "python -m here.tune on an An H100, at hidden_size=256, " in content["note"]


def test_the_command_writes_where_and_for_what_it_is_told(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "new"
    flags = ("--num-local-experts=4", "--hidden-size=384", f"--folder={folder}")
    assert run_main(monkeypatch, tmp_path, *flags) == 0
    (file,) = folder.iterdir()
    assert file.name == "mosaic-An-H100-h384-i128-e4.json"
    assert not (tmp_path / "jax_moe").exists()


def test_a_table_for_a_generation_is_found_once_it_is_shipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table_format, "FOLDER", tmp_path / "tables")
    assert run_main(monkeypatch, tmp_path, "--generation", f"--folder={tmp_path / 'tables'}") == 0
    (file,) = (tmp_path / "tables").iterdir()
    assert file.name == "mosaic-sm_90-h256-i128-e2.json"
    for gpu in (Gpu("9.0"), Gpu("9.0", "Another H100")):
        table = cache.shipped(KERNELS, gpu, TINY.of_table)
        assert table[16] == Pair(MatmulConfig(16, 3, sms=2), START)
    assert "on an An H100, at hidden_size=256, " in json.loads(file.read_text())["note"]
    assert run_main(monkeypatch, tmp_path, "--generation") == 1
    assert "--generation: expected --folder too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        *((f"--top-k={x}", f"--top-k: expected a positive integer, got {x!r}") for x in "0x"),
        ("--top-k=-1", "--top-k: expected a positive integer, got '-1'"),
        ("--top-k=1.5", "--top-k: expected a positive integer, got '1.5'"),
        ("--hidden-size=100", "--hidden-size: expected a multiple of 128, got 100"),
        ("--intermediate-size=64", "--intermediate-size: expected a multiple of 128, got 64"),
        ("--num-local-experts=999", "--num-local-experts: expected at most the "),
        ("--top-k=999", "--top-k: expected at most the "),
    ],
)
def test_sizes_that_no_kernel_takes_are_refused(monkeypatch, tmp_path, capsys, flag, said):
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, tmp_path, flag)
    assert f"error: argument {said}" in capsys.readouterr().err
    if "local" in flag:
        with pytest.raises(SystemExit, match="2"):
            jax_moe.tune.main(["--model=mixtral-8x7b", flag])
        assert f"error: argument {said}" in capsys.readouterr().err


def test_models_are_tuned_by_name(monkeypatch, capsys):
    asked = []

    def run(module, tuners, sizes, options):
        asked.append((module, tuners.__module__, sizes, options))
        return len(asked) - 1  # all but the first fail

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(device, "local_gpu", lambda: "a GPU")
    assert jax_moe.tune.main(["--model", "kimi-k2", "qwen3-30b", "--kernels", "mosaic"]) == 1
    both = Sizes(7168, 2048, 384, 48, 8), Sizes(2048, 768, 128, 16, 8)
    of_call = "jax_moe.tune", "pallas_kernels.mosaic.tune"
    assert asked == [(*of_call, sizes, command.Options(10, None)) for sizes in both]
    with pytest.raises(SystemExit):
        jax_moe.tune.main(["--model", "gpt-2"])
    assert "model: expected one of deepseek-v3, " in capsys.readouterr().err


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

    monkeypatch.setattr(table_format, "write", full)
    assert run_main(monkeypatch, tmp_path) == 1
    assert "cannot write the table: [Errno 28] No space left" in capsys.readouterr().err


def test_without_a_fitting_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(device, "local_gpu", lambda: None)
    assert command.main([], "here.tune", tune.tuner) == 1
    assert capsys.readouterr().err == "here.tune: needs an NVIDIA GPU, and JAX sees none\n"
    ada = types.SimpleNamespace(device_kind="An Ada", compute_capability="8.9")
    monkeypatch.setattr(device, "local_gpu", lambda: ada)
    assert command.main([], "here.tune", tune.tuner) == 1
    expected = "needs a GPU of compute capability 9.0 (Hopper), got An Ada"
    assert expected in capsys.readouterr().err


def test_random_e4m3_is_finite_and_spread():
    values = search.random_e4m3(0, (64, 256)).astype(jnp.float32)
    assert jnp.isfinite(values).all()
    assert len(np.unique(values)) > 100
    assert float(jnp.abs(values).max()) < 2
