"""Few combinations of many options in which every two values of two options meet."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def product(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations."""
    return [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]


def covering(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A covering array of strength two, built greedily; always the same one.

    Each row starts from a pair that is still missing and takes, option after option, the value that
    adds most missing pairs.
    """
    names = list(options)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in options[a]
        for y in options[b]
    }
    rows = []
    for first in _in_order(missing, options):
        if first not in missing:
            continue
        row = dict(first)
        for name in names:
            if name not in row:
                row[name] = max(
                    options[name], key=lambda value, name=name: _gain(row, name, value, missing)
                )
        missing -= set(itertools.combinations([(name, row[name]) for name in names], 2))
        rows.append({name: row[name] for name in names})
    return rows


def _in_order(pairs: set[Any], options: Mapping[str, Sequence[Any]]) -> list[Any]:
    def place(pair: Any) -> Any:
        return [(list(options).index(name), options[name].index(value)) for name, value in pair]

    return sorted(pairs, key=place)


def _gain(row: Mapping[str, Any], name: str, value: Any, missing: set[Any]) -> int:
    here = (name, value)
    return sum((here, other) in missing or (other, here) in missing for other in row.items())
