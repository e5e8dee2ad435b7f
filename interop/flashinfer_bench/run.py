"""Runs flashinfer-bench's own command on an exported folder and records how it was called."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import interop
from interop import folder_lock
from interop.checkout import git_commit
from interop.dataset import DatasetWorkload, definition_of, read_workloads
from interop.definitions import Definition
from interop.flashinfer_bench import record, solutions
from interop.flashinfer_bench.record import PUBLISHED, Settings
from interop.flashinfer_bench.traces import read_solutions, workload_lines
from interop.solutions import packages
from jax_moe.io.files import confined, confined_file, confined_files, data_set_root, shown

_CLI = """import sys
from flashinfer_bench.cli.main import cli
sys.argv[0] = "flashinfer-bench"
cli()
"""


def run(
    folder: str | Path,
    settings: Settings = PUBLISHED,
    *,
    tokens: Sequence[int] = (),
    chosen: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> int:
    """Runs the folder's solutions; the benchmark appends its traces to the folder.

    The benchmark writes its traces when all workloads are done. `tokens` runs only the workloads
    with these token counts, so that a long run can be cut into pieces.

    Args:
        folder: An exported data set.
        settings: What to pass to the command.
        tokens: Token counts to run; none means all.
        chosen: Names of solutions to run; none means all that FP8's tolerances are for, so all
            but `solutions.HIGH`.
        extra: More arguments for the command, such as `--use-isolated-runner`.

    Returns:
        The command's exit status.

    Raises:
        ValueError: flashinfer-bench is not installed, there is no Hopper GPU, the folder is no data
            set, a solution does not fit or is unknown, a file leads out of the folder, no workload
            has these token counts, another run writes into the folder, or it holds traces of
            another command, other settings or other versions. Nothing has been written then.
    """
    root = data_set_root(folder)
    _names(definition_of(root), chosen)  # refused first: this needs no other package, no GPU
    if not _is_installed():
        raise ValueError("flashinfer-bench is not installed: pip install '.[peers]' in a checkout")
    if reason := packages.hopper_unavailable():
        raise ValueError(f"run: {reason}")
    with folder_lock.held(root):
        return _run(root, settings, tokens, chosen, extra)


def _is_installed() -> bool:
    return importlib.util.find_spec("flashinfer_bench") is not None


def _run(
    root: Path,
    settings: Settings,
    tokens: Sequence[int],
    chosen: Sequence[str],
    extra: Sequence[str],
) -> int:
    definition = definition_of(root)
    options = ["--solutions", *_names(definition, chosen), *_options(settings), *extra]
    rows = read_workloads(root, definition)
    _check_folder(root, definition, rows)
    if tokens:
        rows = tuple(row for row in rows if row.workload.num_tokens in tokens)
        if not rows:
            raise ValueError(f"--tokens: no workload of {shown(root)} has one of {sorted(tokens)}")
    called = {
        "command": shlex.join(_command(Path("DIR"), definition, options)),
        "settings": settings._asdict(),
        "versions": _versions(),
    }
    record.keep(root, called)
    with tempfile.TemporaryDirectory() as scratch:
        uuids = {row.workload.uuid for row in rows}
        view = _view(root, definition, Path(scratch), uuids) if tokens else root
        command = _command(view, definition, options)
        arguments = [sys.executable, "-c", _CLI]
        environment = _environment(root)
        return subprocess.run(arguments + command[1:], env=environment, check=False).returncode


def _check_folder(root: Path, definition: Definition, rows: Sequence[DatasetWorkload]) -> None:
    """Refuses what would make the benchmark read, run or write something outside of the folder."""
    read_solutions(root)
    name, op_type = definition.name, definition.record["op_type"]
    read = {"definitions": "*.json", "workloads": "*.jsonl", "solutions": "*.json"}
    for folder, pattern in {**read, "traces": "*.jsonl"}.items():
        for path in confined_files(root, folder, pattern):
            confined_file(root, path)
    blobs = [ref.path for row in rows for ref in row.blobs.values()]
    for relative in (f"traces/{op_type}/{name}.jsonl", "blob", ".cache/jax", *blobs):
        confined(root, root / relative)


def _names(definition: Definition, chosen: Sequence[str]) -> list[str]:
    """The solutions to run, in the exported order."""
    known = solutions.names(definition)
    for name in chosen:
        if name not in known:
            raise ValueError(f"--solutions: expected some of {', '.join(known)}, got {name!r}")
    return [name for name in known if (name in chosen if chosen else name != solutions.HIGH)]


def _options(settings: Settings) -> list[str]:
    return [
        text
        for field, value in settings._asdict().items()
        for text in (f"--{field.replace('_', '-')}", str(value))
    ]


def _command(folder: Path, definition: Definition, options: Sequence[str]) -> list[str]:
    selection = ["--local", str(folder), "--definitions", definition.name]
    return ["flashinfer-bench", "run", *selection, *options]


def _environment(root: Path) -> dict[str, str]:
    """Solutions import our packages, JAX leaves memory to PyTorch, caches stay in the folder."""
    ours = str(Path(next(iter(interop.__path__))).parent)
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "FIB_CACHE_PATH": str(root / ".cache"),
        "JAX_COMPILATION_CACHE_DIR": str(root / ".cache" / "jax"),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH")))),
    }


def _view(root: Path, definition: Definition, view: Path, uuids: set[str]) -> Path:
    """A folder that shows the data set with some workloads only; its traces are the data set's."""
    (root / "traces").mkdir(exist_ok=True)
    for name in ("definitions", "solutions", "blob", "traces"):
        (view / name).symlink_to(root / name, target_is_directory=True)
    lines = (line for _, line in workload_lines(root))
    kept = [json.dumps(line) + "\n" for line in lines if line["workload"]["uuid"] in uuids]
    copy = view / "workloads" / definition.record["op_type"] / f"{definition.name}.jsonl"
    copy.parent.mkdir(parents=True)
    copy.write_text("".join(kept), "utf-8")
    return view


def _versions() -> dict[str, str]:
    names = ("jax", "torch", "triton", "flashinfer-bench")
    found = {name: _version(name) for name in names} | {"jax-moe": git_commit()}
    return {name: version for name, version in found.items() if version}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
