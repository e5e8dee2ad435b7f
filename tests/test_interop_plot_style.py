"""One palette for all plots, and axes that can be read."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import matplotlib
import pytest

from bench import plots
from bench.results import Results
from bench.roofline import Roofline
from bench.solutions import registry
from interop import comparison_report, plot_style
from interop.plot_style import plain_number
from tests.bench_rows import row


def test_each_solution_has_a_colour_and_a_symbol_of_its_own():
    assert set(registry()) <= set(plot_style.STYLES)
    for kind in zip(*plot_style.STYLES.values(), strict=True):
        repeated = {one for one in kind if list(kind).count(one) > 1}
        assert repeated <= {"o"}, "jax_moe is the symbol of all its names"
    found = plot_style.style("deepgemm64")
    assert (found["label"], found["color"], found["marker"]) == ("deepgemm64", "#E69F00", "D")
    assert plot_style.style("somebody's own") == plot_style.style("somebody's own")
    assert plot_style.style("jax_moe_mosaic")["linestyle"] == "-"


def test_ticks_are_plain_numbers():
    shown = [plain_number(value, 0) for value in (0.01, 0.1, 1, 1.5, 10, 20_000)]
    assert shown == ["0.01", "0.1", "1", "1.5", "10", "20,000"]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([400, 900], ["400", "500", "600", "700", "800", "900"]),
        ([6.6, 18.8], ["7", "8", "9", "10", "15"]),
        ([3, 70], ["5", "10", "20", "50"]),
        ([0.05, 30], ["0.1", "1", "10"]),
        ([1, 16_384], ["1", "10", "100", "1,000", "10,000"]),
    ],
)
def test_only_major_ticks_have_labels(values, labels):
    figure = plot_style.figure(6, 4)
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log")
    axes.plot(values, values)
    plot_style.log_axis(axes.xaxis)
    figure.canvas.draw()
    low, high = axes.get_xlim()
    inside = [tick for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert [tick.label1.get_text() for tick in inside] == labels
    assert {tick.label1.get_text() for tick in axes.xaxis.get_minor_ticks()} <= {""}


def test_no_line_joins_crowded_token_counts():
    points = [(32, 1.0), (52, 2.0), (53, 9.0), (62, 3.0), (80, 4.0)]
    xs, ys = plot_style.curve(points)
    assert [x for x in xs if not math.isnan(x)] == [tokens for tokens, _ in points]
    gaps = [i for i, y in enumerate(ys) if math.isnan(y)]
    assert gaps == [2]
    assert (xs[1], xs[3]) == (52, 53)
    places, _ = plot_style.curve(points, at=range(5))
    assert [x for x in places if not math.isnan(x)] == [0, 1, 2, 3, 4]


def test_a_share_above_one_is_within_the_axis(tmp_path):
    one = row("jax_moe", 7, 125)
    found = Results(tmp_path / "results.json", {}, "gpu", roofline=Roofline(5e11, 1e15, "made up"))
    found.rows[one.solution, one.uuid] = one
    axes = plot_style.figure(6, 4).subplots()
    plots._draw_fractions(axes, found)
    (share,) = axes.lines[0].get_ydata()
    assert 1.05 < share < axes.get_ylim()[1]


@pytest.mark.parametrize("backend", ["nonsense", "module://matplotlib_inline.backend_inline"])
def test_a_plot_is_drawn_whatever_backend_the_environment_names(backend):
    """A notebook's is in the environment of what it starts, which may lack the package."""
    program = "import os; from interop import plot_style; plot_style.figure(1, 1); "
    program += "print(os.environ['MPLBACKEND'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"MPLBACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{backend}\n"), done.stderr


@pytest.mark.parametrize("setting", [{"text.usetex": True}, {"savefig.facecolor": "black"}])
def test_a_plot_does_not_depend_on_a_users_matplotlibrc(tmp_path, setting):
    """LaTeX is not everywhere."""
    ours, users = tmp_path / "ours.png", tmp_path / "users.png"
    curves = {"jax_moe": [(1, 2.0), (16, 3.0)]}
    comparison_report._draw(curves, ours, "a title")
    with matplotlib.rc_context(setting):
        comparison_report._draw(curves, users, "a title")
        assert matplotlib.rcParams["text.usetex"] == ("text.usetex" in setting)
    assert users.read_bytes() == ours.read_bytes()
