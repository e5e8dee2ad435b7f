"""Time against tokens with both floors, and how much of the unpromoted one each reaches."""

from pathlib import Path
from typing import Any

from bench import environment, header
from bench.results import Results, Row
from interop import plot_style
from interop.plot_style import plain_number as _plain_number
from jax_moe import models
from jax_moe.io.files import write_atomically


def is_worthwhile(results: Results) -> bool:
    """Whether there are times at two token counts or more: a point alone is no curve."""
    return len({row.num_tokens for row in results.rows.values() if row.time(results.timer)}) > 1


@plot_style.defaults()
def write(results: Results, path: Path) -> None:
    """Draws a PNG: median time against T, log-log, and the unpromoted floor's share of it by row.

    Args:
        results: Rows with times; the others are left out. Without a roofline there is one panel.
        path: The file to write, atomically.
    """
    panels = 2 if results.roofline else 1
    figure = plot_style.figure(11, 5.2 * panels)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    axes[0].set_title(_title(results), fontsize=10)
    _draw_times(axes[0], results)
    if panels == 2:
        _draw_fractions(axes[1], results)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="outside right upper")
    with write_atomically(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130)


def _title(results: Results) -> str:
    clock = "GPU time, cold L2" if results.timer == "gpu" else "wall time"
    return f"{results.about['device']['kind']}, {clock}, median\n{conditions(results)}"


def conditions(results: Results) -> str:
    """Model, sizes, inputs and routing, for the title of a plot, and whether rows are missing."""
    settings = results.about["settings"]
    model = settings.get("model", models.DEEPSEEK_V3.name)
    model = "" if model == models.DEEPSEEK_V3.name else f"{model} "
    sizes = environment.sizes_text(settings["sizes"], is_reduced=not settings["on_gpu"])
    stand_ins = "'s stand-ins" if results.about.get("stand_ins") else ""
    routing = f"routing of the data set{stand_ins}"
    if settings["inputs"] != "dataset":
        patterns = {"moments": "the captured moments"}
        routing = f"routing by {patterns.get(settings['routing'], settings['routing'])}"
    said = f"{model}{sizes}, {settings['inputs']} inputs, {routing}"
    precision, is_invariant = settings.get("precision", "fast"), settings.get("batch_invariant")
    if options := header.options_text(precision, is_invariant=bool(is_invariant)):
        said += f"\njax_moe: {options}"
    return said if header.is_complete(results) else f"{said}\nIncomplete: {header.count(results)}"


def _draw_times(axes: Any, results: Results) -> None:
    rows = [row for _, group in results.workloads() for row in group]
    axes.set(xscale="log", yscale="log")
    for name in results.solutions():
        points = [
            (row.num_tokens, times.median)
            for row in rows
            if row.solution == name and (times := row.time(results.timer))
        ]
        if points:
            axes.plot(*plot_style.curve(points), **plot_style.style(name))
    floors = {row.num_tokens: row.work.floors(results.roofline) for row in rows}
    for place, (name, line) in enumerate((("unpromoted floor", "k--"), ("promoted floor", "k:"))):
        points = [(tokens, us) for tokens, both in floors.items() if (us := both[place])]
        if points:
            axes.plot(*plot_style.curve(points), line, marker="_", label=name)
    axes.set(xlabel="tokens T", ylabel=f"{results.timer.replace('gpu', 'GPU')} time (us)")
    for axis in (axes.xaxis, axes.yaxis):
        plot_style.log_axis(axis)
    axes.grid(True, which="major", alpha=0.35)
    axes.grid(True, which="minor", alpha=0.12)


def _draw_fractions(axes: Any, results: Results) -> None:
    """One place per workload: neighbouring token counts with other routings do not overlap."""
    groups = [rows for _, rows in results.workloads()]
    for name in results.solutions():
        found = {
            place: (row.num_tokens, fraction)
            for place, rows in enumerate(groups)
            for row in rows
            if row.solution == name and (fraction := _fraction(results, row)) is not None
        }
        if found:
            line = plot_style.curve(list(found.values()), list(found))
            axes.plot(*line, **plot_style.style(name))
    labels = [_plain_number(rows[0].num_tokens) for rows in groups]
    axes.set_xticks(range(len(groups)), labels, rotation=45)
    highest = max([1.0, *(value for line in axes.lines for value in line.get_ydata())])
    axes.set(xlabel="tokens T", ylabel="unpromoted floor / time", ylim=(0, 1.05 * highest))
    axes.axhline(1, color="k", linestyle="--", linewidth=1.2)
    axes.grid(True, alpha=0.3)


def _fraction(results: Results, row: Row) -> float | None:
    return results.figures(row).unpromoted_fraction
