"""What became of the changes that `tools.mutants` makes, and a document of it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

type Explanations = dict[tuple[str, str], str]
"""Why a survivor changes nothing, by module and changed line."""


class Mutant(NamedTuple):
    """One change, as cosmic-ray numbers it.

    Attributes:
        module: Path in the checkout.
        operator: cosmic-ray's name of the kind of change.
        occurrence: The how-manieth place of that kind in the module.
        line: Of the place, from 1.
        column: Of the place, from 0.
        job: cosmic-ray's key of it.
    """

    module: str
    operator: str
    occurrence: int
    line: int
    column: int
    job: str = ""


class Verdict(NamedTuple):
    """What became of a mutant.

    Attributes:
        mutant: Which.
        outcome: "killed", "survived", "incompetent" (the change cannot run) or "" (not yet run).
        diff: The change, as lines of a unified diff.
    """

    mutant: Mutant
    outcome: str
    diff: str = ""


def report(found: Sequence[Verdict], explained: Explanations, about: str) -> str:
    """A Markdown document: how many were killed by module, then each survivor.

    Args:
        found: All verdicts.
        explained: Why a survivor changes nothing, by module and changed line.
        about: Commit, versions and seed, as a line.

    Returns:
        The document.
    """
    judged = [one for one in found if one.outcome in ("killed", "survived")]
    killed = sum(one.outcome == "killed" for one in judged)
    share = f", {killed / len(judged):.1%}" if judged else ""
    lines = ["# Mutants", "", about, "", f"{killed} of {len(judged)} are killed{share}.", ""]
    if open_ones := sum(not one.outcome for one in found):
        lines += [f"**Incomplete**: {open_ones} are not judged yet.", ""]
    lines += ["| module | killed | of |", "|---|--:|--:|"]
    for name in dict.fromkeys(one.mutant.module for one in judged):
        own = [one.outcome for one in judged if one.mutant.module == name]
        lines.append(f"| `{name}` | {own.count('killed')} | {len(own)} |")
    lines += ["", "## Survivors", ""]
    for one in judged:
        if one.outcome == "survived":
            why = explained.get(explained_as(one), "not explained")
            lines += [f"`{one.mutant.module}` line {one.mutant.line}: {why}", "", "```diff"]
            lines += [changed_line(one.diff), changed_line(one.diff, "+"), "```", ""]
    return "\n".join(lines)


def explained_as(verdict: Verdict) -> tuple[str, str]:
    """The key of an explanation."""
    return verdict.mutant.module, changed_line(verdict.diff)[1:].strip()


def changed_line(diff: str, sign: str = "-") -> str:
    """The first line that a diff takes away or, of "+", adds, with its sign; empty if none."""
    body = [line for line in diff.splitlines() if line[:1] == sign and line[:3] != sign * 3]
    return body[0] if body else ""


def applied(source: str, verdict: Verdict) -> str | None:
    """A module's text with the change of a verdict; None where its line is no longer there.

    Of several equal lines it is the nearest to where the changed one was.
    """
    lines, was = source.split("\n"), changed_line(verdict.diff)[1:]
    places = [place for place, line in enumerate(lines, 1) if line == was]
    if not places:
        return None
    place = min(places, key=lambda place: abs(place - verdict.mutant.line))
    lines[place - 1] = changed_line(verdict.diff, "+")[1:]
    return "\n".join(lines)


def unexplained(found: Iterable[Verdict], explained: Explanations) -> list[Verdict]:
    """The survivors of which nothing says why."""
    alive = (one for one in found if one.outcome == "survived")
    return [one for one in alive if explained_as(one) not in explained]
