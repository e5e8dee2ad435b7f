"""Time against tokens with the roofline, and how much of the roofline each solution reaches."""

from pathlib import Path
from typing import Any

from bench.results import REFERENCE, Results, Row
from jax_moe.io.files import write_atomically

# Okabe and Ito's palette, told apart with any colour vision; the markers repeat the distinction.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")


def write(results: Results, path: Path) -> None:
    """Draws a PNG: median time against T, log-log, and below the fraction of the roofline by row.

    Args:
        results: Rows with times; the others are left out. Without a roofline there is one panel.
        path: The file to write, atomically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if results.roofline else 1
    figure = Figure(figsize=(11, 5.2 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    axes[0].set_title(_title(results), fontsize=10)
    _draw_times(axes[0], results)
    if panels == 2:
        _draw_fractions(axes[1], results)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="outside right upper")
    with write_atomically(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130)


def _title(results: Results) -> str:
    device, settings = results.about["device"]["kind"], results.about["settings"]
    sizes = settings["sizes"]
    return (
        f"{device}, H={sizes['hidden_size']} I={sizes['intermediate_size']} "
        f"E_local={sizes['num_local_experts']}, {settings['inputs']} inputs, median"
    )


def _style(results: Results, name: str) -> dict[str, Any]:
    place = results.solutions().index(name)
    ours = name.startswith("jax_moe")
    return {
        "label": name,
        "color": "#777777" if name == REFERENCE else _COLOURS[place % len(_COLOURS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 2 if ours else 1,
        "linestyle": "-" if ours else ":",
    }


def _draw_times(axes: Any, results: Results) -> None:
    rows = [row for _, group in results.workloads() for row in group]
    for name in results.solutions():
        points = [
            (row.num_tokens, times.median)
            for row in rows
            if row.solution == name and (times := row.time(results.timer))
        ]
        if points:
            axes.plot(*zip(*points, strict=True), **_style(results, name))
    floors = {row.num_tokens: results.figures(row).floor_us for row in rows}
    points = [(tokens, floor) for tokens, floor in floors.items() if floor]
    if points:
        axes.plot(*zip(*points, strict=True), "k--", linewidth=1.2, label="floor (roofline)")
    clock = "GPU time, cold L2" if results.timer == "gpu" else "wall time"
    axes.set(xscale="log", yscale="log", xlabel="tokens T", ylabel=f"{clock} (us)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_plain_number)
    axes.grid(True, which="major", alpha=0.35)
    axes.grid(True, which="minor", alpha=0.12)


def _draw_fractions(axes: Any, results: Results) -> None:
    """One place a workload: neighbouring token counts with other routings do not overlap."""
    groups = [rows for _, rows in results.workloads()]
    for name in results.solutions():
        points = [
            (place, found)
            for place, rows in enumerate(groups)
            for row in rows
            if row.solution == name and (found := _fraction(results, row)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), **_style(results, name))
    labels = [f"{rows[0].num_tokens:,}" for rows in groups]
    axes.set_xticks(range(len(groups)), labels, rotation=45)
    axes.set(xlabel="tokens T", ylabel="fraction of the roofline", ylim=(0, 1.05))
    axes.axhline(1, color="k", linestyle="--", linewidth=1.2)
    axes.grid(True, alpha=0.3)


def _fraction(results: Results, row: Row) -> float | None:
    return results.figures(row).roofline_fraction


def _plain_number(value: float, _: int) -> str:
    return f"{value:,.0f}"
