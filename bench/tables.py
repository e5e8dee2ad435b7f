"""Cells as aligned text, or as a markdown table."""

from collections.abc import Sequence

Cells = Sequence[Sequence[str]]


def without_empty(cells: Cells) -> list[list[str]]:
    """Leaves out the columns that have nothing but dashes under their title."""
    columns = zip(*cells, strict=True)
    kept = [column for column in columns if any(cell != "-" for cell in column[1:])]
    return [list(line) for line in zip(*kept, strict=True)]


def aligned(cells: Cells, left: int = 1) -> list[str]:
    """Pads cells to columns.

    Args:
        cells: Lines of equal length, the header first.
        left: How many leading columns are left-aligned; the others are numbers.

    Returns:
        One string per line.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def markdown(cells: Cells, left: int = 1) -> list[str]:
    """The same cells as lines of a markdown table."""
    header, *lines = cells
    marks = ["---" if place < left else "--:" for place in range(len(header))]
    return ["| " + " | ".join(line) + " |" for line in (header, marks, *lines)]
