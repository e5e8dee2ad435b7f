"""The bridge and `torch_moe` on a GPU: order between streams, lifetime, memory, host time."""

from __future__ import annotations

import copy
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from interop import TorchMoE, dlpack, to_jax, to_torch, torch_moe  # noqa: E402
from jax_moe import LayerInputs  # noqa: E402
from tests.moe_inputs import (  # noqa: E402
    array_arguments,
    handle_arguments,
    replaced,
    scalar_arguments,
    token_arguments,
)
from tests.torch_inputs import bits, relative_error, torch_inputs  # noqa: E402

pytestmark = pytest.mark.gpu

LONG = 200_000_000  # cycles, about a tenth of a second
MAX_HOST_US = 300.0


@pytest.fixture(scope="module")
def inputs():
    return torch_inputs(20, "cuda")


@pytest.fixture(scope="module")
def expected(inputs):
    result = torch_moe(*inputs.arguments).clone()
    torch.cuda.synchronize()
    return result


@jax.jit
def slow_copy(x):
    """A copy of x that the GPU makes late: a chain of matmuls comes first."""
    chain = jax.lax.fori_loop(
        0, 60, lambda _, m: jnp.tanh(m @ m), jnp.full((4096, 4096), 1e-3, jnp.float32)
    )
    return x + 0 * chain[0, 0].astype(x.dtype)


@pytest.mark.parametrize("dtype", [d for d in dlpack.DTYPES if d != torch.int64], ids=str)
def test_zero_copy_in_both_directions(dtype):
    tensor = (torch.rand(64, 256, device="cuda") * 100).to(dtype)
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    back = to_torch(array)
    assert back.data_ptr() == tensor.data_ptr()
    np.testing.assert_array_equal(bits(back), bits(tensor))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.rand(64, 256, device="cuda").t(),
        lambda: torch.rand(64, 256, device="cuda")[:, ::2],
        lambda: torch.rand(1, 256, device="cuda").expand(64, 256),
        lambda: torch.rand(1000, device="cuda")[2:],
    ],
    ids=["transposed", "strided", "expanded", "misaligned"],
)
def test_what_cannot_be_shared_is_copied(make):
    tensor = make()
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() % dlpack.ALIGNMENT["cuda"] == 0
    np.testing.assert_array_equal(np.asarray(array), tensor.cpu().numpy())


def test_wrong_devices_are_named(inputs):
    elsewhere = replaced(inputs, gemm1_weights=inputs.weights.gemm1_weights.cpu())
    with pytest.raises(ValueError, match="gemm1_weights: expected a tensor on cuda:0, where"):
        torch_moe(*elsewhere.arguments)
    handle = TorchMoE(inputs.weights)
    with pytest.raises(ValueError, match="hidden_states: expected a tensor on cuda:0, where"):
        handle(*handle_arguments(inputs._replace(hidden_states=inputs.hidden_states.cpu())))
    with pytest.raises(ValueError, match="x: pinned host memory"):
        to_jax(torch.ones(8).pin_memory(), "x")
    with pytest.raises(ValueError, match=r"local_expert_offset: .* tensor on cuda"):
        torch_moe(*array_arguments(inputs), torch.tensor(8, device="cuda"), 2.5)


def test_jax_waits_for_a_side_stream_that_still_writes():
    tensor = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        tensor.fill_(7.0)
        before = time.perf_counter()
        array = to_jax(tensor)
        imported_in = time.perf_counter() - before
    found = np.asarray(jnp.sqrt(array + 2.0))
    assert imported_in < 0.05, "the import waited for the device"
    np.testing.assert_array_equal(found, np.full(1 << 20, 3.0, np.float32))


def test_torch_waits_for_jax():
    slow_copy(jnp.zeros(1 << 20)).block_until_ready()
    array = slow_copy(jnp.full(1 << 20, 5.0))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        copied = to_torch(array) + 1
    side.synchronize()
    assert bool((copied == 6.0).all())


def test_any_torch_stream(inputs, expected):
    """Inputs that a side stream still writes, a result that it reads."""
    late = [torch.zeros_like(tensor) for tensor in token_arguments(inputs)]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        for target, source in zip(late, token_arguments(inputs), strict=True):
            target.copy_(source)
        result = torch_moe(*late, *inputs.weights, *scalar_arguments(inputs))
        copied = result.clone()
    side.synchronize()
    np.testing.assert_array_equal(bits(copied), bits(expected))


def test_freed_and_overwritten_inputs(inputs, expected):
    """Inputs die and their memory is written again at once: later calls and results stay right."""
    handle = TorchMoE(inputs.weights)
    for _ in range(20):
        fresh = [tensor.clone() for tensor in token_arguments(inputs)]
        result = handle(*fresh, *scalar_arguments(inputs))
        del fresh
        for tensor in token_arguments(inputs):
            torch.empty_like(tensor).view(torch.uint8).fill_(255)
        np.testing.assert_array_equal(bits(result), bits(expected))


