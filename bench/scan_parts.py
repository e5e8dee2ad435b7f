"""What the time of a layer inside a scan is made of, and the table that says so."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from bench import tables
from bench.breakdown import stage_of
from bench.gpu_clock import Kernel, Sample, busy_us
from bench.report import clock_text

if TYPE_CHECKING:
    from bench.layers import Row

_MOST_NAMES = 8
_HEADER = (
    "weights", "layers", "T", "us per layer", "layer", "quantize", "adds", "other kernels",
    "no kernel", "outside", "kernels", "launches", "SM MHz", "error",
)  # fmt: skip
_EXPLANATION = (
    "us per layer = layer: the layer's own kernels",
    "  + quantize: of the hidden states, + adds: the residual's, and the loop's counter",
    "  + other kernels: fills, copies, slices, the loop's condition",
    "  + no kernel: between launches, as the profiler saw it, which lengthens these gaps",
    "  + outside: before the first kernel and after the last one, and what the profiler added",
    "kernels, launches: per layer; a CUDA graph is one launch. SM MHz: programs back to back",
)


class Parts(NamedTuple):
    """Times in us per layer that add up to the wall time; kernels that overlap count once.

    Attributes:
        layer: In which kernels of the layer ran.
        quantize: In which only that of the hidden states ran.
        adds: In which only additions ran, of what others there are: the residual's, the counter's.
        other: In which only yet other kernels ran: fills, copies, slices, the loop's condition.
        idle: In which none ran, from the first kernel to the last.
        outside: The host's time less that span; below 0 if the profiler added more than it.
        kernels: How many ran.
    """

    layer: float
    quantize: float
    adds: float
    other: float
    idle: float
    outside: float
    kernels: float


def part_of(kernel: str) -> str:
    """The field of `Parts` that a kernel's time belongs to, by its name."""
    if "quant" in kernel:
        return "quantize"
    if stage_of(kernel):
        return "layer"
    return "adds" if "add" in kernel else "other"


def parts_of(sample: Sample, layers: int, wall_us: float) -> Parts:
    """Divides a program's time among its parts.

    Args:
        sample: The program, by the profiler.
        layers: How many it has.
        wall_us: Per layer, by the host without a profiler.

    Returns:
        The parts per layer.
    """
    found: dict[str, float] = {}
    counted: list[Kernel] = []
    before = 0.0
    for part in ("layer", "quantize", "adds", "other"):
        counted += [one for one in sample.kernels if part_of(one.name) == part]
        busy = busy_us(sample._replace(kernels=_in_order(counted)))
        found[part], before = (busy - before) / layers, busy
    span = sample.span_us / layers
    return Parts(
        **found,
        idle=span - before / layers,
        outside=wall_us - span,
        kernels=len(sample.kernels) / layers,
    )


def _in_order(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    return tuple(sorted(kernels, key=lambda one: one.start_us))


def table(rows: Sequence["Row"]) -> list[str]:
    """The rows as text, what their columns mean, which other kernels ran, and what went wrong."""
    cells = [_HEADER, *map(_cells, rows)]
    lines = tables.aligned(tables.without_empty(cells))
    if any(row.parts for row in rows):
        lines += ["", *_EXPLANATION, *(line for row in rows if (line := _others(row)))]
    return [*lines, *(f"{_name(row)}: {row.problem}" for row in rows if row.problem)]


def _name(row: "Row") -> str:
    return f"{row.weights} T={row.tokens}"


def _cells(row: "Row") -> tuple[str, ...]:
    times: list[float | None] = [row.wall_us, *(row.parts or [None] * len(Parts._fields))]
    launches = None if row.launches is None else row.launches / row.layers
    return (
        row.weights,
        str(row.layers),
        str(row.tokens),
        *("-" if value is None else f"{value:.1f}" for value in (*times, launches)),
        clock_text(row.clock) if row.clock else "-",
        "-" if row.error is None else f"{row.error:.5f}",
    )


def _others(row: "Row") -> str:
    """The kernels that are not the layer's, the longest first."""
    others = [kernel for kernel in row.kernels if part_of(kernel.name) != "layer"]
    longest = sorted(others, key=lambda kernel: -kernel.us)[:_MOST_NAMES]
    shown = "; ".join(
        f"{kernel.name[:40]} {kernel.us / row.layers:.2f} us x {kernel.launches / row.layers:.1f}"
        for kernel in longest
    )
    return f"{_name(row)}, per layer: {shown}" if shown else ""
