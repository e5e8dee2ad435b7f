"""What the measured rows say: means, ratios, and one generated sentence per finding and regime."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from types import MappingProxyType
from typing import NamedTuple

PASSED = "PASSED"
CLOCKS = GPU_TIME, KERNEL_TIME, WALL_TIME = "GPU time", "kernel time", "wall time"
ALL_WORKLOADS = "All workloads"
_FEW = 3


class WorkloadRow(NamedTuple):
    """One workload of the report: its uuid, the tokens T and the first local expert."""

    uuid: str
    num_tokens: int
    local_expert_offset: int


class Measurement(NamedTuple):
    """One solution on one workload.

    Attributes:
        status: "PASSED", or the reason why there is no speed.
        latency_ms: time of one call; None unless passed.
        reference_ms: time of the reference on the same workload by the same timer; None if not
            measured.
        workspace_bytes: peak bytes allocated by one call beyond inputs and output; None if not
            measured.
        clocks: time of one call in ms by each of `CLOCKS` that took it (`KERNEL_TIME` is
            `GPU_TIME` without the gaps between kernels); empty where only the one of `latency_ms`
            is known.
    """

    status: str
    latency_ms: float | None = None
    reference_ms: float | None = None
    workspace_bytes: int | None = None
    clocks: Mapping[str, float] = MappingProxyType({})


Results = Mapping[str, Mapping[str, Measurement]]  # solution -> uuid -> measurement


class Regime(NamedTuple):
    """A range of token counts, both ends included; `last` None means unbounded."""

    name: str
    first: int
    last: int | None

    def holds(self, num_tokens: int) -> bool:
        """Whether a workload of `num_tokens` tokens belongs here."""
        return self.first <= num_tokens and (self.last is None or num_tokens <= self.last)


# The published regimes; the ranges between them hold none of the 19 workloads and are named for
# other data.
REGIMES = (
    Regime("T = 1", 1, 1),
    Regime("T = 2-6", 2, 6),
    Regime("T = 7-32", 7, 32),
    Regime("T = 33-49", 33, 49),
    Regime("T = 50-80", 50, 80),
    Regime("T = 81-900", 81, 900),
    Regime("T = 901", 901, 901),
    Regime("T = 902-10K", 902, 10_000),
    Regime("T > 10K", 10_001, None),
)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; `values` must not be empty."""
    return math.fsum(values) / len(values)


