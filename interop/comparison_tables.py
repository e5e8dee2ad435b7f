"""The tables of the published comparison's document: speedups, latencies, means, regimes."""

import re
from collections.abc import Callable, Mapping, Sequence

from interop.comparison_analysis import (
    PASSED,
    Results,
    WorkloadRow,
    by_regime,
    covered_uuids,
    geomean,
    latency_ratio,
    mean,
    pairs,
    passed,
    plural,
    speedup,
)

_TIMES = "{:.2f}x"
_MOST_COLUMNS = 8  # of figures; more would be wider than a page
_OF_NOTE = (
    "`(of n)`: a mean over the n workloads that the column has, not comparable with those over all."
)

_Value = Callable[[str], float | None]  # uuid -> figure, None where there is none
_Column = tuple[str, _Value, Callable[[str], str], str]  # title, figure, what else to show, format


def differences(designs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line per solution, one column per aspect in which the designs differ."""
    shown = {name: design for name, design in designs.items() if design}
    if not shown:
        return []
    aspects = list(dict.fromkeys(aspect for design in shown.values() for aspect in design))
    rows = [[f"`{n}`", *(design.get(a, "-") for a in aspects)] for n, design in shown.items()]
    return ["## Differences", "", *_table(["solution", *aspects], rows, len(aspects) + 1), ""]


def status(workloads: Sequence[WorkloadRow], results: Results) -> list[str]:
    """Whether all passed; if not, a line per solution, which says what was not run, too."""
    total = len(workloads)
    counts = {
        name: sum(passed(results, name, work.uuid) is not None for work in workloads)
        for name in results
    }
    if all(count == total for count in counts.values()):
        who = "with each of the solutions" if len(results) > 1 else f"with `{next(iter(results))}`"
        return [f"All {plural(total, 'workload')} PASS {who}."]
    missing = {
        name: sum(work.uuid not in rows for work in workloads) for name, rows in results.items()
    }
    lines = [
        f"- `{name}`: {count} of {plural(total, 'workload')} PASS"
        + (f", {missing[name]} not run" if missing[name] else "")
        for name, count in counts.items()
    ]
    some_failed = any(count + missing[name] < total for name, count in counts.items())
    said = "Not all workloads PASS" if some_failed else "All that were run PASS, not all were run"
    return [f"**{said}:**", "", *lines]


def figures(workloads: Sequence[WorkloadRow], results: Results) -> list[str]:
    """The tables of speedups with the ratios of speeds, and of latencies.

    Args:
        workloads: By ascending token count.
        results: Solution -> uuid -> measurement.

    Returns:
        Lines of markdown. A row that did not pass shows its status and never a figure.
    """
    ratios = [_ratio_column(results, slow, fast) for slow, fast in pairs(results)]
    speeds = [_speedup_column(results, name) for name in results] if has_reference(results) else []
    latencies = [_latency_column(results, name) for name in results]
    of_ratios = (
        "`A / B` is a ratio of speeds: how many times as fast A is as B (above 1: A is faster)"
    )
    explained = ["Speedup over the reference"] * bool(speeds) + [of_ratios] * bool(ratios)
    lines = []
    if explained:
        lines = ["; ".join(explained) + ".", "", *_blocks(workloads, results, speeds + ratios)]
    return [*lines, "Latency in ms.", "", *_blocks(workloads, results, latencies)]


def has_reference(results: Results) -> bool:
    """Whether any row has a time of the reference, without which there are no speedups."""
    return any(row.reference_ms for rows in results.values() for row in rows.values())


def regimes(workloads: Sequence[WorkloadRow], results: Results) -> list[str]:
    """Geometric means of the speedups by regime, one column per solution."""
    columns = [_speedup_column(results, name) for name in results]
    lines = []
    for block in _cut(columns):
        rows = [
            [
                f"{name} ({plural(len(rows), 'workload')})",
                *(_mean_cell(geomean, column, [w.uuid for w in rows]) for column in block),
            ]
            for name, rows in by_regime(workloads)
        ]
        lines += [*_table(["geomean of speedups", *(c[0] for c in block)], rows, 1), ""]
    return lines


def _speedup_column(results: Results, name: str) -> _Column:
    def value(uuid: str) -> float | None:
        return speedup(passed(results, name, uuid))

    return name, value, lambda uuid: _status(results, name, uuid), _TIMES


def _latency_column(results: Results, name: str) -> _Column:
    def value(uuid: str) -> float | None:
        row = passed(results, name, uuid)
        return row.latency_ms if row else None

    return name, value, lambda uuid: _status(results, name, uuid), "{:.3f}"


def _ratio_column(results: Results, slow: str, fast: str) -> _Column:
    def value(uuid: str) -> float | None:
        return latency_ratio(results, slow, fast, uuid)

    return f"{fast} / {slow}", value, lambda _: "-", _TIMES


def _status(results: Results, name: str, uuid: str) -> str:
    """What stands where there is no figure."""
    row = results[name].get(uuid)
    if row is None:
        return "not run"
    return "-" if row.status == PASSED else row.status


def _blocks(
    workloads: Sequence[WorkloadRow], results: Results, columns: Sequence[_Column]
) -> list[str]:
    covered = covered_uuids(workloads, results)
    lines = []
    is_marked = False
    for block in _cut(columns):
        rows = [
            [
                f"`{_short(work.uuid)}`",
                str(work.num_tokens),
                str(work.local_expert_offset),
                *(_cell(column, work.uuid) for column in block),
            ]
            for work in workloads
        ]
        for label, average in (("mean", mean), ("geomean", geomean)):
            cells = [_mean_cell(average, column, covered) for column in block]
            rows.append([f"**{label}** of {len(covered)}", "", "", *cells])
            is_marked = is_marked or any("(of " in cell for cell in cells)
        titles = ["UUID", "num_tokens", "offset", *(column[0] for column in block)]
        lines += [*_table(titles, rows, numeric_from=1), ""]
    return [*lines, _OF_NOTE, ""] if is_marked else lines


def _short(uuid: str) -> str:
    """The first eight digits of a uuid; another name, such as "scaling-512", is short as it is."""
    return uuid[:8] if re.match(r"[0-9a-f]{8}-", uuid) else uuid


def _cut(columns: Sequence[_Column]) -> list[Sequence[_Column]]:
    return [columns[i : i + _MOST_COLUMNS] for i in range(0, len(columns), _MOST_COLUMNS)]


def _cell(column: _Column, uuid: str) -> str:
    _, value, otherwise, shape = column
    found = value(uuid)
    return otherwise(uuid) if found is None else shape.format(found)


def _mean_cell(
    average: Callable[[Sequence[float]], float], column: _Column, uuids: Sequence[str]
) -> str:
    _, value, _, shape = column
    values = [found for uuid in uuids if (found := value(uuid)) is not None]
    if not values:
        return "-"
    cell = shape.format(average(values))
    return cell if len(values) == len(uuids) else f"{cell} (of {len(values)})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric_from: int) -> list[str]:
    marks = ["---" if i < numeric_from else "--:" for i in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)]
