"""Measures the peak temporary memory of each exported solution on each workload, on a GPU.

flashinfer-bench does not measure memory. A PyTorch solution's figure is what its call allocated at
most beyond inputs and output; a JAX solution's is the temporary size of the compiled program, which
processes beside this one compile.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interop import definitions, folder_lock
from interop.dataset import DatasetWorkload, definition_of, read_routing, read_workloads
from interop.definitions import Definition
from interop.flashinfer_bench import solutions
from interop.processes import spawned
from interop.solutions import SOLUTIONS, packages
from jax_moe.io.files import data_set_root, read_object, write_atomically
from jax_moe.io.strict_json import check_fields

RECORD = "workspace.json"
MOST_PROCESSES = 8


def measure(folder: str | Path) -> Path:
    """Runs each solution once per workload and writes `workspace.json` into the folder.

    Args:
        folder: An exported data set.

    Returns:
        The file.

    Raises:
        ValueError: The folder is no data set, a solution cannot run here, or another export, run or
            measurement writes into the folder.
    """
    root = data_set_root(folder)
    definition = definition_of(root)
    rows = read_workloads(folder, definition)
    _check_machine(solutions.names(definition))
    with folder_lock.held(root):
        return _measure(folder, definition, rows)


def _measure(folder: str | Path, definition: Definition, rows: Sequence[DatasetWorkload]) -> Path:
    from tqdm import tqdm

    names = solutions.names(definition)
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    processes = min(MOST_PROCESSES, (os.cpu_count() or 1) // 2)
    with spawned(processes) as pool:
        compiling = {
            (name, row.workload.uuid): pool.submit(
                _jax_temporary, definition.name, name, row.workload.num_tokens
            )
            for name in found
            for row in reversed(rows)  # the largest take longest
            if name not in SOLUTIONS
        }
        here = [name for name in found if name in SOLUTIONS]  # of the default definition only
        weights = _zeros(("gemm1_weights", "gemm2_weights"), 0) if here else {}
        for row in tqdm(rows, desc="workspace"):
            arguments = _arguments(folder, row, weights) if here else []
            for name in found:
                uuid = row.workload.uuid
                found[name][uuid] = (
                    _torch_peak(name, arguments) if name in here else compiling[name, uuid].result()
                )
    path = Path(folder) / RECORD
    with write_atomically(path) as file:
        file.write(json.dumps(found, indent=1) + "\n")
    return path


def _check_machine(names: Sequence[str]) -> None:
    reasons = {name: SOLUTIONS[name].unavailable_reason() for name in names if name in SOLUTIONS}
    for name, reason in {"workspace": packages.hopper_unavailable(), **reasons}.items():
        if reason is not None:
            raise ValueError(f"{name}: {reason}")


def _zeros(names: tuple[str, ...], num_tokens: int) -> dict[str, Any]:
    """Zeros on the GPU for the named inputs: memory does not depend on values, routing aside."""
    import torch

    inputs, shapes = _inputs(definitions.DEFAULT), definitions.DEFAULT.shapes(num_tokens)
    return {
        name: torch.zeros(
            shapes[name],
            dtype=getattr(torch, inputs[name]["dtype"]),
            device="cuda",
        )
        for name in names
    }


def _arguments(folder: str | Path, row: DatasetWorkload, weights: dict[str, Any]) -> list[Any]:
    import torch

    logits, bias = read_routing(folder, row)
    given = {
        **weights,
        "routing_logits": torch.tensor(logits, device="cuda"),
        "routing_bias": torch.tensor(bias.astype("float32"), device="cuda").bfloat16(),
        "local_expert_offset": row.workload.local_expert_offset,
        "routed_scaling_factor": row.routed_scaling_factor,
    }
    inputs = _inputs(definitions.DEFAULT)
    given |= _zeros(tuple(name for name in inputs if name not in given), row.workload.num_tokens)
    return [given[name] for name in inputs]


def _inputs(definition: Definition) -> Mapping[str, Mapping[str, Any]]:
    return definition.record["inputs"]


def _torch_peak(name: str, arguments: list[Any]) -> int:
    import torch

    run = SOLUTIONS[name].run
    run(*arguments)  # whatever is loaded or compiled once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = run(*arguments)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - output.nbytes


def _jax_temporary(definition_name: str, name: str, num_tokens: int) -> int:
    import jax

    import jax_moe

    definition = definitions.get(definition_name)
    shapes = definition.shapes(num_tokens)
    specs = {
        name: jax.ShapeDtypeStruct(shapes[name], one["dtype"])
        for name, one in _inputs(definition).items()
    }
    constants: dict[str, Any] = {"routing_bias": None, **definition.scalars}
    layer: Any = jax_moe.apply
    apply = functools.partial(
        layer,
        backend="mosaic",
        precision=solutions.precision_of(name),
        config=jax_moe.MoEConfig(**definition.router),
        **{name: value for name, value in constants.items() if name not in specs},
    )
    analysis = jax.jit(apply).lower(**specs).compile().memory_analysis()
    if analysis is None:
        raise RuntimeError("this device reports no memory analysis")
    return analysis.temp_size_in_bytes


def read(folder: str | Path) -> Mapping[str, Mapping[str, int]]:
    """Reads `workspace.json`: solution -> workload uuid -> bytes; empty if it was not measured.

    Raises:
        ValueError: Malformed, or an unknown solution or workload.
    """
    root = data_set_root(folder)
    path = root / RECORD
    if not path.exists(follow_symlinks=False):
        return {}
    found = read_object(root, path)
    definition = definition_of(root)
    names = solutions.names(definition)
    uuids = tuple(row.workload.uuid for row in read_workloads(root, definition))
    check_fields(found, (), names, str(path))
    for name, sizes in found.items():
        check_fields(sizes, (), uuids, f"{path}: {name}")
        for uuid, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ValueError(f"{path}: {name}: {uuid}: expected a byte count, got {size!r}")
    return found
