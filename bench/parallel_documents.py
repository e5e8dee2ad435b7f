"""One JSON file, one document and one plot from the files that the steps of a run have written."""

import functools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from bench import environment, parallel_rows, step_record, typed
from bench.about import Kernel, Step, check_parallel
from bench.failures import FileError, writing
from bench.parallel_rows import Row
from bench.parallel_trace import KernelTime, by_kernel
from bench.parallel_trace import read as read_trace
from bench.results import plain
from bench.tables import markdown, without_empty
from interop.markdown import wrapped
from jax_moe.io.files import naming, shown, write_atomically
from jax_moe.io.strict_json import parse_object

STEM = "parallel_gpus"
_MOST_KERNELS = 14


class Check(NamedTuple):
    """Of an exchange, as `bench.parallel_check` has it."""

    exchange: str
    tokens: int
    runs: int
    error: float | None  # None if it is not finite
    same_bits: bool
    right: bool


class Primitive(NamedTuple):
    """Of a primitive, as `bench.parallel_primitives` has it."""

    name: str
    bytes: int
    us: float | None = None
    gb_s: float | None = None
    problem: str = ""


class Trace(NamedTuple):
    """Of a layer, as `bench.parallel_trace` has it."""

    exchange: str
    tokens: int
    trace: str = ""
    problem: str = ""


class Named(TypedDict):
    """A row of those, and the step that it is of."""

    step: str
    kernels: NotRequired[list[Kernel]]


_KINDS = (
    ("checks", "check", Check),
    ("primitives", "primitives", Primitive),
    ("traces", "trace", Trace),
)


def write_json(content: Any, path: Path) -> None:
    """Writes a file of results, atomically.

    Raises:
        FileError: It cannot be written; names it.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path, "w") as file:
            json.dump(plain(content), file, indent=1)


def collect(folder: Path) -> dict[str, Any]:
    """All that the steps have written so far.

    Args:
        folder: Of the run.

    Returns:
        about, steps (the last state of each, and the commit that its file names), layers, checks,
        primitives and traces. Steps of several commits make an `about` that names them all.
    """
    found: dict[str, Any] = {"about": {}, "steps": [], "layers": []}
    began: set[tuple[str, str]] = set()
    whole: dict[str, bool] = {}  # steps with results, and whether all of theirs are there
    commits: dict[str, str] = {}
    for path in sorted(folder.glob("layer_*/parallel.json")):
        rows, about = parallel_rows.read(path)
        found["layers"] += rows
        found["about"] |= about
        whole[path.parent.name] = about.get("complete", True)
        began.add(_began(about))
        commits[path.parent.name] = about.get("git_commit", "")
    found["layers"].sort(key=lambda row: (row.tokens, row.routing != "even", row.routing))
    found["layers"] = [row._asdict() for row in found["layers"]]
    for kind, prefix, record in _KINDS:
        found[kind] = []
        for path in sorted(folder.glob(f"{prefix}_*.json")):
            rows, about = parallel_rows.read_as(functools.partial(typed.record, record), path)
            found[kind] += [{"step": path.stem} | _without_defaults(row) for row in rows]
            found["about"] = about | found["about"]
            began.add(_began(about))
            commits[path.stem] = about.get("git_commit", "")
            whole[path.stem] = True
    for trace in found["traces"]:
        path = folder / Path(trace.get("trace", "")).name
        if trace.get("trace") and not path.is_file():
            whole[trace["step"]] = False
        if path.is_file():
            trace["kernels"] = [kernel._asdict() for kernel in _kernels(path)]
    found["steps"] = _states(step_record.read(folder), whole)
    for step in found["steps"]:
        if commit := commits.get(step["step"]):
            step["commit"] = commit
    if found["steps"]:
        found["about"]["complete"] = not _not_ended_well(found["steps"])
    if not began:  # no step has results
        began = {(step.get("written", ""), _command(step)) for step in found["steps"]}
    if first := sorted(began - {("", "")}):
        found["about"]["started"] = first[0][0]
        commands = dict.fromkeys(command for _, command in first if command)
        found["about"]["command"] = " && ".join(commands)
    if named := sorted({*commits.values()} - {""}):
        found["about"]["git_commit"] = ", ".join(named)
    return found


def _kernels(path: Path) -> list[KernelTime]:
    try:
        with naming(path):
            return by_kernel(read_trace(path))
    except (AttributeError, EOFError, KeyError, TypeError, zlib.error) as error:
        raise ValueError(f"{shown(path)}: damaged: {typed.reason(error)}") from None


def _began(about: Mapping[str, Any]) -> tuple[str, str]:
    """When a step did, and the command that started it: its own is in the step's own file."""
    return about.get("started", ""), about.get("command", "").split(" --step ")[0]


