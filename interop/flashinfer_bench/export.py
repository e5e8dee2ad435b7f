"""Writes a flashinfer-trace data set of one definition: workloads, routing blobs, our solutions.

The default definition has 19 published workloads. Their routing blobs are not part of this project.
Without `dataset` each workload gets a stand-in drawn from the moments of one captured routing, with
a seed; its file name, its metadata and the folder's README say so. With `dataset`, a published
folder, its workloads and blobs are copied.

The other definitions have no published workloads: theirs are few token counts, and every input is
one that flashinfer-bench draws.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from jaxtyping import BFloat16, Float32

from interop import definitions, folder_lock
from interop.dataset import STAND_IN, input_types, read_routing, read_workloads
from interop.definitions import Definition
from interop.flashinfer_bench import record, solutions
from interop.host_routing import topk_ids
from interop.workloads import (
    ROUTED_SCALING_FACTOR,
    Workload,
    captured_routing,
    workloads,
)
from jax_moe.io.files import confined, data_set_root, kept_if_used, naming, shown

_MAX_DRAWS = 64
_WRITTEN_BY = "Written by `python -m interop.flashinfer_bench export`."
RANDOM_TOKENS = (1, 64, 1024)


class _Row(NamedTuple):
    """A workload with its routing, if that comes from a file, and where from."""

    workload: Workload
    factor: float
    routing: tuple[Float32[np.ndarray, "T E"], BFloat16[np.ndarray, " E"]] | None
    blob_name: str
    source: str


def export(
    folder: str | Path,
    definition: Definition = definitions.DEFAULT,
    *,
    dataset: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes the data set; files of an earlier export are replaced, others left alone.

    All files are written beside those of the earlier export before the first one is replaced, so
    that a disk without room for them leaves the earlier export whole.

    Args:
        folder: Where to, created if missing. Nothing is written outside of it.
        definition: Of which.
        dataset: A flashinfer-trace folder with the real blobs; None draws stand-ins.
        seed: Of the stand-ins.
        overwrite: Replace workloads and blobs of an earlier export that are other ones.

    Returns:
        The folder.

    Raises:
        ValueError: `dataset` is broken (see `interop.dataset`) or given for a definition that has
            no published workloads, or is the folder itself, a symlink leads out of `folder`, or
            the folder holds traces, which are of what was exported before, or other workloads or
            blobs without `overwrite`, or lies in another data set, or another export or run writes
            into it.
        OSError: A file cannot be written; names it.
    """
    if dataset is not None and not definition.is_default:
        raise ValueError(f"--dataset: has workloads of {definitions.DEFAULT.name} only")
    root = Path(folder)
    with kept_if_used(root):  # nothing is left of an export that is refused
        with naming(root):
            root.mkdir(parents=True, exist_ok=True)
            root = root.resolve()
        with folder_lock.held(root):
            _write(root, definition, dataset, seed, overwrite)
    return root


def export_each(folder: str | Path, names: Sequence[str], **options: Any) -> list[Path]:
    """Writes a data set per definition, in a folder of its name: solutions' names are unique there.

    Args:
        folder: Where to.
        names: Of the definitions; "all" stands for all of them.
        options: As for `export`.

    Returns:
        The folders.

    Raises:
        ValueError: A name is unknown, or there is a data set for a definition that has no published
            workloads; then nothing has been written. Else as for `export`.
    """
    one_each = dict.fromkeys(names)
    chosen = definitions.ALL if "all" in one_each else tuple(map(definitions.get, one_each))
    others = [one.name for one in chosen if not one.is_default]
    if others and options.get("dataset") is not None:
        raise ValueError(
            f"--dataset: has workloads of {definitions.DEFAULT.name} only, got --definitions of "
            f"{', '.join(others)} too"
        )
    return [export(Path(folder) / one.name, one, **options) for one in chosen]


def _write(
    root: Path,
    definition: Definition,
    dataset: str | Path | None,
    seed: int,
    overwrite: bool,
) -> None:
    """`export` into a folder that exists."""
    for parent in root.parents:  # one there would be read as a part of that data set
        if all((parent / part).is_dir() for part in ("definitions", "workloads")):
            where = f"lies in the data set {shown(parent)}"
            raise ValueError(f"{shown(root)}: {where}; use another folder")
    if record.has_traces(root):
        raise ValueError(f"{shown(root)}: holds traces of an earlier export; use another folder")
    name, op_type = definition.name, definition.record["op_type"]
    if not definition.is_default:
        rows = _random(definition)
    else:
        rows = list(_drawn(seed)) if dataset is None else _copied(dataset, root)
    blobs = f"blob/workloads/{op_type}/{name}"
    files: dict[str, str | bytes] = {}
    for row in rows:
        if row.routing is not None:
            tensors = dict(zip(("routing_logits", "routing_bias"), row.routing, strict=True))
            content = safetensors.numpy.save(tensors, {"source": row.source})
            files[f"{blobs}/{row.blob_name}"] = content
    lines = (_workload_line(definition, row, f"./{blobs}/{row.blob_name}") for row in rows)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    files[f"workloads/{op_type}/{name}.jsonl"] = text
    if not overwrite:
        _refuse_others(root, files)
        _refuse_readme(root / "README.md")
    files[f"definitions/{op_type}/{name}.json"] = _json(_definition(definition))
    for one in solutions.records(definition):
        path = f"solutions/{one['author']}/{op_type}/{name}/{one['name']}.json"
        files[path] = _json(one)
    files["README.md"] = _readme(definition, rows)
    _write_all(root, files)


