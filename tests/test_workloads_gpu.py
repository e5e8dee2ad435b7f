"""The 19 workloads at full size on a GPU: both kinds of inputs, every backend, same bits twice.

Inputs are drawn at few token counts, so that few programs are compiled; of the result only the
workload's own tokens are judged. The benchmark checks each workload at its own token count.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from bench import correctness, inputs, routing
from bench.workloads import FULL, WORKLOADS
from jax_moe.backends import unsupported_reason
from tests import h100_target

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("workloads")]

# Least matched ratios at the published tolerance: flashinfer-bench's formula, and the sum form.
LEAST_MATCHED = {"realistic": (0.93, 0.97), "flashinfer": (0.90, 0.0)}
MOST_RELATIVE_ERROR = 0.03


@functools.cache
def weights(kind):
    return inputs.draw_weights(kind, FULL, seed=0)


def arguments_of(kind, workload):
    drawn = routing.draw(workload, FULL, seed=0)
    return inputs.make_arguments(kind, workload, FULL, 0, 0, weights(kind), drawn).arguments


def bits(array):
    return np.asarray(jax.lax.bitcast_convert_type(array, jnp.uint16))


@pytest.mark.parametrize("kind", LEAST_MATCHED)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda row: f"T={row.num_tokens}")
def test_workload(workload, kind):
    arguments = arguments_of(kind, workload)
    own = slice(workload.num_tokens)
    expected = jax_moe.reference(*arguments)[own]
    for backend in ("mosaic", "triton"):
        if unsupported_reason(backend) is not None:
            continue
        out = jax_moe.apply(*arguments, backend=backend)
        found = correctness.check(out[own], expected, correctness.Tolerance())
        matched, matched_sum = LEAST_MATCHED[kind]
        assert found.problem is None, f"{backend}: {found}"
        assert found.matched_ratio >= matched, f"{backend}: {found}"
        assert found.matched_ratio_sum >= matched_sum, f"{backend}: {found}"
        assert found.relative_error <= MOST_RELATIVE_ERROR, f"{backend}: {found}"
        again = jax_moe.apply(*arguments, backend=backend)
        np.testing.assert_array_equal(bits(again), bits(out), err_msg=backend)


@pytest.mark.parametrize("backend", ["mosaic", "triton"])
def test_whole_call_is_one_cuda_graph(backend, tmp_path):
    if reason := unsupported_reason(backend):
        pytest.skip(reason)
    arguments = arguments_of("realistic", WORKLOADS[0])
    layer = jax.jit(functools.partial(jax_moe.apply, backend=backend))
    lowered = layer.lower(*arguments)
    with h100_target.no_compilation_cache():
        compiled = lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    launches, command_buffers, outside = h100_target.thunks(tmp_path)
    assert (command_buffers, outside) == (1, 0), launches
    expected = jax_moe.apply(*arguments, backend=backend)
    for _ in range(3):  # the graph is captured on a later call, not the first
        np.testing.assert_array_equal(bits(compiled(*arguments)), bits(expected))
