"""Checks and times solutions on workloads, row by row."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

import jax_moe
from bench import correctness, execution, inputs, roofline, routing, sm_clock
from bench.correctness import Check
from bench.failures import FileError, one_line
from bench.gpu_clock import GpuClock, Sample, busy_us
from bench.results import ERROR, PASS, WRONG, KernelTime, Results, Row
from bench.settings import Settings
from bench.timers import Execution, calls_to_time, statistics_of, wall_times, warm_up
from bench.work import Work, work_of
from interop import dataset
from interop.solutions.base import Solution
from interop.workloads import Workload
from jax_moe import ExpertWeights, LayerInputs
from pallas_kernels import interruption

MAX_KERNELS = 40  # names kept per row; the reference launches thousands of kernels


class Case(NamedTuple):
    """The inputs of one trial and what the oracle makes of them."""

    inputs: LayerInputs
    reference: jax.Array


class Prepared(NamedTuple):
    """A workload, ready to be measured."""

    workload: Workload
    load: routing.LocalLoad
    work: Work
    cases: list[Case]


class Progress(NamedTuple):
    """How a run reports: `start` before a row with a short label, `done` after it."""

    start: Callable[[str], None]
    done: Callable[[Row], None]


def run(
    settings: Settings,
    solutions: Mapping[str, Solution],
    workloads: Sequence[Workload],
    results: Results,
    progress: Progress,
    trace: Callable[[Execution, Solution, Workload, GpuClock | None], None] | None = None,
    programs: execution.Programs | None = None,
) -> None:
    """Measures every solution on every workload, with each clock in turn.

    Host times come first, and every CUDA graph is built again for the GPU clock: an attached
    profiler inflates host times, and sees only into what was built while it was there.

    Args:
        settings: What to do.
        solutions: The available ones that were chosen, the reference first.
        workloads: The chosen rows.
        results: Filled and written as rows are finished; rows already there are kept.
        progress: Told of each row.
        trace: Called after a row's last pass, if given, to record a profile.
        programs: What is compiled already, from `bench.ahead`.
    """
    weights = inputs.draw_weights(settings.inputs, settings.sizes, settings.seed)
    programs = {} if programs is None else programs
    for clock_name in settings.passes:
        clock, done = None, results.timed_by(clock_name)
        if clock_name == "gpu":
            clock = GpuClock(settings.flush)
        if clock_name == settings.timer:
            results.roofline = roofline.measure(clock, settings.sizes)
        for workload in workloads:
            open_ = [one for one in solutions.values() if (one.name, workload.uuid) not in done]
            prepared = None
            for solution in open_:
                progress.start(f"{clock_name}: T={workload.num_tokens} {solution.name}")
                prepared = prepared or prepare(settings, workload, weights, clock_name)
                row = results.rows.get((solution.name, workload.uuid))
                if row is None or row.status == PASS:
                    recorder = trace if clock_name == settings.passes[-1] else None
                    row = measure(settings, solution, prepared, clock, row, recorder, programs)
                    results.put(row)
                progress.done(row)
                _release_torch_memory()


def prepare(
    settings: Settings, workload: Workload, weights: ExpertWeights, clock_name: str
) -> Prepared:
    """Draws or reads a workload's inputs, and runs the oracle on them."""
    sizes = settings.sizes
    routed, factor = _routing(settings, workload)
    config = settings.measured.config
    load = routing.local_load(routed, workload, sizes, config)
    # The pass that only adds host times needs no second check of every trial.
    trials = settings.num_trials if clock_name == settings.timer else 1
    cases = []
    for trial in range(trials):
        padded = inputs.make_arguments(
            settings.inputs, workload, sizes, settings.seed, trial, weights, routed, factor
        )
        # The oracle runs on the padded token count, of which there are few: it compiles slowly.
        reference = jax_moe.reference(*padded.arguments, config=config)[: workload.num_tokens]
        own = inputs.head(padded, workload.num_tokens)
        cases.append(Case(own, jax.block_until_ready(reference)))
    return Prepared(workload, load, work_of(workload, sizes, load), cases)


def _routing(settings: Settings, workload: Workload) -> tuple[routing.HostRouting, float]:
    if settings.inputs != "dataset":
        model = settings.measured
        drawn = routing.draw(workload, settings.sizes, settings.seed, settings.routing, model)
        return drawn, model.routed_scaling_factor
    folder = settings.dataset or ""
    entry = next(
        one for one in dataset.read_workloads(folder) if one.workload.uuid == workload.uuid
    )
    try:
        logits, bias = dataset.read_routing(folder, entry)
    except ValueError as error:
        raise ValueError(f"--dataset: {error}") from None
    experts = settings.sizes.num_experts
    return routing.HostRouting(logits[:, :experts], bias[:experts]), entry.routed_scaling_factor


def measure(
    settings: Settings,
    solution: Solution,
    prepared: Prepared,
    clock: GpuClock | None,
    earlier: Row | None = None,
    trace: Callable[..., None] | None = None,
    programs: execution.Programs | None = None,
) -> Row:
    """Checks a solution on every trial and times it while it is right.

    Args:
        settings: Iterations and tolerances.
        solution: What to measure.
        prepared: The workload.
        clock: The GPU clock; None takes host times.
        earlier: The row of an earlier pass, to be completed.
        trace: As for `run`.
        programs: What is compiled already, to be added to.

    Returns:
        The row. Whatever the solution raises becomes an `ERROR` row.
    """
    row = earlier or new_row(settings, solution.name, prepared)
    try:
        with interruption.undisguised():
            return _measured(settings, solution, prepared, clock, row, trace, programs)
    except FileError:  # of a trace: no fault of the solution
        raise
    except Exception as error:
        return without_times(row, ERROR, one_line(error))


