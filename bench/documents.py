"""Everything a run says and writes: terminal text, markdown, plots, the comparison report."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import breakdown, comparison, header, plots, report
from bench.failures import FileError, unwritten, writing
from bench.results import PASS, Results, Row
from bench.run_folder import REPORT
from bench.settings import Settings
from bench.tables import aligned, markdown, without_empty
from bench.workloads import WORKLOADS
from interop.comparison_report import PlotError
from interop.markdown import wrapped
from jax_moe.io.files import write_atomically

_TERMINAL_BREAKDOWNS = 20


class Options(NamedTuple):
    """What to write besides the results.

    Attributes:
        report: The published comparison's document, from this run.
        breakdown: The time of every kernel.
    """

    report: bool = False
    breakdown: bool = False


def introduction(
    results: Results, settings: Settings, num_workloads: int, names: Sequence[str]
) -> str:
    """What is about to be measured, on what, and what is left out."""
    lines = [f"{label}: {text}" for label, text in header.lines(results, settings)]
    lines.append(f"{num_workloads} workloads x {len(names)} solutions: {', '.join(names)}")
    lines += [f"skipped: {name}: {why}" for name, why in results.unavailable.items()]
    if not settings.on_gpu:
        lines.append(header.reduced(settings))
    return "\n".join(lines) + "\n"


def conclusion(results: Results, settings: Settings, options: Options) -> str:
    """The tables and verdicts for the terminal."""
    if not results.rows:
        return "no rows were finished"
    parts = [report.terminal_table(results)]
    if compared := report.comparison(results):
        parts += ["", *aligned(compared, left=0)]
    against = report.against_peers(results)
    parts += ["", *aligned(against, left=0)] if len(against) > 1 else []
    if options.breakdown:
        parts += ["", *_breakdown(results, settings, in_markdown=False)]
    return "\n".join([*parts, "", *verdict(results)])


def verdict(results: Results) -> list[str]:
    """How many rows are right, which are not, and what is missing."""
    passed = sum(row.status == PASS for row in results.rows.values())
    asked = max(len(results.rows), results.about.get("asked", {}).get("rows", 0))
    parts = [f"{passed} of {asked} rows PASS", *report.failure_lines(results)]
    if not header.is_complete(results):
        said = header.count(results)
        lacking = sum(not row.is_finished(results.timer) for row in results.rows.values())
        if lacking:
            said += f", {lacking} more by host time alone"
        if results.rows_on_disk < len(results.rows):
            said += f", {results.path.name} holds {results.rows_on_disk}"
        parts.append(f"Incomplete: {said}: {header.stopped(results)}")
    return parts


def _breakdown(results: Results, settings: Settings, *, in_markdown: bool) -> list[str]:
    lines = []
    rows, top_k = breakdown.rows_to_show(results), settings.measured.top_k
    if not in_markdown and len(rows) > _TERMINAL_BREAKDOWNS:
        return [f"The breakdown of {len(rows)} rows is in {_breakdown_name(settings)}."]
    for row in rows:
        table = breakdown.table(row, settings.sizes, results.roofline, top_k)
        cells = without_empty([breakdown.HEADER, *table])
        title = f"{row.solution}, T={row.num_tokens}{_clock_text(row)}"
        lines += [f"### {title}" if in_markdown else title, ""]
        lines += [*(markdown(cells, left=2) if in_markdown else aligned(cells, left=2)), ""]
    return lines or ["No kernel times were taken: a breakdown needs --timer=gpu."]


def _clock_text(row: Row) -> str:
    if row.clock is None:
        return ""
    states = {True: ", power cap active", False: ", power cap not active", None: ""}
    return f": SM clock {row.clock.sm_mhz:.0f} MHz{states[row.clock.power_capped]}"


def write_all(results: Results, settings: Settings, options: Options) -> Iterator[Path]:
    """Writes the documents of a run into its folder.

    Yields:
        Each file once it is there.

    Raises:
        FileError: Some cannot be written; names them. All others are there.
    """
    failed: list[str] = []

    def is_written(path: Path, write: Callable[[], object]) -> bool:
        try:
            with writing(path):
                write()
        except FileError as error:
            failed.append(str(error))
            return False
        return True

    folder, stem = results.path.parent, settings.stem
    plot = folder / f"{stem}.png" if plots.is_worthwhile(results) else None
    if plot:
        if is_written(plot, functools.partial(plots.write, results, plot)):
            yield plot
        else:
            plot = None
    document = folder / f"{stem}.md"
    lines = _document(results, settings, plot.name if plot else None)
    if is_written(document, lambda: _write(document, lines)):
        yield document
    if options.breakdown:
        path = folder / _breakdown_name(settings)
        title = f"# GPU time by kernel on {results.about['device']['kind']}"
        warnings = header.markdown_warnings(results, settings)
        parts = [title, "", *warnings, *_breakdown(results, settings, in_markdown=True)]
        if is_written(path, lambda: _write(path, parts)):
            yield path
    if options.report:
        path = folder / f"{REPORT}.md"
        made: list[Path] = []

        def write_report() -> None:
            try:
                made.extend(comparison.write(results, settings, REPORT))
            except PlotError as error:
                made.append(path)
                failed.append(unwritten(Path(error.filename), error))

        is_written(path, write_report)
        yield from made
    if failed:
        raise FileError("; ".join(failed))


def _write(path: Path, lines: Sequence[str]) -> None:
    with write_atomically(path) as file:
        file.write("\n".join(wrapped(lines)).rstrip() + "\n")


def _breakdown_name(settings: Settings) -> str:
    return f"{settings.stem}_breakdown.md"


def _title(results: Results, settings: Settings) -> str:
    if settings.scaling:
        return "Scaling"
    count = len(results.workloads())
    if settings.inputs == "dataset":
        return f"{count} workloads of a data set"
    whole = len(WORKLOADS)
    return f"The {whole} workloads" if count == whole else f"{count} of the {whole} workloads"


def _document(results: Results, settings: Settings, plot: str | None) -> list[str]:
    title = _title(results, settings)
    lines = [f"# {title} on {results.about['device']['kind']}", ""]
    lines += header.markdown_warnings(results, settings)
    lines += [f"- {label}: {text}" for label, text in header.lines(results, settings)]
    for when in ("before", "after"):
        if state := results.about.get(f"gpu_state_{when}"):
            lines.append(f"- GPU {when}: {', '.join(f'{k} {v}' for k, v in state.items())}")
    lines += [f"- Not measured: {name}: {why}" for name, why in results.unavailable.items()]
    lines += ["", "```bash", results.script(), "```", ""]
    lines += [f"![Time against tokens]({plot})", ""] if plot else []
    clock = "GPU" if results.timer == "gpu" else "wall"
    if compared := report.comparison(results):
        lines += [f"## Median {clock} time", "", *markdown(compared, left=0), ""]
    against = report.against_peers(results)
    if len(against) > 1:
        lines += ["## Against the fastest other solution", "", *markdown(against, left=0), ""]
    if failures := report.failure_lines(results):
        lines += ["## Failures", "", "```", *failures, "```", ""]
    lines += ["## Every row", "", *_all_rows(results)]
    lines += ["## How each solution was launched", "", *_launches(results), ""]
    return lines


def _all_rows(results: Results) -> list[str]:
    lines = []
    for heading, cells in report.grouped(results):
        lines += [f"**{heading}**", "", *markdown(cells, left=2), ""]
    return lines


def _launches(results: Results) -> list[str]:
    lines = []
    for name in results.solutions():
        rows = [row for row in results.rows.values() if row.solution == name and row.how]
        hows = sorted({row.how for row in rows})
        counts = sorted({row.launches for row in rows if row.launches is not None})
        span = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else ""
        launches = f", host launches per call: {span}" if span else ""
        if hows:
            lines.append(f"- `{name}`: {'; '.join(hows)}{launches}")
    return lines
