"""Programs that other processes compile are those that would be compiled in place."""

import jax
import numpy as np
import pytest
from jax.experimental import serialize_executable

from bench import ahead, execution, inputs, solutions
from bench.session import execute
from bench.settings import Settings
from bench.workloads import REDUCED, select
from interop.solutions.base import Solution
from tests.bench_inputs import reduced_arguments
from tests.bench_rows import cheap_layer

pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs at reduced size")

SETTINGS = Settings(solutions=("jax_moe_xla",), on_gpu=False, timer="gpu", wall_time=False)


def solution(name, run=lambda *ten: None, **fields):
    return Solution(name=name, framework="jax", description="test", run=run, **fields)


@pytest.fixture(scope="module")
def layer_inputs():
    return reduced_arguments(7)


def test_specs_are_those_of_the_arguments(layer_inputs):
    specs = inputs.specs(7, REDUCED)
    found = [(one.shape, one.dtype, one.weak_type) for one in layer_inputs.arguments]
    assert found == [(one.shape, one.dtype, one.weak_type) for one in specs.arguments]


def test_a_program_of_another_process_is_the_one_compiled_here(layer_inputs):
    known = solutions.registry("xla")["jax_moe_xla"]
    counted = []
    orders = [(known, 7), (solution("unknown"), 7)]
    programs = ahead.compile_all(SETTINGS, orders, 1, lambda: counted.append(1))
    assert len(counted) == 2
    assert list(programs) == [execution.key_of(known, layer_inputs.arguments)]
    (program,) = programs.values()
    assert program.jitted is None
    traced = []

    def run(*ten):
        traced.append(1)
        return known.run(*ten)

    watched = Solution(name=known.name, framework="jax", description="test", run=run)
    ours = execution.binder(watched, reload=True, programs=programs)(layer_inputs)
    assert not traced
    here = execution.binder(watched, reload=True)(layer_inputs)
    assert traced
    np.testing.assert_array_equal(
        np.asarray(ours.call()).view(np.uint16), np.asarray(here.call()).view(np.uint16)
    )
    assert ours.workspace_bytes == here.workspace_bytes > 0


def test_host_times_never_come_from_such_a_program(layer_inputs):
    known = solution("cheap", run=cheap_layer)
    key = execution.key_of(known, layer_inputs.arguments)
    foreign = execution.Program(serialized=("not a program",), workspace_bytes=None)
    bound = execution.binder(known, reload=False, programs={key: foreign})(layer_inputs)
    assert bound.call().shape == (7, REDUCED.hidden_size)


def test_only_open_rows_of_what_may_be_compiled_ahead_are_ordered():
    rows = select(["1", "7", "80"])
    jax_one, alone = solution("one"), solution("alone", compile_ahead=False)
    torch_one = Solution(name="t", framework="torch", description="test", run=lambda *ten: None)
    known = {one.name: one for one in (jax_one, alone, torch_one)}
    done = {("one", rows[1].uuid)}
    assert ahead.orders(known, rows, done) == [(jax_one, 80), (jax_one, 1)]


def test_a_program_that_cannot_be_loaded_is_compiled_here(layer_inputs, monkeypatch):
    def refuse(*program):
        raise ValueError("incompatible device")

    monkeypatch.setattr(serialize_executable, "deserialize_and_load", refuse)
    known = solution("cheap", run=cheap_layer)
    key = execution.key_of(known, layer_inputs.arguments)
    foreign = execution.Program(serialized=("another device's",), workspace_bytes=None)
    bound = execution.binder(known, reload=True, programs={key: foreign})(layer_inputs)
    assert bound.call().shape == (7, REDUCED.hidden_size)


def test_jobs_do_not_go_with_host_times(tmp_path):
    from bench.documents import Options

    chosen = Settings(solutions=("jax_moe_xla",), on_gpu=False, timer="wall", output=tmp_path / "o")
    with pytest.raises(ValueError, match=r"--jobs: .* expected --timer=gpu and --nowall_time"):
        execute(chosen, Options(), resume=False, profile=None, jobs=2)
    assert not (tmp_path / "o").exists()
