"""The published comparison's document, rendered again from measured rows.

`write(directory, workloads, results, ...)` leaves `comparison_report.md` and, unless there is one
token count only, `comparison_report.png`. What was measured (flashinfer-bench traces,
`bench_main.py`) comes as rows:

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from interop import comparison_factors, comparison_tables, markdown, plot_style
from interop.comparison_analysis import (
    PASSED,
    Measurement,
    Results,
    WorkloadRow,
    analysis,
    is_few,
    passed,
    speedup,
)
from jax_moe.io.files import write_atomically

__all__ = ["PASSED", "Measurement", "PlotError", "WorkloadRow", "plot_speedups", "render", "write"]


class PlotError(OSError):
    """The plot cannot be written; `filename` names it. The document is there without it."""


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
        results: solution name -> uuid -> measurement.
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
    main, _ = comparison_factors.split(results)
    lines = [f"# {_title(main)}", ""]
    lines += [line for warning in warnings for line in (warning, "")]
    lines += [f"- {label}: {text}" for label, text in header.items()]
    lines += ["", "## Command", "", "```bash", command, "```", ""]
    lines += comparison_tables.differences({name: designs.get(name, {}) for name in results})
    lines += ["## Results", "", *comparison_tables.status(ordered, main), ""]
    lines += comparison_tables.figures(ordered, main)
    if plot:
        lines += [f"![Speedup against tokens]({plot})", ""]
    lines += ["## Analysis", ""]
    has_reference = comparison_tables.has_reference(main)
    if has_reference and not is_few(main):
        lines += comparison_tables.regimes(ordered, main)
    for heading, sentences in analysis(ordered, main):
        if sentences:
            lines += [f"### {heading}", "", *(f"- {sentence}" for sentence in sentences), ""]
    if not has_reference:
        lines += ["The reference was not timed, so there are no speedups.", ""]
    lines += comparison_factors.section(ordered, results)
    lines += _workspace(ordered, results)
    return "\n".join(markdown.wrapped(lines)).rstrip() + "\n"


def _title(results: Results) -> str:
    if is_few(results):
        return " vs ".join(results)
    return f"{len(results)} solutions compared"


def plot_speedups(
    workloads: Sequence[WorkloadRow],
    results: Results,
    path: str | os.PathLike[str],
    title: str = "",
) -> bool:
    """Plots each solution's speedup over the reference against the tokens (log-log) into a PNG.

    Args:
        workloads: the workloads to show.
        results: solution name -> uuid -> measurement; rows without a speedup are left out.
        path: the file to write, atomically.
        title: of the plot.

    Returns:
        Whether there is a plot: points at fewer than two token counts make none.
    """
    curves = {}
    for name in results:
        points = [
            (work.num_tokens, value)
            for work in sorted(workloads, key=lambda work: work.num_tokens)
            if (value := speedup(passed(results, name, work.uuid))) is not None
        ]
        if points:
            curves[name] = points
    if len({tokens for points in curves.values() for tokens, _ in points}) < 2:
        return False
    _draw(curves, Path(path), title)
    return True


@plot_style.defaults()
def _draw(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str) -> None:
    figure = plot_style.figure(11, 5.2)
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="tokens T", ylabel="speedup over the reference")
    axes.set_title(title, fontsize=10)
    for name, points in curves.items():
        axes.plot(*plot_style.curve(points), **plot_style.style(name))
    for axis in (axes.xaxis, axes.yaxis):
        plot_style.log_axis(axis)
    axes.grid(True, which="major", alpha=0.35)
    axes.grid(True, which="minor", alpha=0.12)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=9, loc="outside right upper")
    with write_atomically(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130)


def write(
    directory: str | os.PathLike[str],
    workloads: Sequence[WorkloadRow],
    results: Results,
    *,
    header: Mapping[str, str],
    command: str,
    designs: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    warnings: Sequence[str] = (),
    title: str = "",
    name: str = "comparison_report",
) -> list[Path]:
    """Writes `NAME.md` and, if there is something to plot, `NAME.png` into `directory`.

    Args:
        directory: made if missing.
        workloads: as for `render`.
        results: as for `render`.
        header: as for `render`.
        command: as for `render`.
        designs: as for `render`.
        warnings: as for `render`.
        title: of the plot.
        name: of the files.

    Returns:
        The files, the markdown document first.

    Raises:
        PlotError: The plot alone cannot be written: the disk is full, say.
        OSError: Nor can the document.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    document, plot = folder / f"{name}.md", folder / f"{name}.png"
    main, _ = comparison_factors.split(results)
    failure: OSError | None = None
    try:
        is_plotted = plot_speedups(workloads, main, plot, title)
    except OSError as error:  # the text is much smaller
        is_plotted, failure = False, error
    text = render(
        workloads,
        results,
        header=header,
        command=command,
        designs=designs,
        warnings=warnings,
        plot=plot.name if is_plotted else None,
    )
    with write_atomically(document) as file:
        file.write(text)
    if is_plotted:
        return [document, plot]
    plot.unlink(missing_ok=True)  # an earlier report's
    if failure:
        raise PlotError(failure.errno, failure.strerror or str(failure), str(plot))
    return [document]
