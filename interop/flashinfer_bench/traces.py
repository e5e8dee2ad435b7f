"""Reads the solutions and traces of a flashinfer-trace folder that nobody vouches for.

Nothing outside of the folder is opened. A path in a solution that is absolute or holds `..`, a name
or path that appears twice, a trace of an unknown definition, solution or workload, or of a workload
that is not the folder's of that uuid, an unknown key, a time or share that cannot be: each is a
`ValueError` that names the file and the entry.
"""

import datetime
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from interop.comparison_analysis import PASSED, Measurement
from interop.dataset import MAX_LINE_BYTES, definition_of, read_workloads
from interop.definitions import Definition
from interop.workloads import Workload
from jax_moe.io.files import confined_files, data_set_root, read_lines, read_object, shown
from jax_moe.io.strict_json import check_fields, number, one_line

_MAX_TRACE_BYTES = 2**24  # a trace embeds up to 5 MiB of log
# What no clock reads and no run takes; between them every ratio and logarithm is finite.
_MIN_MS, _MAX_MS = 1e-6, 1e9
STATUSES = (
    PASSED,
    "INCORRECT_SHAPE",
    "INCORRECT_NUMERICAL",
    "INCORRECT_DTYPE",
    "RUNTIME_ERROR",
    "COMPILE_ERROR",
    "TIMEOUT",
)
_SHOWN = 60  # characters of a value that is not the expected one
_SPEC = ("language", "target_hardware", "entry_point")
_SPEC_OPTIONAL = ("dependencies", "destination_passing_style", "binding")


class Traces(NamedTuple):
    """What a folder's traces say.

    Attributes:
        definition: Which the folder is of.
        workloads: All workloads of the folder, in file order.
        results: Solution -> workload uuid -> measurement, for the solutions that have traces, in
            the order of their first trace.
        dates: Days on which the traces were taken, YYYY-MM-DD, by the machine's clock.
        hardware: Devices named by the traces.
        libraries: Library versions named by the traces, name -> each version.
        matched_ratio: The smallest share of matched elements of each solution; where reported.
    """

    definition: Definition
    workloads: tuple[Workload, ...]
    results: Mapping[str, Mapping[str, Measurement]]
    dates: tuple[str, ...]
    hardware: tuple[str, ...]
    libraries: Mapping[str, tuple[str, ...]]
    matched_ratio: Mapping[str, float]


