"""The GPU clock's cutting of events into calls, statistics, and how many calls are timed."""

import sys
import time
import types

import pytest

from bench import gpu_clock, timers
from bench.gpu_clock import ClockError, Event, busy_us, split_calls, unavailable_reason
from bench.results import KernelTime
from bench.runner import MAX_KERNELS, kernel_times

MARKER = "at::cuda::(anonymous namespace)::spin_kernel(long)"


def marker(at):
    return Event(MARKER, at, at + 1_000, at)


def kernel(name, start, end, launch):
    return Event(name, start, end, launch)


def test_a_call_is_what_ran_between_its_two_markers():
    events = [
        kernel("fill", 0, 90_000, 1),
        marker(100_000),
        kernel("a", 200_000, 210_000, 2),
        kernel("b", 215_000, 240_000, 2),
        marker(300_000),
        kernel("fill", 310_000, 400_000, 3),
        marker(500_000),
        kernel("a", 600_000, 612_000, 4),
        kernel("b", 611_000, 630_000, 5),
        marker(700_000),
        kernel("unrelated", 800_000, 900_000, 6),
    ]
    first, second = split_calls(list(reversed(events)), 2)
    assert (first.span_us, first.launches) == (40.0, 1)
    assert [k.name for k in first.kernels] == ["a", "b"]
    assert [(k.start_us, k.duration_us) for k in first.kernels] == [(0.0, 10.0), (15.0, 25.0)]
    assert busy_us(first) == 35.0
    assert (second.span_us, second.launches) == (30.0, 2)
    assert busy_us(second) == 30.0  # they overlap by 1 us


def test_the_span_ends_with_the_last_end_not_with_the_last_start():
    events = [marker(0), kernel("long", 5_000, 99_000, 1), kernel("short", 6_000, 7_000, 1)]
    (sample,) = split_calls([*events, marker(200_000)], 1)
    assert sample.span_us == 94.0
    assert busy_us(sample) == 94.0


def test_lost_events_are_an_error_not_a_time():
    whole = [marker(0), kernel("a", 2_000, 3_000, 1), marker(5_000)]
    with pytest.raises(ClockError, match="recorded 1 of 2 marker kernels"):
        split_calls(whole[:2], 1)
    with pytest.raises(ClockError, match="recorded 2 of 4 marker kernels"):
        split_calls(whole, 2)
    with pytest.raises(ClockError, match="ran nothing"):
        split_calls([whole[0], whole[2]], 1)


def test_kernel_times_are_medians_of_the_time_per_call():
    def call(start, a, b):
        return [
            marker(start),
            kernel("a", start + 2_000, start + 2_000 + a, 1),
            kernel("b", start + 50_000, start + 50_000 + b, 1),
            kernel("a", start + 80_000, start + 80_000 + a, 1),
            marker(start + 100_000),
        ]

    events = [*call(0, 1_000, 7_000), *call(10**6, 3_000, 9_000), *call(2 * 10**6, 2_000, 8_000)]
    found = kernel_times(split_calls(events, 3))
    assert found == (KernelTime("a", 4.0, 2), KernelTime("b", 8.0, 1))


def test_many_kernel_names_are_pooled_without_losing_time():
    names = [f"k{i}" for i in range(3 * MAX_KERNELS)]
    kernels = [kernel(n, 2_000 + 100 * i, 2_050 + 100 * i, 1) for i, n in enumerate(names)]
    found = kernel_times(split_calls([marker(0), *kernels, marker(10**6)], 1))
    assert len(found) == MAX_KERNELS
    assert sum(k.us for k in found) == pytest.approx(0.05 * len(names))
    assert sum(k.launches for k in found) == len(names)
    assert found[-1].name == f"{2 * MAX_KERNELS + 1} other kernels"


def test_slow_calls_take_fewer_iterations():
    assert timers.calls_to_time(50, 100) == 100
    assert timers.calls_to_time(9_999, 100) == 100
    assert timers.calls_to_time(20_000, 100) == 10
    assert timers.calls_to_time(150_000, 100) == 2
    assert timers.calls_to_time(10**7, 100) == 2
    assert timers.calls_to_time(10**7, 1) == 1


def test_statistics_are_percentiles_of_all_calls():
    found = timers.statistics_of([float(us) for us in range(101)])
    assert found == (50.0, 10.0, 90.0, 101)


def test_wall_times_cover_the_wait_for_the_output():
    waited = []

    def block(output):
        time.sleep(0.003)
        waited.append(output)

    execution = timers.Execution(lambda: "out", block, "eager", None)
    times = timers.wall_times(execution, 4)
    assert waited == ["out"] * 4
    assert all(us > 3_000 for us in times)