def _command(step: Mapping[str, Any]) -> str:
    return " ".join(["python", *step.get("arguments", ())]).partition(" --step ")[0]


def _without_defaults(row: Any) -> dict[str, Any]:
    """What the row of a file said."""
    defaults = row._field_defaults
    return {name: v for name, v in row._asdict().items() if v != defaults.get(name, ...)}


def _states(lines: step_record.Lines, whole: Mapping[str, bool]) -> list[dict[str, Any]]:
    """The steps as they are recorded, or as far as their results are there."""
    steps = [dict(line) for line in lines.values()]
    steps += [
        {"step": name, "state": "not recorded", "seconds": 0.0}
        for name in sorted(whole.keys() - lines.keys())
    ]
    for step in steps:
        if step["state"] == step_record.OK and not whole.get(step["step"]):
            step["state"] = "results are gone"
    return steps


def _not_ended_well(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    return [step["step"] for step in steps if step["state"] != step_record.OK]


def write(folder: Path) -> Iterator[Path]:
    """Writes what can be said of a run, complete or not.

    Args:
        folder: Of the run; where only its JSON file was kept, that is what is read.

    Yields:
        Each file once it is there.

    Raises:
        FileError: Some cannot be written; names them. The text was printed if it is among them.
        ValueError: A file of the run cannot be read; names it.
    """
    found, path = collect(folder), folder / f"{STEM}.json"
    if not found["about"] and path.exists():
        found = _kept_alone(path)
    rows = [parallel_rows.row_of(row) for row in found["layers"]]
    failures = []
    try:
        write_json(found, path)
        yield path
    except FileError as error:
        failures.append(str(error))
    picture = folder / f"{STEM}.png"
    has_plot = False
    try:
        with writing(picture):
            has_plot = parallel_rows.plot(rows, found["about"], picture)
    except FileError as error:  # the text is much smaller
        failures.append(str(error))
    if has_plot:
        yield picture
    lines = wrapped(_document(found, rows, picture.name if has_plot else None))
    document = folder / f"{STEM}.md"
    try:
        with writing(document), write_atomically(document, "w") as file:
            file.write("\n".join(lines).rstrip() + "\n")
        yield document
    except FileError as error:
        failures.append(str(error))
        print("\n".join(lines))
    if failures:
        raise FileError("; ".join(failures))


def _kept_alone(path: Path) -> dict[str, Any]:
    """The run in a JSON file whose steps' own files are gone."""
    with naming(path):
        found = parse_object(path.read_bytes(), shown(path))
    try:
        check_parallel(found["about"])
        lists = ("steps", "layers", *(kind for kind, *_ in _KINDS))
        for name in lists:
            for row in typed.checked_list(found[name], name):
                typed.checked_object(row, name)
        for row in found["layers"]:
            parallel_rows.row_of(row)
        for kind, _, record in _KINDS:
            for row in found[kind]:
                others = {name: v for name, v in row.items() if name not in ("step", "kernels")}
                typed.record(record, others)
        typed.check(found["steps"], list[Step], "steps")
        for kind, *_ in _KINDS:
            typed.check(found[kind], list[Named], kind)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{shown(path)}: damaged: {typed.reason(error)}") from None
    return found


def _document(found: Mapping[str, Any], rows: Sequence[Row], picture: str | None) -> list[str]:
    count = rows[0].ranks if rows else parallel_rows.ranks_of(found["about"])
    ranks = f"{count} x " if count else ""
    kind = found["about"].get("device", {}).get("kind", "unknown devices")
    lines = [f"# Expert parallelism over {ranks}{kind}", ""]
    if names := _not_ended_well(found["steps"]):
        those = f"{len(names)} of {len(found['steps'])} steps have not ended well"
        lines += [f"**Incomplete**: {those}: {', '.join(names)}.", ""]
    lines += [*_about(found["about"]), ""]
    if picture:
        lines += [f"![Efficiency against tokens]({picture})", ""]
    if rows:
        lines += ["## The layer", "", _LAYER, "", *markdown(parallel_rows.cells(rows), left=2), ""]
        if said := parallel_rows.problems(rows):
            lines += [*(f"- {problem}" for problem in said), ""]
    sections = (
        ("Right, and the same bits in every run", _checks(found["checks"])),
        ("What an exchange is made of", _primitives(found["primitives"])),
    )
    for title, cells in sections:
        if len(cells) > 1:
            lines += [f"## {title}", "", *markdown(cells, left=2), ""]
    for trace in found["traces"]:
        lines += _breakdown(trace)
    if found["steps"]:
        lines += ["## Steps", "", *markdown(_step_cells(found["steps"]), left=2), ""]
    return lines


_LAYER = (
    "Times of a call in a loop of calls, by the host, warm L2, median of 5 loops. T is the tokens "
    "of each rank. Local us is the slowest rank's `apply` on the tokens of all ranks, which it has "
    "already, with the same routing; between is the difference, ratio is layer over local and "
    "efficiency its inverse. Busiest is the (token, expert) pairs of the busiest rank over the "
    "mean. Error is against the sum of the ranks' local work. Routing: even is independent "
    "Gaussian logits, captured a stand-in with the moments of a captured routing, zipf wants "
    "experts in proportion to 1, 1/2, 1/3, ..., in shuffled order."
)


def _about(about: Mapping[str, Any]) -> list[str]:
    lines = []
    if about.get("reduced"):
        lines += [f"**REDUCED sizes**: {about['note']}.", ""]
    if about.get("started"):  # older records have none of these
        lines.append(f"- Date: {environment.date(about['started'])}")
        if sizes := about.get("sizes"):
            text = environment.sizes_text(sizes, is_reduced=about["reduced"])
            lines.append(f"- Sizes: {text}")
        lines.append(f"- Command: `{about['command']}`")
    if versions := about.get("versions"):
        lines.append(f"- Versions: {', '.join(f'{k} {v}' for k, v in versions.items())}")
    if about.get("git_commit"):
        lines.append(f"- Commit: {about['git_commit']}")
    if state := about.get("gpu_state"):
        lines.append(f"- First GPU: {', '.join(f'{k} {v}' for k, v in state.items())}")
    if exchanges := about.get("exchanges"):
        lines += ["", "```", *exchanges.splitlines(), "```"]
    return lines


def _checks(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    cells = [["step", "exchange", "T", "runs", "same bits", "error", "right"]]
    for row in rows:
        said = ["yes" if row[key] else "**no**" for key in ("same_bits", "right")]
        cells.append(
            [
                *(row["step"], row["exchange"], str(row["tokens"]), str(row["runs"])),
                *(said[0], "-" if (error := row["error"]) is None else f"{error:.5f}", said[1]),
            ]
        )
    return cells


def _primitives(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    cells = [["primitive", "problem", "bytes", "us", "GB/s per rank and direction"]]
    for row in sorted(rows, key=lambda row: (row["name"], row["bytes"])):
        us, rate = row.get("us"), row.get("gb_s")
        numbers = ["-" if number is None else f"{number:.1f}" for number in (us, rate)]
        cells.append([row["name"], row.get("problem", "-"), f"{row['bytes']:,}", *numbers])
    return without_empty(cells)


def _breakdown(trace: Mapping[str, Any]) -> list[str]:
    """The longest kernels of a trace, a column per rank."""
    lines = [f"## Where the time goes: {trace['exchange']}, T={trace['tokens']}", ""]
    if not trace.get("kernels"):
        return [*lines, trace.get("problem", "The trace has no kernels of a device."), ""]
    ranks = sorted({kernel["rank"] for kernel in trace["kernels"]})
    times: dict[str, dict[int, float]] = {}
    launches: dict[str, float] = {}
    for kernel in trace["kernels"]:
        times.setdefault(kernel["name"], {})[kernel["rank"]] = kernel["us"]
        launches[kernel["name"]] = max(launches.get(kernel["name"], 0), kernel["launches"])
    names = sorted(times, key=lambda name: -max(times[name].values()))
    cells = [["kernel", "launches", *(f"rank {rank} us" for rank in ranks)]]
    for name in names[:_MOST_KERNELS]:
        each = [f"{times[name].get(rank, 0):.1f}" for rank in ranks]
        cells.append([f"`{name[:60]}`", f"{launches[name]:g}", *each])
    rest = [sum(times[name].get(rank, 0) for name in names[_MOST_KERNELS:]) for rank in ranks]
    if any(rest):
        cells.append([f"{len(names) - _MOST_KERNELS} others", "-", *(f"{us:.1f}" for us in rest)])
    what = "Kernels launched one by one, without CUDA graphs; a collective's time includes waiting"
    lines += [
        f"{what} for the other ranks. Trace for Perfetto: `{trace.get('trace') or 'not kept'}`.",
        "",
    ]
    return [*lines, *markdown(cells), ""]


def _step_cells(steps: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    cells = [["step", "state", "seconds of its turn", "commit", "last line"]]
    several = len({step.get("commit") for step in steps} - {None}) > 1
    for one in steps:
        commit = one.get("commit", "-") if several else "-"
        said = commit, one.get("said") or "-"
        cells.append([one["step"], one["state"], f"{one['seconds']:.1f}", *said])
    return without_empty([[cell.replace("|", "/") for cell in line] for line in cells])
