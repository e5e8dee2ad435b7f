"""Reads the solutions and traces of a flashinfer-trace folder that nobody vouches for.

Nothing outside of the folder is opened. A path in a solution that is absolute or holds `..`, a name
or path that appears twice, a trace of an unknown definition, solution or workload, an unknown key:
each is a `ValueError` that names the file and the entry.
"""

import reprlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from interop.dataset import read_workloads
from interop.files import confined_files, data_set_root, read_lines, read_object, shown
from interop.seed_analysis import PASSED, Measurement
from interop.strict_json import check_fields
from interop.workloads import Workload, definition

MAX_LINE_BYTES = 2**24  # a trace embeds up to 5 MiB of log
STATUSES = (
    PASSED,
    "INCORRECT_SHAPE",
    "INCORRECT_NUMERICAL",
    "INCORRECT_DTYPE",
    "RUNTIME_ERROR",
    "COMPILE_ERROR",
    "TIMEOUT",
)
_SPEC = ("language", "target_hardware", "entry_point")
_SPEC_OPTIONAL = ("dependencies", "destination_passing_style", "binding")


class Traces(NamedTuple):
    """What a folder's traces say.

    Attributes:
        workloads: All workloads of the folder, in file order.
        results: Solution -> workload uuid -> measurement, for the solutions that have traces, in
            the order of their first trace.
        hardware: Devices named by the traces.
        libraries: Library versions named by the traces, name -> version.
        matched_ratio: The smallest share of matched elements of each solution; where reported.
    """

    workloads: tuple[Workload, ...]
    results: Mapping[str, Mapping[str, Measurement]]
    hardware: tuple[str, ...]
    libraries: Mapping[str, str]
    matched_ratio: Mapping[str, float]


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
    found: dict[str, dict[str, Any]] = {}
    for path in confined_files(root, "solutions", "*.json"):
        solution = read_object(root, path)
        _check_solution(solution, shown(path))
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
    workloads = tuple(row.workload for row in read_workloads(root))
    known = {"solution": set(read_solutions(root)), "uuid": {row.uuid for row in workloads}}
    results: dict[str, dict[str, Measurement]] = {}
    hardware: dict[str, None] = {}
    libraries: dict[str, str] = {}
    matched: dict[str, float] = {}
    for where, trace in _traces(root):
        name, uuid, evaluation = _check_trace(trace, known, where)
        rows = results.setdefault(name, {})
        if uuid in rows:
            raise ValueError(f"{where}: {name!r} has two traces for workload {uuid}")
        rows[uuid] = _measurement(evaluation, where)
        environment = check_fields(
            evaluation["environment"], ("hardware",), ("libs",), f"{where}: environment"
        )
        hardware[str(environment["hardware"])] = None
        libs = _optional_object(environment, "libs", f"{where}: environment")
        libraries |= {str(name): str(version) for name, version in libs.items()}
        correctness = _optional_object(evaluation, "correctness", where)
        extra = _optional_object(correctness, "extra", f"{where}: correctness")
        ratio = extra.get("matched_ratio")
        if ratio is not None:
            matched[name] = min(matched.get(name, 1.0), _positive(ratio, where, "matched_ratio"))
    if not results:
        raise ValueError(
            f"{shown(root)}: no traces/**/{definition()['name']}.jsonl with a measured trace"
        )
    return Traces(workloads, results, tuple(hardware), libraries, matched)


def _optional_object(holder: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = {} if holder.get(name) is None else holder[name]
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {name}: expected an object, found {type(value).__name__}")
    return value


def _traces(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in confined_files(root, "traces", "*.jsonl"):
        yield from read_lines(root, path, MAX_LINE_BYTES)


def _check_solution(solution: dict[str, Any], where: str) -> None:
    required = ("name", "definition", "author", "spec", "sources")
    check_fields(solution, required, ("description",), where)
    if not isinstance(solution["name"], str) or not solution["name"]:
        raise ValueError(f"{where}: name: expected text, found {solution['name']!r}")
    if solution["definition"] != definition()["name"]:
        raise ValueError(f"{where}: unknown definition {solution['definition']!r}")
    spec = check_fields(solution["spec"], _SPEC, _SPEC_OPTIONAL, f"{where}: spec")
    sources = solution["sources"]
    if not isinstance(sources, list) or not sources:
        raise ValueError(f"{where}: sources: expected a list with an entry")
    paths: set[str] = set()
    for source in sources:
        check_fields(source, ("path", "content"), (), f"{where}: sources")
        path = source["path"]
        if not isinstance(path, str) or not path or not _is_confined(path):
            raise ValueError(f"{where}: expected a relative path without '..', found {path!r}")
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
    trace: dict[str, Any], known: Mapping[str, set[str]], where: str
) -> tuple[str, str, Mapping[str, Any]]:
    check_fields(trace, ("definition", "workload", "solution", "evaluation"), (), where)
    if trace["definition"] != definition()["name"]:
        raise ValueError(f"{where}: unknown definition {trace['definition']!r}")
    workload = check_fields(trace["workload"], ("uuid", "axes", "inputs"), (), f"{where}: workload")
    for label, value in (("solution", trace["solution"]), ("uuid", workload["uuid"])):
        if not isinstance(value, str) or value not in known[label]:
            raise ValueError(f"{where}: unknown {label} {value!r}")
    evaluation = check_fields(
        trace["evaluation"],
        ("status", "environment", "timestamp"),
        ("log", "correctness", "performance"),
        f"{where}: evaluation",
    )
    if evaluation["status"] not in STATUSES:
        raise ValueError(f"{where}: unknown status {evaluation['status']!r}")
    return trace["solution"], workload["uuid"], evaluation


def _measurement(evaluation: Mapping[str, Any], where: str) -> Measurement:
    if evaluation["status"] != PASSED:
        return Measurement(evaluation["status"])
    fields = ("latency_ms", "reference_latency_ms", "speedup_factor")
    performance = check_fields(evaluation.get("performance"), fields, (), f"{where}: performance")
    latency, reference = (_positive(performance[f], where, f) for f in fields[:2])
    return Measurement(PASSED, latency_ms=latency, reference_ms=reference)


def _positive(value: Any, where: str, name: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared before it is converted: an int may be beyond any float.
    if not is_number or not 0 < value <= sys.float_info.max:
        found = reprlib.repr(value)
        raise ValueError(f"{where}: {name}: expected a positive number, found {found}")
    return float(value)