def test_the_cache_is_flushed_before_each_call_and_outside_of_its_time(monkeypatch):
    steps = []
    monkeypatch.setattr(timers, "flusher", lambda how: lambda: steps.append(how))
    clock = types.SimpleNamespace(perf_counter_ns=lambda: steps.append("clock") or len(steps))
    monkeypatch.setattr(timers, "time", clock)
    execution = timers.Execution(
        lambda: steps.append("call"), lambda _: steps.append("wait"), "eager", None
    )
    assert len(timers.wall_times(execution, 2)) == 2
    assert steps == ["write", "clock", "call", "wait", "clock"] * 2
    timers.wall_times(execution, 1, "read")
    assert steps[10] == "read"


@pytest.mark.parametrize("how", timers.FLUSHES)
def test_a_flush_goes_through_several_times_what_any_l2_holds(monkeypatch, how):
    """The largest, a B200's, holds 126 MB; the docstring promises 256."""
    done = []

    def zeros(size, dtype, device):
        what = (size * dtype, device)
        return types.SimpleNamespace(
            zero_=lambda: done.append(("write", *what)), max=lambda: done.append(("read", *what))
        )

    cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=lambda: done.append("wait"))
    torch = types.SimpleNamespace(cuda=cuda, zeros=zeros, int32=4)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(timers.jax, "default_backend", lambda: "gpu")
    flush = timers.flusher.__wrapped__(how)
    assert done == []
    flush()
    flush()
    assert done == [(how, 256 * 2**20, "cuda"), "wait"] * 2


@pytest.mark.parametrize("cold", [True, False])
def test_the_gpu_clock_flushes_before_the_markers_of_a_call(monkeypatch, cold):
    steps = []
    cuda = types.SimpleNamespace(
        _sleep=lambda _: steps.append("marker"), synchronize=lambda: steps.append("idle")
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(gpu_clock, "flusher", lambda how: lambda: steps.append(how))
    execution = timers.Execution(
        lambda: steps.append("call"), lambda _: steps.append("wait"), "eager", None
    )
    gpu_clock.Session("read").record(execution, 2, cold=cold)
    one = ["read"] * cold + ["marker", "idle", "call", "wait", "idle", "marker"]
    assert steps == [*one * 2, "idle"]


@pytest.fixture
def taking(monkeypatch):
    """Makes an execution whose calls take the given us on a clock that nothing else moves."""
    now = [0]
    monkeypatch.setattr(timers, "time", types.SimpleNamespace(perf_counter_ns=lambda: now[0]))

    def make(*durations_us):
        left = list(durations_us)

        def call():
            now[0] += left.pop(0) * 1000

        return timers.Execution(call, timers.no_wait, "eager", None), left

    return make


def test_warm_up_returns_the_fastest_call_and_gives_up_on_slow_ones(taking):
    execution, left = taking(50_000, 1_000, 2_000, 3_000)
    assert timers.warm_up(execution, 4) == 1_000
    assert not left
    slow, left = taking(*[20_000] * 10)
    assert timers.warm_up(slow, 10) == 20_000 > timers.SLOW_US
    assert len(left) == 8


def test_without_a_gpu_there_is_no_gpu_clock_and_nothing_to_flush():
    import jax

    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert unavailable_reason() == "needs a GPU, JAX found cpu"
    assert timers.flusher() is timers.no_wait


@pytest.mark.gpu
@pytest.mark.timing
def test_the_gpu_clock_agrees_with_cuda_events():
    torch = pytest.importorskip("torch")
    from bench.gpu_clock import GpuClock

    clock = GpuClock()
    lhs = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    execution = timers.Execution(lambda: lhs @ lhs, timers.no_wait, "eager", None)
    timers.warm_up(execution, 5)
    spans = [sample.span_us for sample in clock.time(execution, 20, cold=False)]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(50):
        execution.call()
    end.record()
    torch.cuda.synchronize()
    events = 1e3 * start.elapsed_time(end) / 50
    assert timers.statistics_of(spans).median == pytest.approx(events, rel=0.15)


@pytest.mark.gpu
@pytest.mark.timing
def test_the_gpu_clock_sees_every_kernel_of_jax_and_of_a_cuda_graph():
    torch = pytest.importorskip("torch")
    import jax
    import jax.numpy as jnp

    from bench.gpu_clock import GpuClock

    clock = GpuClock()
    x = jnp.ones((2048, 2048))
    chain = jax.jit(lambda x: jnp.sin(x @ x) @ x)
    jax.block_until_ready(chain(x))
    of_jax = timers.Execution(lambda: chain(x), jax.block_until_ready, "jit", None)
    samples = clock.time(of_jax, 5)
    assert len({len(sample.kernels) for sample in samples}) == 1
    assert len(samples[0].kernels) >= 3
    buffer = torch.zeros(1 << 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(7):
            buffer.add_(1)
    of_torch = timers.Execution(graph.replay, timers.no_wait, "CUDA graph", None)
    for sample in clock.time(of_torch, 5):
        assert len(sample.kernels) == 7
        assert sample.launches == 1
