"""Binding solutions: both frameworks see the same arguments, programs load anew when asked to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

import jax_moe
from bench import execution, inputs
from bench.workloads import REDUCED, select
from interop.solutions.base import Solution
from tests.bench_inputs import padded_arguments, reduced_arguments
from tests.bench_rows import cheap_layer
from tests.moe_inputs import array_arguments

pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs at reduced size")


def solution(run, **fields):
    return Solution(name="test", framework="jax", description="test", run=run, **fields)


@pytest.fixture(scope="module")
def layer_inputs():
    return reduced_arguments(7)


def test_padding_for_the_oracle_changes_no_row_of_the_workload(layer_inputs):
    padded, routed = padded_arguments(7)
    assert padded.hidden_states.shape[0] == inputs.padded_tokens(7) == 64
    np.testing.assert_array_equal(padded.routing_logits[:7], routed.logits)
    whole = np.asarray(jax_moe.reference(*padded.arguments)[:7].astype(jnp.float32))
    alone = np.asarray(jax_moe.reference(*layer_inputs.arguments).astype(jnp.float32))
    np.testing.assert_allclose(whole, alone, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_a_reloaded_program_is_another_one_with_the_same_results(layer_inputs, monkeypatch, fails):
    def run(*ten):
        x = cheap_layer(*ten).astype(jnp.float32)
        return (x @ (x.T @ x)).astype(jnp.bfloat16)  # in the brackets is temporary memory

    if fails:

        def refuse(compiled):
            raise ValueError("Compilation does not support serialization")

        monkeypatch.setattr(serialize_executable, "serialize", refuse)
    first = execution.binder(solution(run), reload=False)(layer_inputs)
    again = execution.binder(solution(run), reload=True)(layer_inputs)
    np.testing.assert_array_equal(
        np.asarray(first.call()).view(np.uint16), np.asarray(again.call()).view(np.uint16)
    )
    assert first.workspace_bytes == again.workspace_bytes > 0
    assert first.how == again.how == "jit"


def test_one_program_serves_all_trials(layer_inputs):
    traced = []

    def run(*ten):
        traced.append(1)
        return cheap_layer(*ten)

    bind = execution.binder(solution(run), reload=True)
    one = bind(layer_inputs)
    other = bind(layer_inputs._replace(hidden_states_scale=layer_inputs.hidden_states_scale * 2))
    assert len(traced) == 1
    assert (np.asarray(one.call()) != np.asarray(other.call())).any()


def test_a_later_pass_loads_the_program_of_the_first(layer_inputs):
    traced = []

    def run(*ten):
        traced.append(1)
        return cheap_layer(*ten)

    programs = {}
    passes = [
        execution.binder(solution(run), reload=reload, programs=programs)(layer_inputs)
        for reload in (False, True)
    ]
    assert len(traced) == len(programs) == 1
    wall, gpu = (np.asarray(bound.call()).view(np.uint16) for bound in passes)
    np.testing.assert_array_equal(wall, gpu)


def test_torch_sees_the_memory_of_the_jax_arrays():
    torch = pytest.importorskip("torch")
    seen = []

    def run(*ten):
        seen.append(ten)
        return torch.zeros(ten[2].shape, dtype=torch.bfloat16)

    drawn, _ = padded_arguments(7)
    chosen = Solution(name="test", framework="torch", description="test", run=run)
    bound = execution.binder(chosen, reload=False)(drawn)
    output = execution.to_jax(chosen, bound.call())
    assert isinstance(output, jax.Array)
    assert output.dtype == jnp.bfloat16
    *tensors, offset, factor = seen[0]
    assert (offset, factor) == (REDUCED.offset(select(["7"])[0]), 2.5)
    for tensor, array in zip(tensors, array_arguments(drawn), strict=True):
        assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert not tensors[0].requires_grad
