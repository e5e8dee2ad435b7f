"""The SM clock during a call: what follows from stamps, in which order they are launched."""

from __future__ import annotations

import ctypes
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import gpu_clock, nvml, runner, sm_clock
from bench.gpu_clock import ClockError
from bench.settings import Settings
from bench.sm_clock import Interval, Reading
from bench.timers import Execution
from interop.solutions.base import Solution
from tests import h100_target
from tests.bench_rows import row


def stamps(*of_sms):
    """i32[SMs, 5] as the kernel writes it, of (sm, cycles, ns)."""
    words = [[c & 0xFFFFFFFF, c >> 32, ns & 0xFFFFFFFF, ns >> 32, sm] for sm, c, ns in of_sms]
    return np.array(words, np.uint32).view(np.int32)


def test_cycles_and_time_are_of_the_same_sm():
    now = 1_900_000_000_123_456_789
    low = (1 << 32) - 1_000  # the lower words overflow on the way
    before = stamps((3, low, now), (1, 700, now + 10), (7, 0, now))
    after = stamps((1, 160_700, now + 100_010), (3, low + 150_000, now + 100_000), (9, 1, now + 1))
    assert sm_clock.interval(before, after) == Interval(155_000, 100_000)
    with pytest.raises(ClockError, match="different SMs"):
        sm_clock.interval(before[:1], after[:1])
    with pytest.raises(ClockError, match="not later"):
        sm_clock.interval(after, before)


def test_intervals_are_pooled_by_their_length():
    found = sm_clock.pooled([Interval(1_500, 1_000), Interval(4_500, 3_000)], [False, None], 8)
    assert found == Reading(us=0.5, sm_mhz=1_500.0, power_capped=False, calls=8)
    assert sm_clock.pooled([Interval(2, 1), Interval(1, 1)], [None, None], 1) == (
        0.002, 1_500.0, None, 1,
    )  # fmt: skip
    assert sm_clock.pooled([Interval(1, 1)] * 2, [False, True], 2).power_capped is True


@pytest.fixture
def steps(monkeypatch):
    """What happens in order; stamps are 1 ms apart for each call between them, at 1.5 GHz."""
    found, now = [], [0]

    def launch(wait_ns):
        found.append(f"stamp {wait_ns}")
        return now[0]

    def read(at):
        return stamps((0, at * 1_500_000, at * 1_000_000))

    def call():
        now[0] += 1
        found.append("call")

    monkeypatch.setattr(sm_clock, "_stamps", lambda _: sm_clock.Stamps(launch, read))
    monkeypatch.setattr(sm_clock, "flusher", lambda how: lambda: found.append(how))
    monkeypatch.setattr(nvml, "power_capped", lambda: found.append("power") or True)
    return found, Execution(call, lambda _: found.append("wait"), "eager", None)


def test_each_call_stands_between_stamps_that_nothing_waits_for(steps):
    found, execution = steps
    assert sm_clock.during(execution, "torch", busy_us=900.0).calls == 20
    assert found == ["write", "stamp 1000000", "call", "stamp 0", "wait", "power"] * 20


def test_stamps_that_lie_closer_than_the_call_is_long_are_no_clock(steps):
    _, execution = steps
    reading = sm_clock.during(execution, "torch", busy_us=1_000.0)
    assert (reading.us, reading.sm_mhz, reading.calls) == (1_000.0, 1_500.0, 20)
    with pytest.raises(ClockError, match=r"do not enclose 1300\.0 us"):
        sm_clock.during(execution, "torch", busy_us=1_300.0)


def test_sustained_calls_follow_each_other_for_half_a_second(steps):
    found, execution = steps
    reading = sm_clock.sustained(execution, "jax", call_us=1_001.0)
    assert reading == Reading(us=1_000.0, sm_mhz=1_500.0, power_capped=True, calls=500)
    assert found == ["stamp 1000000", *["call"] * 500, "stamp 0", "wait", "power"]


