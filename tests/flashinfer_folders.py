"""Traces as flashinfer-bench writes them, for an exported folder; shared by its test files."""

from __future__ import annotations

import json
import pathlib

from interop import workloads

NAME = workloads.definition()["name"]
TRACES = f"traces/moe/{NAME}.jsonl"
BLOBS = f"./blob/workloads/moe/{NAME}"


def inputs(workload: workloads.Workload) -> dict:
    """The inputs of a workload as the export writes them."""
    blob = f"{BLOBS}/stand_in_{workload.uuid}.safetensors"
    values: dict[str, dict] = {
        name: {"type": "random"} for name in workloads.definition()["inputs"]
    }
    for name in ("routing_logits", "routing_bias"):
        values[name] = {"type": "safetensors", "path": blob, "tensor_key": name}
    values["local_expert_offset"] = {"type": "scalar", "value": workload.local_expert_offset}
    values["routed_scaling_factor"] = {"type": "scalar", "value": 2.5}
    return values


def trace(workload: workloads.Workload, solution: str, latency: float, status="PASSED") -> dict:
    passed = status == "PASSED"
    return {
        "definition": NAME,
        "workload": {
            "uuid": workload.uuid,
            "axes": {"seq_len": workload.num_tokens},
            "inputs": inputs(workload),
        },
        "solution": solution,
        "evaluation": {
            "status": status,
            "environment": {"hardware": "NVIDIA H100 80GB HBM3", "libs": {"torch": "2.11.0"}},
            "timestamp": "2026-01-01T00:00:00",
            "log": "",
            "correctness": {
                "max_relative_error": "Infinity",
                "max_absolute_error": 1.0,
                "extra": {"matched_ratio": 0.93},
            }
            if passed
            else None,
            "performance": {
                "latency_ms": latency,
                "reference_latency_ms": 10.0,
                "speedup_factor": 10.0 / latency,
            }
            if passed
            else None,
        },
    }


def write_traces(root: pathlib.Path, rows: list[dict]) -> None:
    path = root / TRACES
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def failed(workload: workloads.Workload, solution: str, ratio: float) -> dict:
    """A trace of a wrong result, which has a share of matched elements and no time."""
    row = trace(workload, solution, 0, status="INCORRECT_NUMERICAL")
    row["evaluation"]["correctness"] = {
        "max_relative_error": "NaN",
        "max_absolute_error": 1.0,
        "extra": {"matched_ratio": ratio},
    }
    return row
