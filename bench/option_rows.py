"""The rows of `bench.options`: ratios, and what is written of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import environment, tables
from bench.failures import writing
from bench.option_variants import VARIANTS, Variant
from interop.markdown import wrapped
from jax_moe.io.files import write_atomically

_HEADER = ("stage", "variant", "T", "us", "vs", "error", "equal")


class Row(NamedTuple):
    """One measurement.

    Attributes:
        stage: Of the variant.
        variant: Its name.
        tokens: T.
        us: Median GPU span of a call; on a CPU the host's time.
        p10: 10th percentile of it.
        p90: 90th percentile.
        ratio: `us` over that of the first variant of its kind.
        error: Against the oracle, relative, in the Frobenius norm; of a router the worst relative
            difference of a weight; None for the quantizer.
        equal: Share of right elements, as the module says.
        problem: Why there is no time.
    """

    stage: str
    variant: str
    tokens: int
    us: float | None = None
    p10: float | None = None
    p90: float | None = None
    ratio: float | None = None
    error: float | None = None
    equal: float | None = None
    problem: str = ""


def with_ratios(rows: Sequence[Row], variants: Sequence[Variant] = VARIANTS) -> list[Row]:
    """The rows, each over the first variant of its stage and hidden states, at its T.

    Where that one was not measured, there is no ratio.
    """
    dtypes = {(one.stage, one.name): one.dtype for one in variants}
    first: dict[Any, str] = {}
    for one in variants:
        first.setdefault((one.stage, one.dtype), one.name)
    times = {(row.stage, row.variant, row.tokens): row.us for row in rows}

    def ratio(row: Row) -> float | None:
        base = times.get((row.stage, first[row.stage, dtypes[row.stage, row.variant]], row.tokens))
        return None if base is None or row.us is None else row.us / base

    return [row._replace(ratio=ratio(row)) for row in rows]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as text, the header first."""
    return [list(_HEADER)] + [
        [
            row.stage,
            row.variant,
            str(row.tokens),
            "-" if row.us is None else f"{row.us:.1f}",
            "-" if row.ratio is None else f"{row.ratio:.3f}",
            "-" if row.error is None else f"{row.error:.2g}",
            row.problem or ("-" if row.equal is None else f"{row.equal:.4f}"),
        ]
        for row in rows
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines for the terminal."""
    return tables.aligned(cells(rows), left=2)


def write(rows: Sequence[Row], about: Mapping[str, Any], folder: Path, asked: int) -> None:
    """`options.json` and, for people, `options.md`; both say if rows are left of those `asked`."""
    about = dict(about) | {"complete": len(rows) == asked}
    path = folder / "options.json"
    with writing(path), write_atomically(path, "w") as file:
        json.dump({"about": about, "rows": [row._asdict() for row in rows]}, file, indent=1)
    head = (
        f"{about['device']['kind']}, backend `{about['backend']}`, commit {about['git_commit']}, "
        f"{environment.date(about['started'])}, `{about['command']}`."
    )
    beware = [f"**REDUCED sizes**: {about['note']}.", ""] if about["reduced"] else []
    if not about["complete"]:
        beware += [f"**Incomplete**: {len(rows)} of {asked} rows.", ""]
    table = tables.markdown(cells(rows), left=2)
    lines = ["# What each option costs", "", *beware, head, "", *table, ""]
    path = folder / "options.md"
    with writing(path), write_atomically(path, "w") as file:
        file.write("\n".join(wrapped(lines)))
