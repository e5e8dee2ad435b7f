"""The published comparison's document, rendered again from measured rows.

`write(directory, workloads, results, ...)` leaves `comparison_report.md` and
`comparison_report.png`. What was measured (flashinfer-bench traces, `bench_main.py`) comes as rows:

    workloads = [WorkloadRow(uuid="e05c6c03-...", num_tokens=1, local_expert_offset=32), ...]
    results = {"sglang_v1": {uuid: Measurement("PASSED", latency_ms=0.16, reference_ms=15.4,
                                               workspace_bytes=1 << 30)}, ...}
    write(folder, workloads, results, header={"Device": "NVIDIA H100", ...}, command="python ...",
          designs={"sglang_v1": SOLUTIONS["sglang_v1"].design, ...})

A missing row or one whose status is not PASSED never shows a speed. A mean runs over all workloads
that any solution passed; one over fewer, for want of the others, says over how many. Every sentence
of the analysis is computed from the numbers (`interop.comparison_analysis`).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from interop.comparison_analysis import (
    PASSED,
    Measurement,
    Results,
    WorkloadRow,
    analysis,
    covered_uuids,
    geomean,
    latency_ratio,
    mean,
    pairs,
    passed,
    speedup,
)
from jax_moe.io.files import write_atomically

__all__ = ["PASSED", "Measurement", "WorkloadRow", "plot_speedups", "render", "write"]

_Average = Callable[[Sequence[float]], float]
_TIMES = "{:.2f}x"
_OF = "(of {})"
_OF_NOTE = (
    "`(of n)`: a mean over the n workloads that the column has, not comparable with those over all."
)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric_from: int) -> list[str]:
    marks = ["---" if i < numeric_from else "--:" for i in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)]


def _differences(designs: Mapping[str, Mapping[str, str]]) -> list[str]:
    shown = {name: design for name, design in designs.items() if design}
    if not shown:
        return []
    aspects = dict.fromkeys(aspect for design in shown.values() for aspect in design)
    rows = [[a, *(design.get(a, "-") for design in shown.values())] for a in aspects]
    return ["## Differences", "", *_table(["", *shown], rows, numeric_from=len(shown) + 1), ""]


def _times(value: float | None) -> str:
    return "-" if value is None else _TIMES.format(value)


def _result_cells(results: Results, name: str, uuid: str) -> list[str]:
    row = passed(results, name, uuid)
    if row is None:
        found = results[name].get(uuid)
        return [found.status if found and found.status != PASSED else "not run", "-"]
    return [f"{row.latency_ms:.3f}", _times(speedup(row))]


def _mean_cell(average: _Average, values: Sequence[float], count: int, shape: str) -> str:
    if not values:
        return "-"
    cell = shape.format(average(values))
    return cell if len(values) == count else f"{cell} {_OF.format(len(values))}"


def _summary_rows(results: Results, uuids: Sequence[str]) -> list[list[str]]:
    count = len(uuids)
    rows = []
    for label, average in (("mean", mean), ("geomean", geomean)):
        cells = [f"**{label}** of {count}", "", ""]
        for name in results:
            rated = [passed(results, name, uuid) for uuid in uuids]
            latencies = [row.latency_ms for row in rated if row and row.latency_ms]
            speedups = [value for row in rated if (value := speedup(row)) is not None]
            cells.append(_mean_cell(average, latencies, count, "{:.3f}"))
            cells.append(_mean_cell(average, speedups, count, _TIMES))
        for slow, fast in pairs(results):
            ratios = [r for uuid in uuids if (r := latency_ratio(results, slow, fast, uuid))]
            cells.append(_mean_cell(average, ratios, count, _TIMES))
        rows.append(cells)
    return rows


def _results_table(workloads: Sequence[WorkloadRow], results: Results) -> list[str]:
    header = ["UUID", "num_tokens", "offset"]
    for name in results:
        header += [f"{name} ms", "speedup"]
    header += [f"{fast} / {slow}" for slow, fast in pairs(results)]
    rows = []
    for work in workloads:
        cells = [f"`{work.uuid[:8]}`", str(work.num_tokens), str(work.local_expert_offset)]
        for name in results:
            cells += _result_cells(results, name, work.uuid)
        cells += [
            _times(latency_ratio(results, slow, fast, work.uuid)) for slow, fast in pairs(results)
        ]
        rows.append(cells)
    means = _summary_rows(results, covered_uuids(workloads, results))
    lines = _table(header, rows + means, numeric_from=1)
    is_marked = any(cell.endswith(")") for cells in means for cell in cells)
    return [*lines, "", _OF_NOTE] if is_marked else lines


def _workspace(workloads: Sequence[WorkloadRow], results: Results) -> list[str]:
    lines = []
    tokens = {work.uuid: work.num_tokens for work in workloads}
    for name, rows in results.items():
        measured = {
            u: r.workspace_bytes
            for u, r in rows.items()
            if r.workspace_bytes is not None and u in tokens
        }
        if measured:
            top = max(measured, key=lambda uuid: measured[uuid])
            lines.append(f"- `{name}`: {measured[top]:,} bytes (at T={tokens[top]})")
        else:
            lines.append(f"- `{name}`: not measured in this run")
    return ["## Peak workspace", "", *lines, ""]


def render(
    workloads: Sequence[WorkloadRow],
    results: Results,
    *,
    header: Mapping[str, str],
    command: str,
    designs: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    warnings: Sequence[str] = (),
    plot: str | None = None,
) -> str:
    """Renders the document as markdown.

    Args:
        workloads: the workloads to list; shown by ascending token count.
        results: solution name -> uuid -> measurement; the first solution is the baseline of the
            ratios.
        header: lines of the head, label -> text (device, tolerances, timer, configuration).
        command: the command that measured the rows.
        designs: solution name -> aspect -> how it does that (`Solution.design`); facts of the code.
        warnings: paragraphs that stand before everything else.
        plot: name of an image to show, relative to the document.

    Returns:
        The markdown text.

    Raises:
        ValueError: no workloads, no solutions, or a result for a workload that is not listed.
    """
    if not workloads or not results:
        raise ValueError(
            f"a report needs workloads and results, got {len(workloads)} and {len(results)}"
        )
    known = {work.uuid for work in workloads}
    unknown = sorted({uuid for rows in results.values() for uuid in rows} - known)
    if unknown:
        raise ValueError(f"results: workloads that are not listed: {', '.join(unknown[:3])}")
    ordered = sorted(workloads, key=lambda work: (work.num_tokens, work.uuid))
    lines = [f"# {' vs '.join(results)}", ""]
    lines += [line for warning in warnings for line in (warning, "")]
    lines += [f"- {label}: {text}" for label, text in header.items()]
    lines += ["", "## Command", "", "```bash", command, "```", ""]
    lines += _differences({name: designs.get(name, {}) for name in results})
    lines += [
        "## Results",
        "",
        "Latency in ms, speedup over the reference, ratio of latencies (above 1: first is faster).",
    ]
    lines += ["", *_results_table(ordered, results), ""]
    if plot:
        lines += [f"![Speedup against tokens]({plot})", ""]
    lines += ["## Analysis", ""]
    for heading, sentences in analysis(ordered, results):
        lines += [f"### {heading}", "", *(f"- {sentence}" for sentence in sentences), ""]
    lines += _workspace(ordered, results)
    return "\n".join(lines).rstrip() + "\n"


def plot_speedups(
    workloads: Sequence[WorkloadRow], results: Results, path: str | os.PathLike[str]
) -> None:
    """Plots each solution's speedup over the reference against the tokens (log-log) into a PNG.

    Args:
        workloads: the workloads to show.
        results: solution name -> uuid -> measurement; rows without a speedup are left out.
        path: the file to write, atomically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in results:
        points = [
            (work.num_tokens, value)
            for work in sorted(workloads, key=lambda work: work.num_tokens)
            if (value := speedup(passed(results, name, work.uuid))) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="speedup over the reference")
    axes.grid(True, which="both", alpha=0.3)
    if axes.lines:
        axes.legend()
    with write_atomically(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def write(
    directory: str | os.PathLike[str],
    workloads: Sequence[WorkloadRow],
    results: Results,
    *,
    header: Mapping[str, str],
    command: str,
    designs: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    warnings: Sequence[str] = (),
    name: str = "comparison_report",
) -> Path:
    """Writes `NAME.md` and `NAME.png` into `directory`; arguments as for `render`.

    Returns:
        The path of the markdown document.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    text = render(
        workloads,
        results,
        header=header,
        command=command,
        designs=designs,
        warnings=warnings,
        plot=f"{name}.png",
    )
    plot_speedups(workloads, results, folder / f"{name}.png")
    path = folder / f"{name}.md"
    with write_atomically(path, "w") as file:
        file.write(text)
    return path
