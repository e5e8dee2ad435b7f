"""The folder of `bench.parallel_gpus`: it holds one run, to which calls may add steps.

A step is added to what is there if it has no results yet and everything that its figures depend on
is the same. Whatever else would mix two runs is refused.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import environment, parallel_rows, step_record
from bench.parallel_documents import STEM
from bench.run_folder import make, refuse_others
from interop import folder_lock
from jax_moe.io.files import naming, shown

ASIDE = ".earlier"  # what --overwrite replaces lies there until a new step has results
_MOVING = ".moving"  # and here while it is on its way there or back
_OF_A_STEP = (".json", ".json.gz", ".log", ".asks", "/parallel.json", "/parallel.png")
_OF_THE_RUN = (step_record.RECORD, f"{STEM}.json", f"{STEM}.md", f"{STEM}.png")


def results_in(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The files of results that are there, by step.

    Args:
        folder: Of the run.
        names: Of the steps.
    """
    paths = {name: (folder / f"{name}.json", folder / name / "parallel.json") for name in names}
    return {name: path for name in names for path in paths[name] if path.is_file()}


def holds_a_run(folder: Path, names: Sequence[str]) -> bool:
    """Whether there is anything to make a document of."""
    with naming(folder):
        others = (folder / step_record.RECORD, folder / f"{STEM}.json")
        return bool(results_in(folder, names)) or any(path.is_file() for path in others)


@contextlib.contextmanager
def held(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Holds the lock of a folder that is there; what `--overwrite` left half done is settled.

    Args:
        folder: Of the run.
        names: Of all steps there are.

    Raises:
        ValueError: Another process writes there.
    """
    with folder_lock.held(folder):
        _settle(folder, names)
        yield


@contextlib.contextmanager
def opened(
    folder: Path,
    wanted: Sequence[str],
    names: Sequence[str],
    ranks: int | None,
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[list[str]]:
    """Makes or finds the folder and holds its lock.

    Args:
        folder: Of the run.
        wanted: Steps that are to be measured.
        names: Of all steps there are.
        ranks: How many devices; None means all GPUs.
        resume: Leave out those that have ended well, and measure the others again.
        overwrite: Replace the run in it, which stays until a new step has results.

    Yields:
        The steps that are left to be measured.

    Raises:
        ValueError: It cannot be used, another process writes there, or it holds results that the
            steps would replace or that were measured otherwise.
    """
    make("--output", folder)
    refuse_others(folder, _OF_THE_RUN)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(folder, names))
            step_record.refuse_others(folder, names)
            left = list(wanted)
            if not overwrite:
                earlier = results_in(folder, names)
                record = step_record.read(folder)
                ended = {
                    name
                    for name in earlier
                    if record.get(name, {"state": step_record.OK})["state"] == step_record.OK
                }
                left = [name for name in wanted if not (resume and name in ended)]
                _check(folder, left, earlier, ranks, resume=resume)
                _remove(folder, left, ())
        except ValueError as error:
            raise ValueError(f"--output: {error}") from None
        if overwrite:
            _move(folder, folder / _MOVING, names)
            (folder / _MOVING).rename(folder / ASIDE)
            stack.callback(_settle, folder, names)
        yield left


def _check(
    folder: Path,
    wanted: Sequence[str],
    earlier: dict[str, Path],
    ranks: int | None,
    *,
    resume: bool,
) -> None:
    again = [] if resume else [name for name in wanted if name in earlier]
    if again:
        raise ValueError(
            f"{shown(folder)} holds {', '.join(again)} of an earlier run; --resume measures what "
            "has not ended well, --overwrite replaces it"
        )
    alone = (folder / f"{STEM}.json").exists() and not (folder / step_record.RECORD).exists()
    if alone and not earlier:  # kept without the files of its steps
        raise ValueError(
            f"{shown(folder)} holds {STEM}.json of an earlier run; --overwrite replaces it"
        )
    here = _settings_here(ranks) if earlier else {}
    for name, path in earlier.items():
        there = _settings_of(parallel_rows.read_as(lambda row: row, path)[1])
        for what, value in here.items():
            if there[what] != value:
                raise ValueError(
                    f"{shown(folder)} holds {name} of an earlier run, with {what} {there[what]}, "
                    f"got {value}; --overwrite replaces it"
                )


def _settings_of(about: dict[str, Any]) -> dict[str, str]:
    """What the figures of a step depend on."""
    gpu = about.get("gpu_state") or {}
    return {
        "ranks": str(parallel_rows.ranks_of(about) or 0),
        "GPU": gpu.get("name", "none"),
        "commit": str(about.get("git_commit")),
        "versions": _in_words(about.get("versions") or {}),
    }


def _settings_here(ranks: int | None) -> dict[str, str]:
    """The same of steps to come; JAX is not asked, which would take memory of the GPUs."""
    gpu = environment.gpu_state() or {}
    return {
        "ranks": str(ranks or num_devices()),
        "GPU": gpu.get("name", "none"),
        "commit": str(environment.git_commit()),
        "versions": _in_words(environment.versions()),
    }


def _in_words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def num_devices() -> int:
    """All GPUs, or two CPU devices; JAX is not asked."""
    if not environment.has_gpu_driver():
        return 2
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    listed = environment.output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return len((listed or "").splitlines())


def _files(names: Sequence[str], others: Sequence[str]) -> list[str]:
    return [f"{name}{ending}" for name in names for ending in _OF_A_STEP] + list(others)


def _remove(folder: Path, names: Sequence[str], others: Sequence[str] = _OF_THE_RUN) -> None:
    """Removes the files of steps, and others, and the steps' own folders if nothing is left."""
    with naming(folder):
        for name in _files(names, others):
            # NotADirectoryError: what is there is no folder of a step.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (folder / name).unlink()
        for name in names:
            with contextlib.suppress(OSError):  # not there, or something of the user's is in it
                (folder / name).rmdir()


def _move(source: Path, target: Path, names: Sequence[str]) -> None:
    """Moves the files of a run."""
    with naming(target):
        target.mkdir(exist_ok=True)
        for name in _files(names, _OF_THE_RUN):
            if (source / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).replace(target / name)
    _remove(source, names)


def _settle(folder: Path, names: Sequence[str]) -> None:
    """Drops the run that `--overwrite` replaces, or brings it back if there is no new result."""
    aside, moving = folder / ASIDE, folder / _MOVING
    if aside.is_dir():
        if results_in(folder, names):
            shutil.rmtree(aside)
        else:
            _remove(folder, names)
            aside.rename(moving)
    if moving.is_dir():  # the move was cut off, or begins: what is there belongs to the folder
        _move(moving, folder, names)
        shutil.rmtree(moving)