def _random(definition: Definition) -> list[_Row]:
    """Workloads whose inputs flashinfer-bench draws."""
    offset, factor = (
        definition.scalars[name] for name in ("local_expert_offset", "routed_scaling_factor")
    )
    return [
        _Row(Workload(f"T{tokens}", tokens, int(offset), ""), factor, None, "", "")
        for tokens in RANDOM_TOKENS
    ]


def _drawn(seed: int) -> Iterator[_Row]:
    for row in workloads():
        yield _Row(
            workload=row,
            factor=ROUTED_SCALING_FACTOR,
            routing=_draw(row, seed),
            blob_name=f"{STAND_IN}{row.uuid}.safetensors",
            source=f"stand-in drawn from captured moments, seed {seed}; not the published blob",
        )


def _draw(row: Workload, seed: int) -> tuple[Any, Any]:
    """The first draw with at least min(T, 2) local pairs: an empty layer would measure nothing."""
    num_local = definitions.DEFAULT.num_local_experts
    for attempt in range(_MAX_DRAWS):
        key = [seed, row.num_tokens, row.local_expert_offset, attempt]
        logits, bias = captured_routing(row.num_tokens, np.random.default_rng(key))
        local = topk_ids(logits, bias) - row.local_expert_offset
        if np.count_nonzero((local >= 0) & (local < num_local)) >= min(row.num_tokens, 2):
            return logits, bias
    raise RuntimeError(f"no draw with local pairs in {_MAX_DRAWS} attempts for {row}")


def _copied(dataset: str | Path, root: Path) -> list[_Row]:
    try:
        if data_set_root(dataset) == root:
            raise ValueError(f"expected another folder than the export's, got {shown(root)}")
        rows = [(row, read_routing(dataset, row)) for row in read_workloads(dataset)]
    except ValueError as error:
        raise ValueError(f"--dataset: {error}") from None
    copied = []
    for row, routing in rows:
        is_drawn = row.workload.blob.startswith(STAND_IN)
        what = "stand-ins, not the published blobs, " if is_drawn else ""
        copied.append(
            _Row(
                workload=row.workload,
                factor=row.routed_scaling_factor,
                routing=routing,
                blob_name=f"{STAND_IN if is_drawn else ''}{row.workload.uuid}.safetensors",
                source=f"{what}copied from the data set folder that was given to the export",
            )
        )
    return copied


def _workload_line(definition: Definition, row: _Row, blob: str) -> dict[str, Any]:
    scalars = {
        "local_expert_offset": row.workload.local_expert_offset,
        "routed_scaling_factor": row.factor,
    }
    inputs: dict[str, dict[str, Any]] = {}
    for name, kind in input_types(definition).items():
        inputs[name] = {"type": kind}
        if kind == "scalar":
            inputs[name]["value"] = scalars[name]
        elif kind == "safetensors":
            inputs[name] |= {"path": blob, "tensor_key": name}
    return {
        "definition": definition.name,
        "workload": {
            "uuid": row.workload.uuid,
            "axes": {"seq_len": row.workload.num_tokens},
            "inputs": inputs,
        },
        "solution": None,
        "evaluation": None,
    }


def _definition(definition: Definition) -> dict[str, Any]:
    router = "DeepSeek-V3" if definition.is_default else definition.router["scoring"]
    part = "one expert-parallel rank" if _is_rank(definition) else "all experts"
    return {
        **definition.record,
        "description": f"FP8 block-scaled MoE with {router} routing, {part}; "
        "the reference source is jax-moe's own, ties go to the lowest expert id",
        "reference": definition.reference(),
    }


def _is_rank(definition: Definition) -> bool:
    return definition.num_local_experts < definition.num_experts


def _readme(definition: Definition, rows: list[_Row]) -> str:
    sources = "; ".join(sorted({row.source for row in rows}))
    return "\n".join(
        (
            f"# {definition.name}",
            "",
            f"{_WRITTEN_BY} "
            + (
                f"Routing blobs: {sources}."
                if sources
                else f"Inputs and their order: {definition.source}. The workloads are jax-moe's "
                "own, their inputs drawn by flashinfer-bench."
            ),
            f"The weights take {definition.weight_bytes / 1e9:.1f} GB; flashinfer-bench holds a "
            "set per trial and clones one before each call.",
            "The solutions import the jax-moe packages: install them or put them on PYTHONPATH.",
            "",
        )
    )


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def _refuse_others(root: Path, files: Mapping[str, str | bytes]) -> None:
    """Refuses a folder in which one of these files is there with another content."""
    for relative, content in files.items():
        path = root / relative
        wanted = content.encode() if isinstance(content, str) else content
        with naming(path):
            is_another = path.is_file() and path.read_bytes() != wanted
        if is_another:
            raise ValueError(
                f"{shown(path)}: is of an export with another --seed or --dataset; "
                "--overwrite replaces it"
            )


def _refuse_readme(path: Path) -> None:
    """Refuses one that no export wrote: somebody's own folder, such as a checkout."""
    with naming(path):
        is_own = not path.is_file() or _WRITTEN_BY.encode() in path.read_bytes()
    if not is_own:
        raise ValueError(
            f"{shown(path)}: was not written by an export; use another folder, or --overwrite "
            "replaces it"
        )


def _write_all(root: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes files under a folder, or none of them if one does not fit."""
    for relative in files:
        confined(root, (root / relative).parent)
    with tempfile.TemporaryDirectory(dir=root, prefix=".export") as temporary:
        ready = [Path(temporary) / str(number) for number in range(len(files))]
        for path, (relative, content) in zip(ready, files.items(), strict=True):
            try:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            except OSError as error:  # a full disk's names no file
                raise OSError(error.errno, error.strerror, str(root / relative)) from None
        for path, relative in zip(ready, files, strict=True):
            (root / relative).parent.mkdir(parents=True, exist_ok=True)
            path.replace(root / relative)