def new_row(settings: Settings, name: str, prepared: Prepared) -> Row:
    """A row with nothing measured yet."""
    workload = prepared.workload
    return Row(
        solution=name,
        uuid=workload.uuid,
        num_tokens=workload.num_tokens,
        local_expert_offset=settings.sizes.offset(workload),
        status=PASS,
        problem=None,
        repro=settings.command(name, workload),
        load=prepared.load,
        work=prepared.work,
    )


def _measured(
    settings: Settings,
    solution: Solution,
    prepared: Prepared,
    clock: GpuClock | None,
    row: Row,
    trace: Callable[..., None] | None,
    programs: execution.Programs | None,
) -> Row:
    times: list[float] = []
    check, bound = row.check, None
    bind = execution.binder(solution, reload=clock is not None, programs=programs)
    with clock.session() if clock else contextlib.nullcontext() as session:
        for case in prepared.cases:
            bound = bind(case.inputs)
            found = _check(solution, bound, case, settings)
            check = found if check is None else check.worse(found)
            if found.problem:
                break
            calls = calls_to_time(warm_up(bound, settings.warmup), settings.iterations)
            if case is prepared.cases[0]:
                time.sleep(settings.cool_down)  # whatever ran before this row, it starts alike
            if session:
                session.record(bound, calls)
            else:
                times += wall_times(bound, calls, settings.flush)
    if bound is None or check is None:
        raise ValueError("a row needs at least one trial")
    stated = solution.workspace_bound
    row = dataclasses.replace(
        row,
        check=check,
        how=bound.how,
        workspace_bytes=bound.workspace_bytes,
        workspace_bound=stated(prepared.cases[0].inputs) if stated else None,
    )
    if problem := check.problem or _over_bound(row):
        return without_times(row, WRONG, problem)
    if trace:
        trace(bound, solution, prepared.workload, clock)
    if session:
        timed = dataclasses.replace(row, **_gpu_fields(session.samples))
        return dataclasses.replace(timed, **_clock_fields(settings, solution, bound, timed))
    return dataclasses.replace(row, wall=statistics_of(times))


def _check(solution: Solution, bound: Execution, case: Case, settings: Settings) -> Check:
    output = bound.call()
    bound.block(output)
    found = execution.to_jax(solution, output)
    return correctness.check(found, case.reference, settings.tolerance)


def _over_bound(row: Row) -> str | None:
    found, stated = row.workspace_bytes, row.workspace_bound
    if found is None or stated is None or found <= stated:
        return None
    return f"a call takes {found:,} bytes of temporary memory, stated are at most {stated:,}"


def without_times(row: Row, status: str, problem: str) -> Row:
    """A row that is not right shows no speed, not even an earlier pass's."""
    return dataclasses.replace(
        row,
        status=status,
        problem=problem,
        gpu=None,
        wall=None,
        launches=None,
        busy_us=None,
        kernels=(),
        clock=None,
        sustained=None,
    )


def _gpu_fields(samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "gpu": statistics_of([sample.span_us for sample in samples]),
        "launches": int(statistics.median(sample.launches for sample in samples)),
        "busy_us": statistics.median(busy_us(sample) for sample in samples),
        "kernels": kernel_times(samples),
    }


def _clock_fields(
    settings: Settings, solution: Solution, bound: Execution, row: Row
) -> dict[str, Any]:
    """The SM clock of a row that is timed already; None where it cannot be read."""
    found: dict[str, Any] = {}
    what, framework = f"{row.solution} T={row.num_tokens}", solution.framework
    if busy := row.busy_us:
        found["clock"] = sm_clock.unless_it_fails(
            what, lambda: sm_clock.during(bound, framework, busy, settings.flush)
        )
    if found.get("clock") and settings.sustained and row.gpu:
        call_us = row.gpu.median
        found["sustained"] = sm_clock.unless_it_fails(
            what, lambda: sm_clock.sustained(bound, framework, call_us)
        )
    return found


def kernel_times(samples: Sequence[Sample]) -> tuple[KernelTime, ...]:
    """Median time and count per call of each kernel name, in order of the first start."""
    names = dict.fromkeys(kernel.name for sample in samples for kernel in sample.kernels)
    times = []
    for name in names:
        calls = [[k.duration_us for k in sample.kernels if k.name == name] for sample in samples]
        us = statistics.median(sum(durations) for durations in calls)
        times.append(KernelTime(name, us, int(statistics.median(map(len, calls)))))
    return _longest(times)


def _longest(times: Iterable[KernelTime]) -> tuple[KernelTime, ...]:
    times = list(times)
    if len(times) <= MAX_KERNELS:
        return tuple(times)
    kept = set(sorted(times, key=lambda kernel: -kernel.us)[: MAX_KERNELS - 1])
    rest = [kernel for kernel in times if kernel not in kept]
    other = KernelTime(
        f"{len(rest)} other kernels", sum(k.us for k in rest), sum(k.launches for k in rest)
    )
    return (*(kernel for kernel in times if kernel in kept), other)


def _release_torch_memory() -> None:
    """Hands torch's cached blocks back, since JAX allocates from the same GPU."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
