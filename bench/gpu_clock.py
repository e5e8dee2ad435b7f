"""One clock for both frameworks: torch's profiler sees every kernel of the process, JAX's too.

Each timed call runs on an idle GPU with a cold L2 and stands between two marker kernels, with a
device-wide synchronization on either side:

    flush | marker | call | marker | flush | ...

What the GPU ran between the markers is the call, whichever framework and stream launched it; its
time is the span from the first kernel's start to the last one's end. Host time is not in it, gaps
between kernels are. The profiler must be attached before any CUDA graph is captured or executable
built that it is to see into: make the one `GpuClock` of a process first.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from bench.timers import Execution, flusher, no_wait

_MARKER = "spin_kernel"  # what torch.cuda._sleep launches; nothing else does


class ClockError(RuntimeError):
    """The profiler did not record what was launched."""


class Kernel(NamedTuple):
    """One kernel, copy or fill of a timed call.

    Attributes:
        name: As the profiler names it.
        start_us: Since the start of the call's first kernel.
        duration_us: Its own time.
    """

    name: str
    start_us: float
    duration_us: float


class Sample(NamedTuple):
    """One timed call.

    Attributes:
        span_us: From the first kernel's start to the last one's end.
        launches: Launch calls by the host; a CUDA graph counts once.
        kernels: In order of their start.
    """

    span_us: float
    launches: int
    kernels: tuple[Kernel, ...]


class Event(NamedTuple):
    """A GPU activity of the profiler, times in ns."""

    name: str
    start: int
    end: int
    correlation: int


class Session:
    """Records calls while the profiler runs; `samples` holds them afterwards, in order."""

    def __init__(self, flush_by: str = "write") -> None:
        self.samples: list[Sample] = []
        self._flush = flusher(flush_by)
        self._calls = 0

    def record(self, execution: Execution, iterations: int, *, cold: bool = True) -> None:
        """Launches `iterations` calls, each between markers. `execution` must be warmed up.

        Args:
            execution: What to call.
            iterations: How often.
            cold: Whether the L2 is flushed before each call.
        """
        import torch

        for _ in range(iterations):
            if cold:
                self._flush()
            torch.cuda._sleep(1)
            torch.cuda.synchronize()
            execution.block(execution.call())
            torch.cuda.synchronize()
            torch.cuda._sleep(1)
        torch.cuda.synchronize()
        self._calls += iterations

    def finish(self, events: list[Event]) -> None:
        """Cuts the profiler's events into calls.

        Raises:
            ClockError: Markers or kernels are missing.
        """
        self.samples = split_calls(events, self._calls)


def unavailable_reason() -> str | None:
    """Why there can be no GPU clock here, None if there can; attaches nothing."""
    if jax.default_backend() != "gpu":
        return f"needs a GPU, JAX found {jax.default_backend()}"
    try:
        import torch
    except ImportError:
        return "needs torch, which is not installed"
    return None if torch.cuda.is_available() else "needs a torch that sees the GPU"


class GpuClock:
    """The process's attached profiler. Make it before anything that it should see into is built."""

    def __init__(self, flush_by: str = "write") -> None:
        """Attaches the profiler and checks that it sees a kernel.

        Args:
            flush_by: How the L2 is emptied before a call, one of `timers.FLUSHES`.

        Raises:
            ClockError: It does not; one line says why.
        """
        if reason := unavailable_reason():
            raise ClockError(reason)
        import torch

        self._flush_by = flush_by
        # CUPTI must stay attached between sessions, or CUDA graphs captured in between break.
        os.environ.update(DISABLE_CUPTI_LAZY_REINIT="1", TEARDOWN_CUPTI="0")
        probe = torch.zeros(1024, device="cuda")
        self.time(Execution(probe.clone, no_wait, "eager", None), iterations=2)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Profiles the calls that the body records; the session's samples are there on exit."""
        from torch.profiler import ProfilerActivity, profile

        session = Session(self._flush_by)
        with _quiet(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
            yield session
        session.finish(_gpu_events(profiler))

    def time(self, execution: Execution, iterations: int, *, cold: bool = True) -> list[Sample]:
        """Times `iterations` warmed-up calls in a session of their own; see `Session.record`."""
        with self.session() as session:
            session.record(execution, iterations, cold=cold)
        return session.samples

    def trace(self, execution: Execution, iterations: int, path: str) -> None:
        """Writes a Chrome trace of some calls, host side included, that opens in Perfetto.

        Args:
            execution: Warmed up.
            iterations: Calls to show.
            path: A name ending in `.json` or `.json.gz`.
        """
        from torch.profiler import ProfilerActivity, profile

        session = Session(self._flush_by)
        both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with _quiet(), profile(activities=both) as profiler:
            session.record(execution, iterations)
        profiler.export_chrome_trace(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Each session reads its own events, so torch's warning that older ones go is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning: Profiler clears events", UserWarning)
        yield


def _gpu_events(profiler: Any) -> list[Event]:
    from torch.autograd import DeviceType

    # The raw events: torch's parsed ones take a hundred times as long.
    return [
        Event(event.name(), event.start_ns(), event.end_ns(), event.correlation_id())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
    ]


def split_calls(events: list[Event], calls: int) -> list[Sample]:
    """Assigns events to calls by the markers around each.

    Args:
        events: All GPU activity of a session, in any order.
        calls: How many calls were recorded.

    Returns:
        One sample per call.

    Raises:
        ClockError: There are not two markers per call, or a call ran nothing.
    """
    ordered = sorted(events, key=lambda event: event.start)
    markers = [place for place, event in enumerate(ordered) if _MARKER in event.name]
    if len(markers) != 2 * calls:
        raise ClockError(
            f"the profiler recorded {len(markers)} of {2 * calls} marker kernels and {len(events)} "
            "events; is another profiler attached, or access to GPU counters restricted?"
        )
    bounds = zip(markers[::2], markers[1::2], strict=True)
    return [_sample(ordered[before + 1 : after]) for before, after in bounds]


def _sample(events: list[Event]) -> Sample:
    if not events:
        raise ClockError("a timed call ran nothing on the GPU")
    first, last = events[0].start, max(event.end for event in events)
    return Sample(
        span_us=(last - first) / 1e3,
        launches=len({event.correlation for event in events}),
        kernels=tuple(
            Kernel(event.name, (event.start - first) / 1e3, (event.end - event.start) / 1e3)
            for event in events
        ),
    )


def busy_us(sample: Sample) -> float:
    """Time of the call in which at least one kernel ran; overlapping kernels count once."""
    busy, until = 0.0, 0.0
    for kernel in sample.kernels:
        end = kernel.start_us + kernel.duration_us
        busy += max(0.0, end - max(until, kernel.start_us))
        until = max(until, end)
    return busy
