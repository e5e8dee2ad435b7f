"""The table in the terminal and the markdown document, from the same rows."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.results import PASS, REFERENCE, Results, Row
from bench.sm_clock import Reading
from bench.tables import aligned

_DASH = "-"


class Column(NamedTuple):
    """A column of the row table.

    Attributes:
        title: Its head.
        show: How it shows a row.
        documents_only: In runs of these timers the terminal leaves it out, for want of room.
    """

    title: str
    show: Callable[[Results, Row], str]
    documents_only: tuple[str, ...] = ()


def _optional(pattern: str, value: float | None) -> str:
    return _DASH if value is None else pattern.format(value)


def _us(value: float | None) -> str:
    if value is None:
        return _DASH
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _rate(value: float | None) -> str:
    """Three digits: a rate may be 0.012 on a CPU and 1,126 on a GPU."""
    return _optional("{:,.0f}" if value and value >= 100 else "{:.3g}", value)


def _spread(kind: str, name: str) -> Callable[[Results, Row], str]:
    def show(_: Results, row: Row) -> str:
        times = row.time(kind)
        return _us(getattr(times, name) if times else None)

    return show


def _figure(name: str, pattern: str) -> Callable[[Results, Row], str]:
    return lambda results, row: _optional(pattern, getattr(results.figures(row), name))


def _checked(name: str, pattern: str) -> Callable[[Results, Row], str]:
    return lambda _, row: _optional(pattern, getattr(row.check, name) if row.check else None)


def _calls(results: Results, row: Row) -> str:
    times = row.time(results.timer)
    return str(times.n) if times else _DASH


def _clock(name: str) -> Callable[[Results, Row], str]:
    def show(_: Results, row: Row) -> str:
        reading = getattr(row, name)
        return _DASH if reading is None else clock_text(reading)

    return show


def clock_text(reading: Reading) -> str:
    """MHz, marked where the power cap held the clock down."""
    return f"{reading.sm_mhz:.0f}" + (" cap" if reading.power_capped else "")


def _megabytes(name: str) -> Callable[[Results, Row], str]:
    def show(_: Results, row: Row) -> str:
        found = getattr(row, name)
        return _optional("{:.1f}", None if found is None else found / 1e6)

    return show


COLUMNS = (
    Column("solution", lambda _, row: row.solution),
    Column("status", lambda _, row: row.status),
    Column("matched", _checked("matched_ratio", "{:.4f}")),
    Column("sum form", _checked("matched_ratio_sum", "{:.4f}"), ("gpu", "wall")),
    Column("rel.err", _checked("relative_error", "{:.4f}")),
    Column("GPU us", _spread("gpu", "median")),
    Column("p10", _spread("gpu", "p10"), ("wall",)),
    Column("p90", _spread("gpu", "p90"), ("wall",)),
    Column("SM MHz", _clock("clock")),
    Column("sust. us", lambda _, row: _us(row.sustained.us if row.sustained else None)),
    Column("at MHz", _clock("sustained")),
    Column("wall us", _spread("wall", "median")),
    Column("p10", _spread("wall", "p10"), ("gpu",)),
    Column("p90", _spread("wall", "p90"), ("gpu",)),
    Column("n", _calls),
    Column("TFLOP/s", lambda results, row: _rate(results.figures(row).tflops)),
    Column("TB/s", lambda results, row: _rate(results.figures(row).tb_per_s)),
    Column("unpromoted", _figure("unpromoted_fraction", "{:.1%}")),
    Column("promoted", _figure("promoted_fraction", "{:.1%}")),
    Column("temp MB", _megabytes("workspace_bytes")),
    Column("bound MB", _megabytes("workspace_bound")),
    Column("speedup", _figure("speedup", "{:.2f}x")),
)


def _shown_columns(results: Results) -> list[Column]:
    """All columns but those that no row of the run has anything in."""
    rows = list(results.rows.values())
    return [c for c in COLUMNS if not rows or any(c.show(results, row) != _DASH for row in rows)]


def _heading(results: Results, row: Row) -> str:
    floors = zip(("unpromoted", "promoted"), row.work.floors(results.roofline), strict=True)
    bound = "".join(f", {name} floor {_us(floor)} us" for name, floor in floors if floor)
    uuid = row.uuid.partition("-")[0]
    return (
        f"T={row.num_tokens} offset={row.local_expert_offset} {uuid}: {row.load.pairs} "
        f"local pairs on {row.load.active_experts} experts (at most {row.load.max_per_expert} on "
        f"one)"
        f"{bound}"
    )


def grouped(results: Results, *, brief: bool = False) -> list[tuple[str, list[list[str]]]]:
    """For each workload a heading and its rows with all columns, titles first.

    Args:
        results: What to show.
        brief: Without the columns that are for documents only.
    """
    columns = _shown_columns(results)
    if brief:
        columns = [one for one in columns if results.timer not in one.documents_only]
    titles = [column.title for column in columns]
    return [
        (
            _heading(results, rows[0]),
            [titles, *([c.show(results, row) for c in columns] for row in rows)],
        )
        for _, rows in results.workloads()
    ]


def terminal_table(results: Results) -> str:
    """Every row with its columns, grouped by workload, at most about 170 characters wide."""
    groups = grouped(results, brief=True)
    titles = groups[0][1][0]
    title, *lines = aligned([titles, *(line for _, (_, *rest) in groups for line in rest)], left=2)
    shown = [title]
    for heading, (_, *rest) in groups:
        shown += ["", heading, *(lines.pop(0) for _ in rest)]
    return "\n".join(shown)


def comparison(results: Results) -> list[list[str]]:
    """One line per workload, one column per solution: median times of the run's timer.

    Returns:
        The header, the workloads, and a last line with each solution's geometric mean of time over
        floor, or of time where there is no floor, over the workloads that all of them passed.
        Solutions that are checked but not timed have no column, workloads of theirs alone no line;
        nothing where none is timed.
        The floor of the means is the unpromoted one.
    """
    with_cells = {row.solution for row in results.rows.values() if not _is_untimed(results, row)}
    names = [name for name in results.solutions() if name in with_cells]
    if not names:
        return []
    header = ["T", "offset", "pairs", "experts", *_floor_titles(results)]
    lines = [header + [f"{name} us" for name in names]]
    for _, rows in results.workloads():
        by_name = {row.solution: row for row in rows if row.solution in names}
        if not by_name:
            continue
        first = rows[0]
        load = first.load
        cells = [first.num_tokens, first.local_expert_offset, load.pairs, load.active_experts]
        line = [str(cell) for cell in cells]
        line += _floor_cells(results, first)
        lines.append(line + [_time_cell(results, by_name.get(name)) for name in names])
    blank = [""] * (len(header) - 1)
    return [*lines, _geomeans(results, names, blank)]


def _floor_titles(results: Results) -> list[str]:
    """Of the floors that the run's probes give."""
    if results.roofline is None:
        return []
    promoted = ["promoted floor us"] if results.roofline.promoted_flops_per_s else []
    return ["unpromoted floor us", *promoted]


