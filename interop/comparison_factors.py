"""Which of the second pipeline's differences helped: each put into the first pipeline alone.

The published comparison (xiefan46/labubu-bench, 2026-02-02, on a B200) names three differences and
ranks them without having measured them apart. Here each is a solution of its own, and every
sentence is computed from the rows, whether or not it agrees.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from interop.comparison_analysis import (
    ALL_WORKLOADS,
    GPU_TIME,
    KERNEL_TIME,
    Results,
    WorkloadRow,
    by_regime,
    clock_ratio,
    clock_time,
    clocks,
    geomean,
    mean,
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
# Geometric means of the published ratios, with the regimes' names.
_PUBLISHED_ALL = {
    "T = 1": 1.70,
    "T = 7-32": 1.15,
    "T = 50-80": 1.08,
    "T = 901": 1.15,
    "T > 10K": 1.14,
}
# Of the first pipeline's time: as far apart as medians of the same kernels have been.
_ADDS_UP = 0.02


class _Line(NamedTuple):
    """What each difference brought over some workloads, by one clock.

    Attributes:
        regime: Name of the range of token counts.
        num_workloads: How many it holds.
        ratios: Solution -> the workloads' ratios of speeds to `BASE`, those that both passed.
        times: Solution -> us of the workloads that `BASE`, the three and `ALL` passed.
    """

    regime: str
    num_workloads: int
    ratios: Mapping[str, Sequence[float]]
    times: Mapping[str, Sequence[float]]

    def brought(self, name: str) -> float | None:
        """The geometric mean of a solution's ratios; None without a workload."""
        return geomean(self.ratios[name]) if self.ratios.get(name) else None

    def base(self) -> float:
        """Mean us of `BASE`; there must be `times`."""
        return mean(self.times[BASE])

    def saved(self, name: str) -> float:
        """Mean us that a solution takes less than `BASE`; there must be `times`."""
        return self.base() - mean(self.times[name])

    def summed(self) -> float:
        """What the three saved, added up; there must be `times`."""
        return sum(self.saved(name) for name in FACTORS)

    def adds_up(self) -> bool:
        """Whether that is about what all of them together saved; there must be `times`."""
        return abs(self.summed() - self.saved(ALL)) <= _ADDS_UP * self.base()


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
        lines += [f"### By {clock}", ""]
        lines += _gaps(workloads, results) if clock == KERNEL_TIME else []
        lines += [*_table(table), "", *_savings(table)]
        lines += [*(f"- {sentence}" for sentence in map(_sentence, table)), ""]
        verdicts += [f"- By {clock}: {verdict}" for verdict in _verdicts(table)]
    lines += ["### Beside the published ranking", ""]
    return [*lines, _PUBLISHED, "", *verdicts, *_failures(workloads, results), ""]


_PUBLISHED = (
    "Published for a B200, by times with the host's in them, not measured apart there: (1) the "
    "smaller workspace is the dominant factor at T=1, since 1 GiB is allocated at every call; (2) "
    "native quantization brings 10 to 15 % at all batch sizes, read here as 1.10x to 1.15x; (3) "
    "zero-copy SwiGLU brings a modest gain, read here as above 1.00x and less than native "
    "quantization in every regime. What the host does to allocate is in no GPU or kernel time, and "
    "a CUDA graph that is replayed allocates nothing."
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
        lines.append(_Line(regime, len(rows), ratios, _times(rows, results, clock)))
    return lines


def _times(rows: Sequence[WorkloadRow], results: Results, clock: str) -> dict[str, list[float]]:
    names = (BASE, *FACTORS, ALL)
    found: dict[str, list[float]] = {name: [] for name in names}
    for work in rows:
        times = {name: clock_time(results, name, work.uuid, clock) for name in names}
        if all(times.values()):
            for name, time in times.items():
                found[name].append((time or 0.0) * 1e3)
    return found


def _gaps(workloads: Sequence[WorkloadRow], results: Results) -> list[str]:
    found = []
    for regime, rows in by_regime(workloads):
        gaps = [
            (span - kernels) * 1e3
            for work in rows
            for name in (BASE, *FACTORS, ALL)
            if (span := clock_time(results, name, work.uuid, GPU_TIME))
            and (kernels := clock_time(results, name, work.uuid, KERNEL_TIME))
        ]
        if gaps and regime != ALL_WORKLOADS:
            found.append(f"{min(gaps):z.1f} to {max(gaps):z.1f} us at {regime}")
    if not found:
        return []
    text = (
        "GPU time without the gaps between kernels, and so without those that fewer kernels save. "
        "One CUDA graph can have short gaps and the next, of the same kernels, long ones: this "
        f"clock does not see that. All gaps of a call: {', '.join(found)}."
    )
    return [text, ""]


def _table(lines: Sequence[_Line]) -> list[str]:
    header = ["regime", "workloads", *FACTORS.values(), f"all three (`{ALL}`)"]
    cells = [
        [line.regime, str(line.num_workloads), *(_cell(line, name) for name in (*FACTORS, ALL))]
        for line in lines
    ]
    return _markdown(header, cells)


def _markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---", *["--:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (header, marks, *cells)]


def _savings(lines: Sequence[_Line]) -> list[str]:
    """The table of us, and whether the three add up; empty where no workload has all times."""
    whole = [line for line in lines if line.times[BASE] and line.regime != ALL_WORKLOADS]
    if not whole:
        return []
    header = ["saved us", f"`{BASE}` us", *FACTORS.values(), "sum", f"all three (`{ALL}`)"]
    cells = []
    for line in whole:
        saved = [*map(line.saved, FACTORS), line.summed(), line.saved(ALL)]
        shown = [f"{us:z,.1f} ({100 * us / line.base():z.1f} %)" for us in saved]
        cells.append([line.regime, f"{line.base():,.1f}", *shown])
    apart = [
        f"{line.regime} (sum {line.summed():z,.1f} us, all three {line.saved(ALL):z,.1f} us)"
        for line in whole
        if not line.adds_up()
    ]
    explained = f"Mean us less than `{BASE}`, and per cent of its time (below 0: slower):"
    text = f"within {100 * _ADDS_UP:.0f} % of `{BASE}`'s time"
    if len(apart) == len(whole):
        text = f"The three do not add up to what all of them saved, {text}: {', '.join(apart)}."
    else:
        text = f"The three add up to what all of them saved, {text}"
        text += f", but not at {', '.join(apart)}." if apart else "."
    return [explained, "", *_markdown(header, cells), "", text, ""]


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
    regimes = [line for line in whole if line.regime != ALL_WORKLOADS]
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
    modest = [
        line
        for line in regimes
        if 1.0 < round(line.brought(_SWIGLU) or 0.0, 2) < round(line.brought(_QUANT) or 0.0, 2)
    ]
    figures = ", ".join(f"{line.brought(_SWIGLU):.2f}x at {line.regime}" for line in regimes)
    found.append(f"(3) {_agreement(len(modest), len(regimes))}: {figures}.")
    together = [
        f"{value:.2f}x at {line.regime} (published: {_PUBLISHED_ALL[line.regime]:.2f}x)"
        for line in regimes
        if line.regime in _PUBLISHED_ALL and (value := line.brought(ALL))
    ]
    return [*found, f"all three {', '.join(together)}."] if together else found


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
