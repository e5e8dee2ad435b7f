"""What was measured of the layer over several ranks: rows, their table, their file, their plot."""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import environment, tables, typed
from bench.about import check_parallel
from bench.failures import writing
from bench.results import plain
from interop import plot_style
from jax_moe.io.files import naming, shown, write_atomically
from jax_moe.io.strict_json import parse_object
from jax_moe.parallel import exchange

# Of ranks on one axis: two_level needs an axis of hosts beside it.
EXCHANGES = tuple(name for name in exchange.NAMES if name != "two_level")
HEADER = (
    "exchange", "routing", "ranks", "T", "pieces", "layer us", "local us", "between us", "ratio",
    "efficiency", "busiest", "error",
)  # fmt: skip


class Row(NamedTuple):
    """One measurement.

    Attributes:
        ranks: N.
        tokens: T of each rank.
        exchange: Its name, or "none" for local work alone.
        routing: One of `bench.parallel_inputs.ROUTINGS`.
        pieces: Into which the tokens were divided.
        layer_us: Median of a call.
        local_us: Median of the slowest rank's local work on the same tokens.
        busiest: Pairs of the busiest rank over the mean.
        error: Against the sum of the ranks' local work, relative, in the Frobenius norm.
        problem: Why there is nothing else.
    """

    ranks: int
    tokens: int
    exchange: str
    routing: str = "even"
    pieces: int = 1
    layer_us: float | None = None
    local_us: float | None = None
    busiest: float | None = None
    error: float | None = None
    problem: str = ""

    @property
    def efficiency(self) -> float | None:
        """Local work over layer."""
        if self.layer_us is None or self.local_us is None:
            return None
        return self.local_us / self.layer_us

    @property
    def name(self) -> str:
        """Of its curve."""
        return self.exchange if self.pieces == 1 else f"{self.exchange}, {self.pieces} pieces"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A line per row under `HEADER`: efficiency is local work over layer."""
    return [list(HEADER), *map(_line, rows)]


def _line(row: Row) -> list[str]:
    between = None
    if row.layer_us is not None and row.local_us is not None:
        between = row.layer_us - row.local_us
    efficiency = row.efficiency
    numbers = (
        (row.layer_us, ".1f"),
        (row.local_us, ".1f"),
        (between, ".1f"),
        (None if efficiency is None else 1 / efficiency, ".3f"),
        (efficiency, ".3f"),
        (row.busiest, ".2f"),
        (row.error, ".5f"),
    )
    return [
        *(row.exchange, row.routing, str(row.ranks), str(row.tokens), str(row.pieces)),
        *("-" if value is None else format(value, digits) for value, digits in numbers),
    ]


def problems(rows: Sequence[Row]) -> list[str]:
    """A line per row that has one."""
    return [
        f"{row.name} T={row.tokens} {row.routing}: {row.problem}" for row in rows if row.problem
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as text, then their problems."""
    return [*tables.aligned(cells(rows), left=2), *problems(rows)]


def write(rows: Sequence[Row], about: Mapping[str, Any], path: Path) -> None:
    """Rows with where they come from. A plot of earlier rows beside them goes."""
    content = {"about": dict(about), "rows": plain(rows)}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").unlink(missing_ok=True)  # first: it is never beside other rows
        with write_atomically(path, "w") as file:
            json.dump(content, file, indent=1)


def read(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """What `write` wrote; errors as for `read_as`."""
    return read_as(row_of, path)


def row_of(fields: Any) -> Row:
    """A row of its fields.

    Raises:
        ValueError: One is missing, unknown or cannot be; names it.
    """
    row: Row = typed.record(Row, fields)
    for name in ("ranks", "layer_us", "local_us"):
        if getattr(row, name) == 0:
            raise ValueError(f"Row.{name}: expected more than 0, got 0")
    return row


def ranks_of(about: Mapping[str, Any]) -> int | None:
    """How many ranks the sizes of a run are of; None where it does not say, or has several."""
    sizes = about.get("sizes", {})  # older records have none
    local = sizes.get("num_local_experts")
    return sizes["num_experts"] // local if isinstance(local, int) else None


def read_as(row_of: Callable[[Any], Any], path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The rows of a file, and where they come from.

    Args:
        row_of: Makes a row of its fields.
        path: Of a JSON file with `rows` and `about`.

    Raises:
        ValueError: It cannot be read or is damaged; names it.
    """
    with naming(path):
        content = parse_object(path.read_bytes(), shown(path))
    try:
        rows = typed.checked_list(content["rows"], "rows")
        about = check_parallel(content["about"])
        return [row_of(row) for row in rows], about
    except (KeyError, ValueError) as error:
        raise ValueError(f"{shown(path)}: damaged: {typed.reason(error)}") from None


def plot(rows: Sequence[Row], about: Mapping[str, Any], path: Path) -> bool:
    """Efficiency against T: a panel per routing, a curve per exchange and number of pieces.

    Args:
        rows: Those without times are left out.
        about: Where they come from.
        path: Of the PNG.

    Returns:
        Whether it is there: there was something to draw, and matplotlib; a line says if not.
    """
    timed = [row for row in rows if row.efficiency is not None]
    if len(timed) < 2:  # a single point is no plot
        return False
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{shown(path)}: not written: needs matplotlib (pip install matplotlib)")
        return False
    with plot_style.defaults(), write_atomically(path, "wb") as picture:
        drawn(timed, about).savefig(picture, format="png", dpi=130)
    return True


def drawn(timed: Sequence[Row], about: Mapping[str, Any]) -> Any:
    """The figure of rows that all have times."""
    names = list(dict.fromkeys(row.name for row in timed))
    routings = sorted({row.routing for row in timed}, key=lambda name: (name != "even", name))
    tokens = sorted({row.tokens for row in timed})
    figure = plot_style.figure(8, 1 + 4 * len(routings))
    panels = figure.subplots(len(routings), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, routing in zip(panels, routings, strict=True):
        for place, name in enumerate(names):
            points = sorted(
                (row.tokens, row.efficiency or 0.0)
                for row in timed
                if (row.name, row.routing) == (name, routing)
            )
            if points:
                colour = f"C{place}"
                axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [plot_style.plain_number(count) for count in tokens])
        axes.set_xticks([], minor=True)
        if len(tokens) == 1:  # in the middle, wherever between two powers of 2 it lies
            axes.set_xlim(tokens[0] / 2, tokens[0] * 2)
        axes.set(ylabel="the slowest rank's local work / layer", title=f"{routing} routing")
        axes.grid(True, alpha=0.3)
        axes.legend()
    panels[-1].set_xlabel("tokens of each rank")
    # Noise, or an exchange that overlaps, may make the whole faster than its part.
    panels[0].set_ylim(0, 1.05 * max(1.0, *(row.efficiency or 0.0 for row in timed)))
    figure.suptitle(_title(timed[0].ranks, about))
    return figure


def _title(ranks: int, about: Mapping[str, Any]) -> str:
    lines = [f"{ranks} x {about.get('device', {}).get('kind', 'unknown devices')}"]
    if sizes := about.get("sizes"):  # older records have none
        is_reduced = about["reduced"]
        lines.append(environment.sizes_text(sizes, is_reduced=is_reduced))
        lines[-1] += ": times mean nothing" if is_reduced else ""
    if about.get("complete") is False:
        lines.append("Incomplete: not every step has ended well")
    return "\n".join(lines)