def _floor_cells(results: Results, row: Row) -> list[str]:
    return [_us(floor) for floor in row.work.floors(results.roofline) if floor is not None]


def _is_untimed(results: Results, row: Row) -> bool:
    return row.status == PASS and row.time(results.timer) is None


def _time_cell(results: Results, row: Row | None) -> str:
    if row is None:
        return _DASH
    times = row.time(results.timer)
    return row.status if row.status != PASS else _us(times.median if times else None)


def _geomeans(results: Results, names: Sequence[str], blank: list[str]) -> list[str]:
    timed = [
        {row.solution: row for row in rows if row.time(results.timer)}
        for _, rows in results.workloads()
    ]
    common = [rows for rows in timed if all(name in rows for name in names)]
    cells = [
        f"geomean of {len(common)}" + (" / unpromoted floor" if results.roofline else ""),
        *blank,
    ]
    for name in names:
        values = [_relative(results, rows[name]) for rows in common]
        mean = statistics.geometric_mean(values) if values else None
        cells.append(_optional("{:,.2f}", mean) if results.roofline else _us(mean))
    return cells


def _relative(results: Results, row: Row) -> float:
    times = row.time(results.timer)
    floor = results.figures(row).unpromoted_floor_us
    return (times.median if times else float("nan")) / (floor or 1.0)


def against_peers(results: Results) -> list[list[str]]:
    """Our fastest backend beside the fastest other solution, one line per workload.

    Returns:
        The header and the workloads that both passed; the header alone if there are none.
    """
    titles = _floor_titles(results)
    ratios = [f"/ {title.removesuffix(' us')}" for title in titles]
    less = [f"- {title}" for title in titles[:1]]
    lines = [["T", *titles, "ours", "us", *ratios, *less, "fastest other", "us", "other / ours"]]
    for _, rows in results.workloads():
        timed = {row.solution: times.median for row in rows if (times := row.time(results.timer))}
        ours = {name: us for name, us in timed.items() if name.startswith("jax_moe")}
        others = {name: us for name, us in timed.items() if name not in {*ours, REFERENCE}}
        if not ours or not others:
            continue
        best, peer = min(ours, key=lambda n: timed[n]), min(others, key=lambda n: timed[n])
        floors = [floor for floor in rows[0].work.floors(results.roofline) if floor]
        lines.append(
            [
                str(rows[0].num_tokens),
                *_floor_cells(results, rows[0]),
                best,
                _us(timed[best]),
                *(f"{timed[best] / floor:.2f}" for floor in floors),
                *(_us(timed[best] - floor) for floor in floors[:1]),
                peer,
                _us(timed[peer]),
                f"{timed[peer] / timed[best]:.2f}x",
            ]
        )
    return lines


def failure_lines(results: Results) -> list[str]:
    """Two lines per failing row: what is wrong, and the command that repeats it."""
    return [
        line
        for row in results.failures()
        for line in (
            f"{row.status}: {row.solution} at T={row.num_tokens}: {row.problem}",
            f"  repeat: {row.repro}",
        )
    ]
