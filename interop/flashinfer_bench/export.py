"""Writes a flashinfer-trace data set: definition, 19 workloads, routing blobs, our solutions.

The published routing blobs are not part of this project. Without `dataset` each workload gets a
stand-in drawn from the moments of one captured routing, with a seed; its file name, its metadata
and the folder's README say so. With `dataset`, a published folder, its workloads and blobs are
copied.
"""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from jaxtyping import BFloat16, Float32

from interop.dataset import read_routing, read_workloads
from interop.flashinfer_bench import record, solutions
from interop.host_routing import topk_ids
from interop.workloads import (
    ROUTED_SCALING_FACTOR,
    Workload,
    captured_routing,
    definition,
    workloads,
)
from jax_moe.io.files import confined, naming, shown, write_atomically

_MAX_DRAWS = 64
_SCALARS = ("local_expert_offset", "routed_scaling_factor")
_BLOBS = ("routing_logits", "routing_bias")


class _Row(NamedTuple):
    """A workload with its routing and where that comes from."""

    workload: Workload
    factor: float
    logits: Float32[np.ndarray, "T E"]
    bias: BFloat16[np.ndarray, " E"]
    blob_name: str
    source: str


def export(folder: str | Path, *, dataset: str | Path | None = None, seed: int = 0) -> Path:
    """Writes the data set; files of an earlier export are replaced, others left alone.

    Args:
        folder: Where to, created if missing. Nothing is written outside of it.
        dataset: A flashinfer-trace folder with the real blobs; None draws stand-ins.
        seed: Of the stand-ins.

    Returns:
        The folder.

    Raises:
        ValueError: `dataset` is broken (see `interop.dataset`), a symlink leads out of `folder`,
            or the folder holds traces, which are of what was exported before.
    """
    root = Path(folder)
    with naming(root):
        root.mkdir(parents=True, exist_ok=True)
        root = root.resolve()
    if record.has_traces(root):
        raise ValueError(f"{shown(root)}: holds traces of an earlier export; use another folder")
    name, op_type = definition()["name"], definition()["op_type"]
    rows = list(_drawn(seed)) if dataset is None else _copied(dataset)
    blobs = f"blob/workloads/{op_type}/{name}"
    for row in rows:
        tensors = {"routing_logits": row.logits, "routing_bias": row.bias}
        content = safetensors.numpy.save(tensors, {"source": row.source})
        _write(root, f"{blobs}/{row.blob_name}", content)
    lines = "".join(
        json.dumps(_workload_line(row, f"./{blobs}/{row.blob_name}")) + "\n" for row in rows
    )
    _write(root, f"workloads/{op_type}/{name}.jsonl", lines)
    _write(root, f"definitions/{op_type}/{name}.json", _json(_definition()))
    for one in solutions.records():
        path = f"solutions/{one['author']}/{op_type}/{name}/{one['name']}.json"
        _write(root, path, _json(one))
    _write(root, "README.md", _readme(rows))
    return root


def _drawn(seed: int) -> Iterator[_Row]:
    for row in workloads():
        logits, bias = _draw(row, seed)
        yield _Row(
            workload=row,
            factor=ROUTED_SCALING_FACTOR,
            logits=logits,
            bias=bias,
            blob_name=f"stand_in_{row.uuid}.safetensors",
            source=f"stand-in drawn from captured moments, seed {seed}; not the published blob",
        )


def _draw(row: Workload, seed: int) -> tuple[Any, Any]:
    """The first draw with at least min(T, 2) local pairs: an empty layer would measure nothing."""
    num_local = definition()["axes"]["num_local_experts"]["value"]
    for attempt in range(_MAX_DRAWS):
        key = [seed, row.num_tokens, row.local_expert_offset, attempt]
        logits, bias = captured_routing(row.num_tokens, np.random.default_rng(key))
        local = topk_ids(logits, bias) - row.local_expert_offset
        if np.count_nonzero((local >= 0) & (local < num_local)) >= min(row.num_tokens, 2):
            return logits, bias
    raise RuntimeError(f"no draw with local pairs in {_MAX_DRAWS} attempts for {row}")


def _copied(dataset: str | Path) -> list[_Row]:
    try:
        rows = [(row, read_routing(dataset, row)) for row in read_workloads(dataset)]
    except ValueError as error:
        raise ValueError(f"--dataset: {error}") from None
    return [
        _Row(
            workload=row.workload,
            factor=row.routed_scaling_factor,
            logits=logits,
            bias=bias,
            blob_name=f"{row.workload.uuid}.safetensors",
            source="copied from the data set folder that was given to the export",
        )
        for row, (logits, bias) in rows
    ]


def _workload_line(row: _Row, blob: str) -> dict[str, Any]:
    scalars = dict(zip(_SCALARS, (row.workload.local_expert_offset, row.factor), strict=True))
    inputs: dict[str, Any] = {}
    for name in definition()["inputs"]:
        if name in scalars:
            inputs[name] = {"type": "scalar", "value": scalars[name]}
        elif name in _BLOBS:
            inputs[name] = {"type": "safetensors", "path": blob, "tensor_key": name}
        else:
            inputs[name] = {"type": "random"}
    return {
        "definition": definition()["name"],
        "workload": {
            "uuid": row.workload.uuid,
            "axes": {"seq_len": row.workload.num_tokens},
            "inputs": inputs,
        },
        "solution": None,
        "evaluation": None,
    }


def _definition() -> dict[str, Any]:
    source = resources.files("interop").joinpath("torch_definition.py").read_text("utf-8")
    return {
        **definition(),
        "description": "FP8 block-scaled MoE with DeepSeek-V3 routing, one expert-parallel rank; "
        "the reference source is jax-moe's own, ties go to the lowest expert id",
        "reference": source,
    }


def _readme(rows: list[_Row]) -> str:
    sources = sorted({row.source for row in rows})
    return "\n".join(
        (
            f"# {definition()['name']}",
            "",
            "Written by `python -m interop.flashinfer_bench export`. Routing blobs: "
            f"{'; '.join(sources)}.",
            "The solutions import the jax-moe packages: install them or put them on PYTHONPATH.",
            "",
        )
    )


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def _write(root: Path, relative: str, content: str | bytes) -> None:
    path = root / relative
    confined(root, path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)
