"""Time against tokens, with the roofline, as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import Results, Row
from interop.files import write_atomically

# Okabe and Ito's palette, told apart with any colour vision; shapes repeat the distinction.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def write_times(results: Results, path: Path, *, fraction: bool) -> None:
    """Plots each solution's median time against T, and the floor.

    Args:
        results: Rows with times; the others are left out.
        path: The PNG to write, atomically.
        fraction: Whether a second panel shows the fraction of the roofline.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if fraction and results.roofline else 1
    figure = Figure(figsize=(11, 5.6 if panels == 1 else 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    _draw(axes[0], results, _times(results), f"{_clock(results)} (us)")
    _draw_floor(axes[0], results)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter(_plain_number)
    axes[0].set_title(_title(results), fontsize=10)
    if panels == 2:
        _draw(axes[1], results, _fractions(results), "fraction of the roofline")
        axes[1].set_ylim(0, 1.05)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="outside right upper")
    with write_atomically(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130)


def _clock(results: Results) -> str:
    return "GPU time, cold L2" if results.timer == "gpu" else "wall time"


def _title(results: Results) -> str:
    device = results.about["device"]["kind"]
    sizes = results.about["settings"]["sizes"]
    return (
        f"{device}, H={sizes['hidden_size']} I={sizes['intermediate_size']} "
        f"E_local={sizes['num_local_experts']}, {results.about['settings']['inputs']} inputs, "
        "median"
    )


Lines = dict[str, list[tuple[int, float]]]


def _ordered(results: Results) -> Sequence[Row]:
    return [row for _, rows in results.workloads() for row in rows]


def _times(results: Results) -> Lines:
    lines: Lines = {name: [] for name in results.solutions()}
    for row in _ordered(results):
        if times := row.time(results.timer):
            lines[row.solution].append((row.num_tokens, times.median))
    return lines


def _fractions(results: Results) -> Lines:
    lines: Lines = {name: [] for name in results.solutions()}
    for row in _ordered(results):
        found = results.figures(row).roofline_fraction
        if found is not None:
            lines[row.solution].append((row.num_tokens, found))
    return lines


def _draw(axes: Any, results: Results, lines: Lines, label: str) -> None:
    for place, (name, points) in enumerate(lines.items()):
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=name,
                color=_COLOURS[place % len(_COLOURS)],
                marker=_MARKERS[place % len(_MARKERS)],
                markersize=4.5,
                linewidth=1.4,
            )
    axes.set(xscale="log", xlabel="tokens T", ylabel=label)
    axes.xaxis.set_major_formatter(_plain_number)
    axes.grid(True, which="major", alpha=0.35)
    axes.grid(True, which="minor", alpha=0.12)


def _plain_number(value: float, _: int) -> str:
    return f"{value:,.0f}"


def _draw_floor(axes: Any, results: Results) -> None:
    floors = {row.num_tokens: results.figures(row).floor_us for row in _ordered(results)}
    points = [(tokens, floor) for tokens, floor in floors.items() if floor]
    if points:
        axes.plot(
            *zip(*points, strict=True), "k--", linewidth=1.2, label="floor (measured roofline)"
        )
