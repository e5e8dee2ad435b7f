"""Binding solutions: both frameworks see the same arguments, programs load anew when asked to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

import jax_moe
from bench import execution, inputs, routing
from bench.compile_ahead import compile_ahead
from bench.settings import Settings
from bench.workloads import REDUCED, select
from interop.solutions.base import Solution

pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs at reduced size")


def refused(*ten):
    raise AssertionError("traced although it was compiled ahead")


def solution(run, **fields):
    return Solution(name="test", framework="jax", description="test", run=run, **fields)


@pytest.fixture(scope="module")
def arguments():
    workload = select(["7"])[0]
    weights = inputs.draw_weights("realistic", REDUCED, 0)
    routed = routing.draw(workload, REDUCED, 0)
    drawn = inputs.make_arguments("realistic", workload, REDUCED, 0, 0, weights, routed)
    return inputs.head(drawn, 7)


def test_padding_for_the_oracle_changes_no_row_of_the_workload(arguments):
    workload = select(["7"])[0]
    weights = inputs.draw_weights("realistic", REDUCED, 0)
    routed = routing.draw(workload, REDUCED, 0)
    padded = inputs.make_arguments("realistic", workload, REDUCED, 0, 0, weights, routed)
    assert padded.hidden_states.shape[0] == inputs.padded_tokens(7) == 64
    np.testing.assert_array_equal(padded.routing_logits[:7], routed.logits)
    whole = np.asarray(jax_moe.reference(*padded)[:7].astype(jnp.float32))
    alone = np.asarray(jax_moe.reference(*arguments).astype(jnp.float32))
    np.testing.assert_allclose(whole, alone, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_a_reloaded_program_is_another_one_with_the_same_results(arguments, monkeypatch, fails):
    def run(*ten):
        return jax_moe.apply(*ten, backend="xla")

    if fails:

        def refuse(compiled):
            raise ValueError("Compilation does not support serialization")

        monkeypatch.setattr(serialize_executable, "serialize", refuse)
    first = execution.binder(solution(run), {}, reload=False)(arguments)
    again = execution.binder(solution(run), {}, reload=True)(arguments)
    np.testing.assert_array_equal(
        np.asarray(first.call()).view(np.uint16), np.asarray(again.call()).view(np.uint16)
    )
    assert first.workspace_bytes == again.workspace_bytes > 0
    assert first.how == again.how == "jit"


def test_one_program_serves_all_trials(arguments):
    traced = []

    def run(*ten):
        traced.append(1)
        return jax_moe.apply(*ten, backend="xla")

    bind = execution.binder(solution(run), {}, reload=True)
    one = bind(arguments)
    other = bind(arguments._replace(hidden_states_scale=arguments.hidden_states_scale * 2))
    assert len(traced) == 1
    assert (np.asarray(one.call()) != np.asarray(other.call())).any()


def test_a_worker_compiles_what_the_binder_then_only_loads(arguments):
    settings = Settings(solutions=(), on_gpu=False, compile_workers=1)
    done = []
    jobs = [("jax_moe_xla", 7), ("no_such_solution", 7)]
    programs = compile_ahead(settings, jobs, lambda: done.append(1))
    assert set(programs) == {("jax_moe_xla", 7)}
    assert len(done) == 2
    chosen = dataclasses.replace(solution(refused), name="jax_moe_xla")
    for reload in (False, True):
        bound = execution.binder(chosen, programs, reload=reload)(arguments)
        wanted = jax_moe.apply(*arguments, backend="xla")
        np.testing.assert_allclose(
            np.asarray(bound.call(), np.float32), np.asarray(wanted, np.float32), rtol=2**-7
        )
        assert bound.workspace_bytes > 0


def test_specs_are_those_of_the_arguments(arguments):
    specs = inputs.argument_specs(7, REDUCED)
    for name, spec, array in zip(specs._fields, specs, arguments, strict=True):
        assert (spec.shape, spec.dtype) == (array.shape, array.dtype), name


def test_torch_sees_the_memory_of_the_jax_arrays():
    torch = pytest.importorskip("torch")
    seen = []

    def run(*ten):
        seen.append(ten)
        return torch.zeros(ten[2].shape, dtype=torch.bfloat16)

    workload = select(["7"])[0]
    weights = inputs.draw_weights("realistic", REDUCED, 0)
    routed = routing.draw(workload, REDUCED, 0)
    drawn = inputs.make_arguments("realistic", workload, REDUCED, 0, 0, weights, routed)
    chosen = Solution(name="test", framework="torch", description="test", run=run)
    bound = execution.binder(chosen, {}, reload=False)(drawn)
    output = execution.to_jax(chosen, bound.call())
    assert isinstance(output, jax.Array)
    assert output.dtype == jnp.bfloat16
    *tensors, offset, factor = seen[0]
    assert (offset, factor) == (REDUCED.offset(workload), 2.5)
    for tensor, array in zip(tensors, drawn[:8], strict=True):
        assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert not tensors[0].requires_grad