def workload_lines(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads the workload file as it is written; `interop.dataset.read_workloads` checks it.

    Args:
        root: The data set, resolved.

    Yields:
        "file:line" and the line's object.

    Raises:
        ValueError: See the module.
    """
    for path in confined_files(root, "workloads", f"{definition_of(root).name}.jsonl"):
        yield from read_lines(root, path, MAX_LINE_BYTES)


def read_solutions(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Reads and checks every solution of the folder.

    Args:
        folder: The data set's root.

    Returns:
        Name -> solution, in the order of the file names.

    Raises:
        ValueError: See the module.
    """
    root = data_set_root(folder)
    definition = definition_of(root)
    found: dict[str, dict[str, Any]] = {}
    for path in confined_files(root, "solutions", "*.json"):
        solution = read_object(root, path)
        _check_solution(solution, definition, shown(path))
        if solution["name"] in found:
            raise ValueError(f"{shown(path)}: solution {solution['name']!r} appears twice")
        found[solution["name"]] = solution
    return found


def read_traces(folder: str | Path) -> Traces:
    """Reads the measured traces of the folder.

    Args:
        folder: The data set's root.

    Returns:
        The measurements.

    Raises:
        ValueError: See the module; also if there is no trace.
    """
    root = data_set_root(folder)
    definition = definition_of(root)
    workloads = tuple(row.workload for row in read_workloads(root, definition))
    given = [line["workload"] for _, line in workload_lines(root)]
    known = {"solution": read_solutions(root), "uuid": {line["uuid"]: line for line in given}}
    results: dict[str, dict[str, Measurement]] = {}
    dates: dict[str, None] = {}
    hardware: dict[str, None] = {}
    libraries: dict[str, tuple[str, ...]] = {}
    matched: dict[str, float] = {}
    for where, trace in _traces(root):
        name, uuid, evaluation = _check_trace(trace, definition, known, where)
        rows = results.setdefault(name, {})
        if uuid in rows:
            raise ValueError(f"{where}: {name!r} has two traces for workload {uuid}")
        rows[uuid] = _measurement(evaluation, where)
        dates[_date(evaluation["timestamp"], where)] = None
        device, libs = _environment(evaluation["environment"], f"{where}: environment")
        hardware[device] = None
        for library, version in libs.items():
            libraries[library] = tuple(dict.fromkeys([*libraries.get(library, ()), version]))
        correctness = _optional_object(evaluation, "correctness", where)
        extra = _optional_object(correctness, "extra", f"{where}: correctness")
        ratio = extra.get("matched_ratio")
        if ratio is not None:
            ratio = number(ratio, 0, 1, f"{where}: matched_ratio")
            matched[name] = min(matched.get(name, 1.0), ratio)
    if not results:
        raise ValueError(
            f"{shown(root)}: no traces/**/{definition.name}.jsonl with a measured trace"
        )
    return Traces(definition, workloads, results, tuple(dates), tuple(hardware), libraries, matched)


def _date(timestamp: Any, where: str) -> str:
    try:
        return datetime.datetime.fromisoformat(timestamp).date().isoformat()
    except (TypeError, ValueError):
        shown = reprlib.repr(timestamp)
        raise ValueError(f"{where}: timestamp: expected an ISO time, got {shown}") from None


def _environment(value: Any, where: str) -> tuple[str, Mapping[str, str]]:
    environment = check_fields(value, ("hardware",), ("libs",), where)
    libs = _optional_object(environment, "libs", where)
    for library, version in libs.items():
        one_line(library, f"{where}: libs")
        one_line(version, f"{where}: libs: {library}")
    return one_line(environment["hardware"], f"{where}: hardware"), libs


def _optional_object(holder: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = {} if holder.get(name) is None else holder[name]
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {name}: expected an object, got {type(value).__name__}")
    return value


def _traces(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in confined_files(root, "traces", "*.jsonl"):
        yield from read_lines(root, path, _MAX_TRACE_BYTES)


def _check_solution(solution: dict[str, Any], definition: Definition, where: str) -> None:
    required = ("name", "definition", "author", "spec", "sources")
    check_fields(solution, required, ("description",), where)
    one_line(solution["name"], f"{where}: name")
    if solution["definition"] != definition.name:
        raise ValueError(f"{where}: unknown definition {solution['definition']!r}")
    spec = check_fields(solution["spec"], _SPEC, _SPEC_OPTIONAL, f"{where}: spec")
    sources = solution["sources"]
    if not isinstance(sources, list) or not sources:
        found = reprlib.repr(sources)
        raise ValueError(f"{where}: sources: expected a list with an entry, got {found}")
    paths: set[str] = set()
    for source in sources:
        check_fields(source, ("path", "content"), (), f"{where}: sources")
        path = source["path"]
        if not isinstance(path, str) or not path or not _is_confined(path):
            raise ValueError(f"{where}: expected a relative path without '..', got {path!r}")
        if path in paths:
            raise ValueError(f"{where}: source {path!r} appears twice")
        paths.add(path)
    entry = str(spec["entry_point"]).split("::")
    if len(entry) != 2 or entry[0] not in paths or not entry[1].isidentifier():
        raise ValueError(f"{where}: entry_point: no such source: {spec['entry_point']!r}")


def _is_confined(path: str) -> bool:
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and "\0" not in path


def _check_trace(
    trace: dict[str, Any],
    definition: Definition,
    known: Mapping[str, Mapping[str, Any]],
    where: str,
) -> tuple[str, str, Mapping[str, Any]]:
    check_fields(trace, ("definition", "workload", "solution", "evaluation"), (), where)
    if trace["definition"] != definition.name:
        raise ValueError(f"{where}: unknown definition {trace['definition']!r}")
    workload = check_fields(trace["workload"], ("uuid", "axes", "inputs"), (), f"{where}: workload")
    for label, value in (("solution", trace["solution"]), ("uuid", workload["uuid"])):
        if not isinstance(value, str) or value not in known[label]:
            raise ValueError(f"{where}: unknown {label} {reprlib.repr(value)}")
    _check_workload(workload, known["uuid"][workload["uuid"]], f"{where}: workload")
    evaluation = check_fields(
        trace["evaluation"],
        ("status", "environment", "timestamp"),
        ("log", "correctness", "performance"),
        f"{where}: evaluation",
    )
    if evaluation["status"] not in STATUSES:
        raise ValueError(f"{where}: unknown status {evaluation['status']!r}")
    return trace["solution"], workload["uuid"], evaluation


def _check_workload(found: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Compares a trace's axes and inputs with the folder's of that uuid, which are checked."""
    axes = check_fields(found["axes"], tuple(given["axes"]), (), f"{where}: axes")
    _check_same(axes, given["axes"], f"{where}: axes")
    inputs = check_fields(found["inputs"], tuple(given["inputs"]), (), f"{where}: inputs")
    for name, spec in given["inputs"].items():
        check_fields(inputs[name], tuple(spec), (), f"{where}: {name}")
        _check_same(inputs[name], spec, f"{where}: {name}")


def _check_same(found: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    for name, value in given.items():
        # True equals 1, and 1.0 too: types tell them apart.
        if type(found[name]) is not type(value) or found[name] != value:
            wanted, got = _apart(repr(value), repr(found[name]))
            raise ValueError(
                f"{where}: {name}: expected {wanted} as in the folder's workload, got {got}"
            )


def _apart(*texts: str) -> list[str]:
    """The texts, long ones cut to where they differ."""
    pairs = enumerate(zip(*texts, strict=False))
    same = next((place for place, pair in pairs if len(set(pair)) > 1), min(map(len, texts)))
    start = max(0, same - _SHOWN // 2)
    cut = [text[start : start + _SHOWN] for text in texts]
    return [
        "..." * (start > 0) + part + "..." * (start + len(part) < len(text))
        for part, text in zip(cut, texts, strict=True)
    ]


def _measurement(evaluation: Mapping[str, Any], where: str) -> Measurement:
    if evaluation["status"] != PASSED:
        return Measurement(evaluation["status"])
    fields = ("latency_ms", "reference_latency_ms", "speedup_factor")
    performance = check_fields(evaluation.get("performance"), fields, (), f"{where}: performance")
    latency, reference = (
        number(performance[field], _MIN_MS, _MAX_MS, f"{where}: {field}") for field in fields[:2]
    )
    return Measurement(PASSED, latency_ms=latency, reference_ms=reference)
