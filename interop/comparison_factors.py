"""Which of the second pipeline's differences helped: each put into the first pipeline alone.

The published comparison (xiefan46/labubu-bench, 2026-02-02, on a B200) names three differences and
ranks them without having measured them apart. Here each is a solution of its own, and every
sentence is computed from the rows, whether or not it agrees.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from interop.comparison_analysis import (
    Results,
    WorkloadRow,
    by_regime,
    clock_ratio,
    clocks,
    geomean,
    plural,
)

BASE, ALL = "sglang_v1", "sglang_v2"
FACTORS = {
    "sglang_v1_native_quant": "native quantization",
    "sglang_v1_zero_copy_swiglu": "zero-copy SwiGLU",
    "sglang_v1_small_workspace": "small workspace",
}
_QUANT, _SWIGLU, _WORKSPACE = FACTORS
_PUBLISHED_QUANT = (1.10, 1.15)


class _Line(NamedTuple):
    """What each difference brought over some workloads, by one clock.

    Attributes:
        regime: Name of the range of token counts.
        num_workloads: How many it holds.
        ratios: Solution -> the workloads' ratios of speeds to `BASE`, those that both passed.
    """

    regime: str
    num_workloads: int
    ratios: Mapping[str, Sequence[float]]

    def brought(self, name: str) -> float | None:
        """The geometric mean of a solution's ratios; None without a workload."""
        return geomean(self.ratios[name]) if self.ratios.get(name) else None


def split(results: Results) -> tuple[Results, Results]:
    """The solutions of the main tables, and those that belong to this section."""
    apart = FACTORS if BASE in results else {}
    main = {name: rows for name, rows in results.items() if name not in apart}
    return main, {name: rows for name, rows in results.items() if name in apart}


def section(workloads: Sequence[WorkloadRow], results: Results) -> list[str]:
    """The section "What helped most" in markdown; empty if `sglang_v1` is not among the results.

    Args:
        workloads: By ascending token count.
        results: Solution -> uuid -> measurement.

    Returns:
        Lines of markdown.
    """
    if BASE not in results:
        return []
    lines = ["## What helped most", ""]
    missing = [name for name in (*FACTORS, ALL) if name not in results]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        text = f"Not measured here: `bench_main.py --report` with {names} beside `{BASE}` tells."
        return [*lines, text, ""]
    lines += [
        f"Each of the three differences put into `{BASE}` alone, and all of them (`{ALL}`): how "
        f"many times as fast as `{BASE}` (above 1: it helped), geometric means.",
        "",
    ]
    verdicts: list[str] = []
    for clock in clocks(results):
        table = _lines(workloads, results, clock)
        lines += [f"### By {clock}", "", *_table(table), ""]
        lines += [*(f"- {sentence}" for sentence in map(_sentence, table)), ""]
        verdicts += [f"- By {clock}: {verdict}" for verdict in _verdicts(table)]
    lines += ["### Beside the published ranking", ""]
    return [*lines, _PUBLISHED, "", *verdicts, *_failures(workloads, results), ""]


_PUBLISHED = (
    "Published for a B200, not measured apart there: (1) the smaller workspace is the dominant "
    "factor at T=1; (2) native quantization brings 10 to 15 % at all batch sizes; (3) zero-copy "
    "SwiGLU brings a modest gain, read here as less than native quantization in every regime."
)


def _lines(workloads: Sequence[WorkloadRow], results: Results, clock: str) -> list[_Line]:
    lines = []
    for regime, rows in by_regime(workloads):
        ratios = {
            name: [
                ratio
                for work in rows
                if (ratio := clock_ratio(results, BASE, name, work.uuid, clock)) is not None
            ]
            for name in (*FACTORS, ALL)
        }
        lines.append(_Line(regime, len(rows), ratios))
    return lines


def _table(lines: Sequence[_Line]) -> list[str]:
    header = ["regime", "workloads", *FACTORS.values(), f"all three (`{ALL}`)"]
    cells = [
        [line.regime, str(line.num_workloads), *(_cell(line, name) for name in (*FACTORS, ALL))]
        for line in lines
    ]
    marks = ["---", *["--:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (header, marks, *cells)]


def _cell(line: _Line, name: str) -> str:
    value = line.brought(name)
    if value is None:
        return "-"
    count = len(line.ratios[name])
    return f"{value:.2f}x" + ("" if count == line.num_workloads else f" (of {count})")


def _sentence(line: _Line) -> str:
    found = {title: value for n, title in FACTORS.items() if (value := line.brought(n)) is not None}
    if len(found) < len(FACTORS):
        return f"{line.regime}: not all of the three were measured."
    ranked = sorted(found.items(), key=lambda pair: -pair[1])
    shown = ", ".join(f"{title} {value:.2f}x" for title, value in ranked)
    best, most = ranked[0]
    first = f"{best} helped most" if round(most, 2) > 1 else "none of the three helped"
    return f"{line.regime}: {first} ({shown})."


def _verdicts(lines: Sequence[_Line]) -> list[str]:
    whole = [line for line in lines if all(line.brought(name) for name in FACTORS)]
    by_name = {line.regime: line for line in whole}
    regimes = [line for line in whole if line.regime != "All workloads"]
    found = []
    if one := by_name.get("T = 1"):
        shown = {name: round(one.brought(name) or 0.0, 2) for name in FACTORS}
        largest = shown[_WORKSPACE] > max(1.0, shown[_QUANT], shown[_SWIGLU])
        figures = ", ".join(f"{title} {shown[name]:.2f}x" for name, title in FACTORS.items())
        found.append(f"(1) {'agrees' if largest else 'does not agree'} at T=1: {figures}.")
    if not regimes:
        return found
    low, high = _PUBLISHED_QUANT
    brought = {line.regime: round(line.brought(_QUANT) or 0.0, 2) for line in regimes}
    inside = [regime for regime, value in brought.items() if low <= value <= high]
    figures = ", ".join(f"{value:.2f}x at {regime}" for regime, value in brought.items())
    found.append(f"(2) {_agreement(len(inside), len(regimes))}: {figures}.")
    smaller = [
        line
        for line in regimes
        if round(line.brought(_SWIGLU) or 0.0, 2) < round(line.brought(_QUANT) or 0.0, 2)
    ]
    figures = ", ".join(f"{line.brought(_SWIGLU):.2f}x at {line.regime}" for line in regimes)
    found.append(f"(3) {_agreement(len(smaller), len(regimes))}: {figures}.")
    return found


def _agreement(count: int, total: int) -> str:
    if count == total:
        return "agrees"
    return "does not agree" if count == 0 else f"agrees in {count} of {plural(total, 'regime')}"


def _failures(workloads: Sequence[WorkloadRow], results: Results) -> list[str]:
    lines = []
    for name in FACTORS:
        statuses = [results[name][w.uuid].status for w in workloads if w.uuid in results[name]]
        failed = [status for status in statuses if status != "PASSED"]
        if failed or len(statuses) < len(workloads):
            passed = len(statuses) - len(failed)
            shown = f" ({', '.join(sorted(set(failed)))})" if failed else ""
            lines.append(
                f"- `{name}` passed {passed} of {plural(len(workloads), 'workload')}{shown}."
            )
    return lines
