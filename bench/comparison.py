"""The published comparison's document, from the rows of a run."""

from collections.abc import Collection, Mapping
from pathlib import Path

from bench import header, plots
from bench.results import PASS, REFERENCE, Results, Row
from bench.settings import Settings
from bench.solutions import known_to
from interop import comparison_report
from interop.comparison_analysis import GPU_TIME, KERNEL_TIME, WALL_TIME
from interop.comparison_report import Measurement, WorkloadRow
from jax_moe import assume_device

_CLOCKS = {"gpu": GPU_TIME, "wall": WALL_TIME}


def write(results: Results, settings: Settings, name: str) -> list[Path]:
    """Writes `NAME.md` and `NAME.png` into the run's folder; the reference is the denominator.

    Returns:
        The files; none where there is no row of another solution than the reference.

    Raises:
        OSError: As `comparison_report.write`.
    """
    workloads = [
        WorkloadRow(uuid, rows[0].num_tokens, rows[0].local_expert_offset)
        for uuid, rows in results.workloads()
    ]
    asked = [name for name in settings.solutions if name in results.solutions()]
    names = dict.fromkeys([*asked, *results.solutions()])
    measured: dict[str, dict[str, Measurement]] = {
        name: {} for name in names if name != REFERENCE and not _is_untimed(results, name)
    }
    for row in results.rows.values():
        if row.solution in measured:
            measured[row.solution][row.uuid] = _measurement(results, row)
    if not measured:
        return []
    shown = {uuid for rows in measured.values() for uuid in rows}
    absent = "; ".join(f"{name}: {why}" for name, why in results.unavailable.items())
    return comparison_report.write(
        results.path.parent,
        [work for work in workloads if work.uuid in shown],
        measured,
        header=dict(header.lines(results, settings))
        | {"Launched as": _launches(results, measured)}
        | ({"Not measured": absent} if absent else {}),
        command=results.script(),
        designs=designs_of(results, settings),
        warnings=header.warnings(results, settings),
        title=f"{results.about['device']['kind']}, speedup over {REFERENCE} by "
        f"{_CLOCKS[results.timer]}, medians\n{plots.conditions(results)}",
        name=name,
    )


def designs_of(results: Results, settings: Settings) -> dict[str, Mapping[str, str]]:
    """By solution, as they are where the rows were measured, which may be another machine."""
    capability = results.about["device"]["compute_capability"]
    with assume_device(f"sm_{capability.replace('.', '')}" if capability else "cpu"):
        return {name: one.design for name, one in known_to(settings).items()}


def _is_untimed(results: Results, name: str) -> bool:
    """Whether a solution is only checked, as in the interpreter of the kernels."""
    rows = [row for row in results.rows.values() if row.solution == name]
    return all(row.status == PASS and row.time(results.timer) is None for row in rows)


def _launches(results: Results, names: Collection[str]) -> str:
    hows: dict[str, dict[str, None]] = {}
    for row in results.rows.values():
        if row.how and row.solution in names:
            hows.setdefault(row.how, {})[row.solution] = None
    return "; ".join(f"{how}: {', '.join(those)}" for how, those in hows.items())


def _measurement(results: Results, row: Row) -> Measurement:
    times = row.time(results.timer)
    reference = results.rows.get((REFERENCE, row.uuid))
    reference_times = reference.time(results.timer) if reference else None
    by_clock = {
        GPU_TIME: row.gpu and row.gpu.median,
        KERNEL_TIME: row.busy_us,
        WALL_TIME: row.wall and row.wall.median,
    }
    return Measurement(
        status=comparison_report.PASSED if row.status == PASS else row.status,
        latency_ms=times.median / 1e3 if times else None,
        reference_ms=reference_times.median / 1e3 if reference_times else None,
        workspace_bytes=row.workspace_bytes,
        clocks={title: found / 1e3 for title, found in by_clock.items() if found},
    )