def test_a_tensor_freed_while_jax_reads_it():
    """The array keeps the memory as long as it lives."""
    slow_copy(jnp.zeros(1 << 20)).block_until_ready()
    tensor = torch.full((1 << 20,), 3.0, device="cuda")
    array = to_jax(tensor)
    result = slow_copy(array)
    del tensor
    junk = [torch.full((1 << 20,), 9.0, device="cuda") for _ in range(8)]
    np.testing.assert_array_equal(np.asarray(result), np.full(1 << 20, 3.0, np.float32))
    assert len(junk) == 8


def test_a_destination_outlives_the_result(inputs, expected):
    """`out=` copies on torch's stream: JAX must not reuse the result's memory before that."""
    side = torch.cuda.Stream()
    for _ in range(10):
        out = torch.zeros(20, 256, dtype=torch.bfloat16, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG // 100)
            torch_moe(*inputs.arguments, out=out)
        overwritten = [jnp.full((20, 256), 9.0, jnp.bfloat16) for _ in range(8)]
        jax.block_until_ready(overwritten)
        side.synchronize()
        np.testing.assert_array_equal(bits(out), bits(expected))


def test_a_torch_graph_capture_is_refused(inputs):
    graph = torch.cuda.CUDAGraph()
    side = torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph):
        side += 1  # a graph needs something in it
        with pytest.raises(RuntimeError, match="cannot capture it"):
            torch_moe(*inputs.arguments)
        with pytest.raises(RuntimeError, match="cannot capture it"):
            to_jax(side)


@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own parts, and of TF32
def test_compiled_beside_cuda_graphs_of_torch(inputs, expected):
    """`reduce-overhead` makes graphs of what is around the layer, and leaves the layer out."""

    def model(*tensors):
        return torch_moe(*tensors, *scalar_arguments(inputs)).float() * 2

    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(*array_arguments(inputs)).clone()
        np.testing.assert_array_equal(bits(found), bits(expected.float() * 2))


def test_a_copied_handle_computes_the_same(inputs, expected):
    handle = copy.deepcopy(TorchMoE(inputs.weights))
    np.testing.assert_array_equal(bits(handle(*handle_arguments(inputs))), bits(expected))


def test_the_backend_is_that_of_the_tensors(inputs, expected):
    """JAX's default device is the GPU, also for tensors on the CPU."""
    assert TorchMoE(inputs.weights)._layer.options.backend != "xla"
    on_cpu = LayerInputs.of(
        *(tensor.cpu() for tensor in array_arguments(inputs)), *scalar_arguments(inputs)
    )
    handle = TorchMoE(on_cpu.weights)
    assert handle._layer.options.backend == "xla"
    result = handle(*handle_arguments(on_cpu))
    assert not result.is_cuda
    assert relative_error(result, expected) < 0.01


def test_a_thousand_round_trips_leave_memory_flat(inputs):
    device = dlpack.jax_device(torch.device("cuda", 0))

    def used() -> tuple[int, int]:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), device.memory_stats()["bytes_in_use"]

    def round_trip() -> None:
        array = to_jax(torch.zeros(1 << 20, dtype=torch.uint8, device="cuda"))
        to_torch(array + 1).sum()

    handle = TorchMoE(inputs.weights)
    out = torch.empty(20, 256, dtype=torch.bfloat16, device="cuda")
    for _ in range(20):
        round_trip()
        handle(*handle_arguments(inputs), out=out)
    before = used()
    for _ in range(1000):
        round_trip()
        handle(*handle_arguments(inputs), out=out)
    after = used()
    assert after[0] - before[0] <= 8 << 20, f"torch: {before[0]} to {after[0]} bytes"
    assert after[1] - before[1] <= 8 << 20, f"jax: {before[1]} to {after[1]} bytes"


@pytest.mark.timing
def test_host_time_of_a_handle_call(record_property):
    """What a call costs the host, the GPU idle before each so that launches do not queue up."""
    inputs = torch_inputs(1, "cuda")
    handle = TorchMoE(inputs.weights)
    for _ in range(50):
        handle(*handle_arguments(inputs))
    torch.cuda.synchronize()
    times = []
    for _ in range(300):
        before = time.perf_counter()
        handle(*handle_arguments(inputs))
        times.append((time.perf_counter() - before) * 1e6)
        torch.cuda.synchronize()
    record_property("host_us", statistics.median(times))
    print(f"TorchMoE call: median {statistics.median(times):.0f} us of host time")
    assert statistics.median(times) <= MAX_HOST_US
