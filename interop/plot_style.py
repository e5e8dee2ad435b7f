"""How solutions look in every plot: one colour and symbol each, plain numbers on log axes."""

import contextlib
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

REFERENCE_COLOUR = "#777777"
_CROWDED = 1.08  # token counts closer than this stand for other routings, not for a trend

# Families share a hue: ours blue to green, sglang's purple, DeepGEMM's amber. The main ones are of
# Okabe and Ito's palette, told apart with any colour vision; symbols repeat the distinction.
STYLES = {
    "torch_reference": (REFERENCE_COLOUR, "X"),
    "jax_moe": ("#003F73", "o"),
    "jax_moe_mosaic": ("#0072B2", "o"),
    "jax_moe_triton": ("#D55E00", "s"),
    "jax_moe_xla": ("#009E73", "^"),
    "jax_moe_mosaic_high": ("#2A5C8A", "8"),
    "jax_moe_triton_high": ("#8A3F00", "p"),
    "jax_moe_xla_high": ("#00664A", "H"),
    "mosaic_interpreted": ("#80B9D9", "o"),
    "jax_ragged_dot": ("#5B4BBF", "*"),
    "jax_v1": ("#56B4E9", "<"),
    "jax_v2": ("#1B9E9E", ">"),
    "sglang_v1": ("#CC79A7", "v"),
    "sglang_v1_native_quant": ("#E3B5CF", "1"),
    "sglang_v1_zero_copy_swiglu": ("#A8559A", "2"),
    "sglang_v1_small_workspace": ("#F0529C", "3"),
    "sglang_v2": ("#7B2D62", "P"),
    "deepgemm": ("#C9B037", "h"),
    "deepgemm64": ("#E69F00", "D"),
    "deepgemm128": ("#8C6D00", "d"),
    "deepgemm_mega": ("#F2C14E", "4"),
    "flashinfer_cutlass": ("#4D4D4D", "+"),
}
_OTHERS = ("#A6761D", "#666600", "#B22222", "#2F4F4F", "#8A2BE2", "#708090")


def style(name: str) -> dict[str, Any]:
    """The line style of a solution, for `Axes.plot`; the same in every plot of every run."""
    colour, marker = STYLES.get(name) or (_OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)], "p")
    ours = name.startswith("jax_moe")
    return {
        "label": name,
        "color": colour,
        "marker": marker,
        "markersize": 5,
        "linewidth": 2 if ours else 1,
        "linestyle": "-" if ours else ":",
    }


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    """Within the block matplotlib draws as it does without a user's `matplotlibrc`.

    That may ask for LaTeX, which is not everywhere. A figure is made and saved in one block.
    """
    with _without_backend():
        from matplotlib import style as styles
    with styles.context("default"):
        yield


@contextlib.contextmanager
def _without_backend() -> Iterator[None]:
    asked = os.environ.pop("MPLBACKEND", None)  # a notebook's, say, whose package is not here
    try:
        yield
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked


def figure(width: float, height: float) -> Any:
    """An empty figure that can be saved as a PNG without a display."""
    with _without_backend():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def curve(
    points: Sequence[tuple[float, float]], at: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """Coordinates of a line through points, without a line where token counts are crowded.

    Args:
        points: Token count and value, by token count.
        at: Where the points stand on the axis; their token counts by default.

    Returns:
        The two lists for `Axes.plot`, with NaN between points that no line should join.
    """
    xs: list[float] = []
    ys: list[float] = []
    before = None
    for place, (tokens, value) in zip(at or [p[0] for p in points], points, strict=True):
        if before is not None and tokens < before * _CROWDED:
            xs.append(float("nan"))
            ys.append(float("nan"))
        xs.append(place)
        ys.append(value)
        before = tokens
    return xs, ys


def log_axis(axis: Any) -> None:
    """Plain numbers at the major ticks, and only there, of a logarithmic axis that has its data."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    span = high / low
    steps = (1, 1.5, *range(2, 10)) if span < 5 else (1, 2, 5) if span < 100 else (1,)
    axis.set_major_locator(ticker.LogLocator(10, steps))
    axis.set_minor_locator(
        ticker.LogLocator(10, range(2, 10)) if span >= 100 else ticker.NullLocator()
    )
    axis.set_major_formatter(plain_number)
    axis.set_minor_formatter(ticker.NullFormatter())


def plain_number(value: float, _: int = 0) -> str:
    """A tick's label: 0.1, 1, 1.5, 10,000."""
    return f"{value:,.10g}" if value >= 1 else f"{value:g}"