def geomean(values: Sequence[float]) -> float:
    """Geometric mean of positive numbers; `values` must not be empty."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def passed(results: Results, solution: str, uuid: str) -> Measurement | None:
    """The measurement if it passed and has a positive latency, else None."""
    row = results[solution].get(uuid)
    if row is None or row.status != PASSED or not row.latency_ms or row.latency_ms <= 0:
        return None
    return row


def speedup(row: Measurement | None) -> float | None:
    """Reference time over solution time, or None where either is missing."""
    if row is None or not row.latency_ms or not row.reference_ms:
        return None
    return row.reference_ms / row.latency_ms


def latency_ratio(results: Results, slow: str, fast: str, uuid: str) -> float | None:
    """How many times as fast `fast` is as `slow` on one workload (`slow` time over `fast` time)."""
    a, b = passed(results, slow, uuid), passed(results, fast, uuid)
    return a.latency_ms / b.latency_ms if a and b and a.latency_ms and b.latency_ms else None


def clocks(results: Results) -> list[str]:
    """Those of `CLOCKS` that took a time of any solution."""
    rows = [row for found in results.values() for row in found.values()]
    return [clock for clock in CLOCKS if any(clock in row.clocks for row in rows)]


def clock_time(results: Results, name: str, uuid: str, clock: str) -> float | None:
    """The time in ms by one of the clocks, None unless passed."""
    row = passed(results, name, uuid)
    return row.clocks.get(clock) if row else None


def clock_ratio(results: Results, slow: str, fast: str, uuid: str, clock: str) -> float | None:
    """`latency_ratio` by one of the clocks."""
    a, b = (clock_time(results, name, uuid, clock) for name in (slow, fast))
    return a / b if a and b else None


def pairs(results: Results) -> list[tuple[str, str]]:
    """The (slow, fast) pairs to compare: all of up to three, else two versions of one design.

    With more than three, `X_v1` is compared with `X_v2`, and the other solutions by their speedups
    over the reference.
    """
    names = list(results)
    if len(names) <= _FEW:
        return list(combinations(names, 2))
    versions = [(name, f"{name.removesuffix('_v1')}_v2") for name in names if name[-3:] == "_v1"]
    return [(first, second) for first, second in versions if second in results]


def is_few(results: Results) -> bool:
    """Whether there is room for a sentence per solution and for each pair."""
    return len(results) <= _FEW


def covered_uuids(workloads: Sequence[WorkloadRow], results: Results) -> list[str]:
    """The workloads that a solution passed: what a mean of all runs over."""
    return [w.uuid for w in workloads if any(passed(results, name, w.uuid) for name in results)]


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _spread(values: Sequence[float], unit: str = "x") -> str:
    low, high = f"{min(values):.2f}{unit}", f"{max(values):.2f}{unit}"
    return low if low == high else f"{low} to {high}"


def _geomean_text(values: Sequence[float], count: int) -> str:
    of = "" if len(values) == count else f" of {len(values)}"
    return f"geometric mean{of}, {_spread(values)}"


def _on_one(count: int) -> str:
    return "" if count == 1 else f" on 1 of {count}"


def _pair_sentence(results: Results, slow: str, fast: str, uuids: Sequence[str]) -> str | None:
    found = [latency_ratio(results, slow, fast, uuid) for uuid in uuids]
    ratios = [ratio for ratio in found if ratio is not None]
    if not ratios:
        return None
    wins, n = sum(ratio > 1 for ratio in ratios), len(ratios)
    if n == 1:
        return f"`{fast}` is {ratios[0]:.2f}x as fast as `{slow}`{_on_one(len(uuids))}."
    who = "each" if wins == n else "none" if wins == 0 else f"{wins} of {n}"
    return (
        f"`{fast}` is {geomean(ratios):.2f}x as fast as `{slow}` "
        f"({_geomean_text(ratios, len(uuids))}), faster on {who}."
    )


def _fastest_sentence(results: Results, uuids: Sequence[str]) -> str | None:
    wins = dict.fromkeys(results, 0)
    for uuid in uuids:
        timed = {
            n: row.latency_ms
            for n in results
            if (row := passed(results, n, uuid)) and row.latency_ms
        }
        if timed:
            wins[min(timed, key=lambda name: timed[name])] += 1
    total = sum(wins.values())
    if total == 0 or len(results) < 2:
        return None
    best = [f"`{name}` on {count} of {total}" for name, count in wins.items() if count]
    return "Fastest: " + ", ".join(best) + "."


def _speedup_sentence(results: Results, name: str, uuids: Sequence[str]) -> str | None:
    found = [passed(results, name, uuid) for uuid in uuids]
    values = [value for row in found if (value := speedup(row)) is not None]
    if not values:
        return None
    if len(values) == 1:
        return f"`{name}`: {values[0]:.2f}x the reference's speed{_on_one(len(uuids))}."
    spread = f"({_geomean_text(values, len(uuids))})"
    return f"`{name}`: {geomean(values):.2f}x the reference's speed {spread}."


def _failure_sentences(results: Results, uuids: Sequence[str]) -> list[str]:
    sentences = []
    for name in results:
        failed = [uuid for uuid in uuids if passed(results, name, uuid) is None]
        if failed:
            sentences.append(f"`{name}` has no passing result on {len(failed)} of {len(uuids)}.")
    return sentences


def describe(results: Results, uuids: Sequence[str]) -> list[str]:
    """All sentences that hold for these workloads, each computed from the rows."""
    candidates = [_fastest_sentence(results, uuids)]
    candidates += [_pair_sentence(results, slow, fast, uuids) for slow, fast in pairs(results)]
    if is_few(results):  # a table says it of more
        candidates += [_speedup_sentence(results, name, uuids) for name in results]
    return [s for s in candidates if s is not None] + _failure_sentences(results, uuids)


def analysis(workloads: Sequence[WorkloadRow], results: Results) -> list[tuple[str, list[str]]]:
    """(heading, sentences) over everything and then over each regime that holds a workload."""
    return [
        (f"{name} ({plural(len(rows), 'workload')})", describe(results, [w.uuid for w in rows]))
        for name, rows in by_regime(workloads)
    ]


def by_regime(workloads: Sequence[WorkloadRow]) -> list[tuple[str, list[WorkloadRow]]]:
    """All workloads, then those of each regime that holds one, with its name."""
    groups = [(ALL_WORKLOADS, list(workloads))]
    for regime in REGIMES:
        groups.append((regime.name, [w for w in workloads if regime.holds(w.num_tokens)]))
    return [(name, rows) for name, rows in groups if rows]
