"""The published comparison's document from a folder's traces."""

import json
from pathlib import Path
from typing import Any

from interop import seed_report
from interop.files import data_set_root, read_object
from interop.flashinfer_bench import run, solutions, workspace
from interop.flashinfer_bench.traces import Traces, read_traces
from interop.strict_json import check_fields
from interop.workloads import definition

_UNKNOWN = "not recorded"


def report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes `flashinfer_bench.md` and `flashinfer_bench.png`.

    Args:
        folder: A data set with traces; `run.json` and `workspace.json` are used where present.
        output: Where to write; None means the folder itself.

    Returns:
        The path of the document.

    Raises:
        ValueError: The folder holds no traces or something unfit (see `traces`).
    """
    root = data_set_root(folder)
    traces = read_traces(root)
    record = _run_record(root)
    sizes = workspace.read(root)
    results = {
        name: {
            uuid: row._replace(workspace_bytes=sizes.get(name, {}).get(uuid))
            for uuid, row in traces.results[name].items()
        }
        for name in _ordered(traces)
    }
    return seed_report.write(
        folder if output is None else output,
        [seed_report.WorkloadRow(*row[:3]) for row in traces.workloads],
        results,
        header=_header(traces, record),
        command=record.get("command", _UNKNOWN),
        designs=solutions.designs(),
        name="flashinfer_bench",
    )


def _ordered(traces: Traces) -> list[str]:
    """The exported order first: its first solution is the baseline of the ratios."""
    exported = [record["name"] for record in solutions.records()]
    known = [name for name in exported if name in traces.results]
    return known + [name for name in traces.results if name not in exported]


def _run_record(root: Path) -> dict[str, Any]:
    path = root / run.RECORD
    if not path.exists(follow_symlinks=False):
        return {}
    record = read_object(root, path)
    check_fields(record, ("command", "settings", "versions"), (), str(path))
    if not isinstance(record["command"], str):
        raise ValueError(f"{path}: command: expected text, found {record['command']!r}")
    check_fields(record["settings"], run.Settings._fields, (), f"{path}: settings")
    check_fields(record["versions"], (), tuple(record["versions"]), f"{path}: versions")
    return record


def _header(traces: Traces, record: dict[str, Any]) -> dict[str, str]:
    settings = record.get("settings", {})
    versions = {**traces.libraries, **record.get("versions", {})}
    ratios = ", ".join(f"{name} {ratio:.4f}" for name, ratio in traces.matched_ratio.items())
    config = ("warmup_runs", "iterations", "num_trials", "timeout")
    return {
        "Definition": f"`{definition()['name']}`",
        "Device": ", ".join(traces.hardware),
        "Tolerances": _pairs(settings, ("rtol", "atol", "required_matched_ratio")),
        "Config": _pairs(settings, config),
        "Clock": "flashinfer-bench: CUDA events around the call on PyTorch's stream, L2 zeroed and "
        "arguments cloned before each, host gaps included; mean of iterations and trials",
        "Versions": ", ".join(f"{name} {text}" for name, text in versions.items()) or _UNKNOWN,
        "Smallest matched ratio": ratios or "not reported",
        "Passed": ", ".join(
            f"{name} {sum(row.status == seed_report.PASSED for row in rows.values())} of "
            f"{len(traces.workloads)}"
            for name, rows in traces.results.items()
        ),
    }


def _pairs(settings: dict[str, Any], names: tuple[str, ...]) -> str:
    return ", ".join(f"{n} {json.dumps(settings[n])}" for n in names if n in settings) or _UNKNOWN
