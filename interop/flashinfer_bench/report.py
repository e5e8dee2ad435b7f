"""The published comparison's document from a folder's traces."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop import comparison_report
from interop.dataset import stand_ins
from interop.flashinfer_bench import record, solutions, workspace
from interop.flashinfer_bench.traces import Traces, read_traces
from jax_moe.io.files import data_set_root, kept_if_used, naming

_UNKNOWN = "not recorded"


def report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes `flashinfer_bench.md` and `flashinfer_bench.png`.

    Args:
        folder: A data set with traces; `run.json` and `workspace.json` are used where present.
        output: Where to write; None means the folder itself.

    Returns:
        The path of the document.

    Raises:
        ValueError: The folder holds no traces or something unfit (see `traces`), or `output` is no
            folder that can be made or used.
    """
    root = data_set_root(folder)
    if output is None:
        return _write(root, Path(folder))
    with kept_if_used(Path(output)):  # nothing is left of a report that is refused
        try:
            with naming(Path(output)):
                Path(output).mkdir(parents=True, exist_ok=True)
        except ValueError as error:
            raise ValueError(f"--output: {error}") from None
        return _write(root, Path(output))


def _write(root: Path, output: Path) -> Path:
    traces = read_traces(root)
    called = record.read(root)
    sizes = workspace.read(root)
    blobs = "stand-ins" if stand_ins(traces.workloads) else "blobs"
    routing = f"from the folder's {blobs}" if traces.definition.is_default else "drawn by it too"
    results = {
        name: {
            uuid: row._replace(workspace_bytes=sizes.get(name, {}).get(uuid))
            for uuid, row in traces.results[name].items()
        }
        for name in _ordered(traces)
    }
    document, *_ = comparison_report.write(
        output,
        [comparison_report.WorkloadRow(*row[:3]) for row in traces.workloads],
        results,
        header=_header(traces, called),
        command=called.get("command", _UNKNOWN),
        designs=solutions.designs(),
        title=f"{', '.join(traces.hardware)}, speedup over the definition's reference inside "
        f"flashinfer-bench, means\ninputs of flashinfer-bench, routing {routing}",
        name="flashinfer_bench",
    )
    return document


def _ordered(traces: Traces) -> list[str]:
    """The exported order first: its first solution is the baseline of the ratios."""
    exported = solutions.names(traces.definition)
    known = [name for name in exported if name in traces.results]
    return known + [name for name in traces.results if name not in exported]


def _header(traces: Traces, called: Mapping[str, Any]) -> dict[str, str]:
    settings = called.get("settings", {})
    found = {name: " and ".join(texts) for name, texts in traces.libraries.items()}
    # Where traces disagree with each other, the record does not speak for them.
    several = {name: found[name] for name, texts in traces.libraries.items() if len(texts) > 1}
    versions = {**found, **called.get("versions", {}), **several}
    ratios = ", ".join(f"{name} {ratio:.4f}" for name, ratio in traces.matched_ratio.items())
    config = ("warmup_runs", "iterations", "num_trials", "timeout")
    return {
        "Definition": f"`{traces.definition.name}`",
        "Date": " to ".join(dict.fromkeys((min(traces.dates), max(traces.dates)))),
        "Device": ", ".join(traces.hardware),
        **({"Routing blobs": drawn} if (drawn := stand_ins(traces.workloads)) else {}),
        "Tolerances": _pairs(settings, ("rtol", "atol", "required_matched_ratio")),
        "Config": _pairs(settings, config),
        "Clock": "flashinfer-bench: CUDA events around the call on PyTorch's stream, L2 zeroed and "
        f"arguments cloned before each, host gaps included; mean of {_calls(settings)}",
        "Versions": ", ".join(f"{name} {text}" for name, text in versions.items()) or _UNKNOWN,
        "Smallest matched ratio": ratios or "not reported",
        "Passed": ", ".join(
            f"{name} {sum(row.status == comparison_report.PASSED for row in rows.values())} of "
            f"{len(traces.workloads)}"
            for name, rows in traces.results.items()
        ),
    }


def _calls(settings: Mapping[str, Any]) -> str:
    if not settings:
        return "iterations and trials"
    iterations, trials = settings["iterations"], settings["num_trials"]
    return f"n = {iterations * trials} calls ({iterations} iterations x {trials} trials)"


def _pairs(settings: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return ", ".join(f"{n} {json.dumps(settings[n])}" for n in names if n in settings) or _UNKNOWN