@pytest.mark.parametrize("sustained", [False, True])
def test_a_row_keeps_its_times_where_no_clock_can_be_read(steps, monkeypatch, caplog, sustained):
    done, execution = steps
    ours = Solution("ours", "torch", "test", lambda *_: None)
    settings = Settings(("ours",), sustained=sustained, flush="read")
    timed = row("ours", 7, 900.0, busy_us=800.0)
    found = runner._clock_fields(settings, ours, execution, timed)
    assert set(found) == {"clock", "sustained"} if sustained else {"clock"}
    assert found["clock"].power_capped is True
    assert done[0] == "read"

    def broken(_):
        raise ImportError("no jax-triton")

    monkeypatch.setattr(sm_clock, "_stamps", broken)
    assert runner._clock_fields(settings, ours, execution, timed) == {"clock": None}
    assert "ours T=7: no SM clock: ImportError: no jax-triton" in caplog.text


@pytest.mark.parametrize(
    ("reasons", "status", "expected"),
    [(0x4, 0, True), (0x5, 0, True), (0x61, 0, False), (0x4, 3, None)],
)
def test_the_power_cap_is_one_bit_of_the_clocks_reasons(monkeypatch, reasons, status, expected):
    def ask(_, answer):
        ctypes.cast(answer, ctypes.POINTER(ctypes.c_ulonglong))[0] = reasons
        return status

    library = types.SimpleNamespace(nvmlDeviceGetCurrentClocksEventReasons=ask)
    monkeypatch.setattr(nvml, "_device", lambda: (library, None))
    assert nvml.power_capped() is expected
    monkeypatch.setattr(nvml, "_device", lambda: (types.SimpleNamespace(), None))
    assert nvml.power_capped() is None  # an old driver


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="compiles for an absent H100")
def test_the_stamp_is_one_small_kernel_with_both_counters():
    pytest.importorskip("triton")
    from bench import stamp_kernel
    from pallas_kernels.triton.launch import call

    def stamp(wait_ns):
        return call(stamp_kernel.launch(wait_ns, 132), 90)[0]

    wait = jax.ShapeDtypeStruct((1,), jnp.int32)
    assert jax.eval_shape(stamp, wait).shape == (132, stamp_kernel.WORDS)
    (kernel,) = h100_target.compile_triton_kernels(stamp, wait)
    assert (kernel.name, kernel.spill_bytes, kernel.smem_bytes) == ("stamp_kernel", 0, 0)
    assert kernel.registers <= 16
    assert kernel.instructions["CS2R"] >= 3  # the timer's two reads, the cycles


@pytest.mark.gpu
@pytest.mark.timing
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_stamps_on_a_gpu_enclose_a_call_at_a_plausible_clock(framework):
    torch = pytest.importorskip("torch")
    if framework == "jax":
        pytest.importorskip("jax_triton")
        ones = jnp.ones((8192, 8192), jnp.bfloat16)
        multiply = jax.jit(lambda x: x @ x)
        execution = Execution(lambda: multiply(ones), jax.block_until_ready, "jit", None)
    else:
        ones = torch.ones((8192, 8192), device="cuda", dtype=torch.bfloat16)
        execution = Execution(
            lambda: ones @ ones, lambda _: torch.cuda.synchronize(), "eager", None
        )
    clock = gpu_clock.GpuClock()
    execution.block(execution.call())
    busy_us = gpu_clock.busy_us(clock.time(execution, 5)[-1])
    reading = sm_clock.during(execution, framework, busy_us)
    assert reading.us == pytest.approx(busy_us, rel=0.3)
    assert 500 < reading.sm_mhz < 2_500
    assert reading.power_capped in (True, False)
    back_to_back = sm_clock.sustained(execution, framework, reading.us)
    assert back_to_back.us == pytest.approx(busy_us, rel=0.5)
    assert 500 < back_to_back.sm_mhz < 2_500
