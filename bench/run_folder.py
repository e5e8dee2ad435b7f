"""The folder of a run: it holds the files of one run, and one process at a time writes there."""

import contextlib
import datetime
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from interop import folder_lock
from jax_moe.io.files import kept_if_used, naming, shown

ROOT = Path("out/bench")  # of runs without --output
LATEST = "latest"
STEMS = ("results", "scaling")
REPORT = "comparison_report"
_FILES = (
    *(f"{stem}{ending}" for stem in STEMS for ending in (".json", ".md", ".png", "_breakdown.md")),
    *(f"{REPORT}{ending}" for ending in (".md", ".png")),
)
_COMMANDS = (
    *("layers", "loading", "options", "parallel", "parallel_gpus", "shared_expert"),
    *("fuzz", "times", "ladder", "sanitize", "summary"),  # tests.fuzz, tools, examples.ladder
)
_RESULTS = tuple(f"{stem}.json" for stem in (*STEMS, *_COMMANDS))  # of any command


class RunFolder(NamedTuple):
    """Where a run writes.

    Attributes:
        path: The folder.
        note: What a reader of the run's output should know about it; None if nothing.
        begin: To be called before the run's first file is written there, and not earlier: the
            files of an earlier run go, and `latest` leads here. Until then nothing is lost.
    """

    path: Path
    note: str | None
    begin: Callable[[], None]


@contextlib.contextmanager
def opened(
    output: Path | None,
    *,
    stem: str,
    resume: bool = False,
    overwrite: bool = False,
    root: Path | None = None,
    files: Sequence[str] = _FILES,
) -> Iterator[RunFolder]:
    """Makes or finds the folder of a run and holds its lock.

    A folder that was made here and into which nothing was written goes again.

    Args:
        output: The folder that was asked for; None makes one in `root`, named by the time.
        stem: Of the result files, one of `STEMS`.
        resume: Go on with the run in the folder; without `output` with the latest one.
        overwrite: Replace the run in `output`.
        root: Of runs without `output`; None is `out/bench`.
        files: All that such a run writes.

    Yields:
        The folder. When `resume` found a run there, its `STEM.json` exists.

    Raises:
        ValueError: The folder cannot be used, holds a run that neither flag speaks of, or another
            process writes into it.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other")
    if overwrite and output is None:
        raise ValueError("--overwrite: goes with --output=FOLDER; other runs get folders of theirs")
    root = ROOT if root is None else root
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_if_used(root if output is None else output))
        path = _existing_or_new(output, resume, root)
        if output is None:
            stack.callback(_remove_if_empty, path)
        stack.enter_context(_locked(path))
        earlier = files_of_a_run(path, files)
        refuse_others(path, files)
        note = _note(path, earlier, stem, output) if resume else None
        if earlier and not (resume or overwrite):
            is_its_own = files is _FILES and f"{stem}.json" in earlier
            goes_on = "--resume goes on with it, " if is_its_own else ""
            raise ValueError(
                f"--output: {shown(path)} holds {', '.join(earlier)} of an earlier run; "
                f"{goes_on}--overwrite replaces it"
            )
        link = path.parent / LATEST if output is None else None
        yield RunFolder(path, note, lambda: _begin(path, earlier, f"{stem}.json", link))


def refuse_others(folder: Path, files: Sequence[str], flag: str = "--output") -> None:
    """Raises `ValueError` if a folder holds results that are not among the `files` of a command."""
    if others := files_of_a_run(folder, [one for one in _RESULTS if one not in files]):
        raise ValueError(
            f"{flag}: {shown(folder)} holds {', '.join(others)} of another command; "
            "expected a folder of its own"
        )


def make(flag: str, folder: Path) -> None:
    """Makes a folder and writes to it, so that a run does not fail on it when it is measured.

    Args:
        flag: What asks for it, for errors.
        folder: Its parents are made, too.

    Raises:
        ValueError: It cannot be used.
    """
    try:
        make_writable(folder)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def make_writable(folder: Path) -> None:
    """`make` for a caller that says itself what asks for the folder."""
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folder_lock.held(path))
        except ValueError as error:
            raise ValueError(f"--output: {error}") from None
        yield


def files_of_a_run(folder: Path, files: Sequence[str] = _FILES) -> list[str]:
    """Names of the files in a folder that a run writes."""
    with naming(folder):
        return [name for name in files if (folder / name).exists(follow_symlinks=False)]


def _existing_or_new(output: Path | None, resume: bool, root: Path) -> Path:
    if output is not None:
        make("--output", output)
        return output
    try:
        latest = root / LATEST
        if resume and latest.is_dir():
            return latest.resolve()
        with naming(root):
            root.mkdir(parents=True, exist_ok=True)
            return _made_by_time(root)
    except ValueError as error:
        raise ValueError(f"--output: {error}") from None


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # somebody wrote into it, which is usual
        folder.rmdir()


def _made_by_time(root: Path) -> Path:
    name = datetime.datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    for count in range(1, 1000):
        path = root / (name if count == 1 else f"{name}_{count}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise ValueError(f"{shown(root)}: a thousand runs started in one second")


def _note(path: Path, earlier: Sequence[str], stem: str, output: Path | None) -> str:
    runs = [name for name in earlier if name in _RESULTS]
    if len(runs) > 1:  # put together by hand; the other one would go
        raise ValueError(f"--resume: {shown(path)} holds {' and '.join(runs)}, expected one run")
    if f"{stem}.json" in earlier:
        return f"going on with {shown(path / f'{stem}.json')}"
    if earlier:
        raise ValueError(
            f"--resume: {shown(path)} holds {', '.join(earlier)}, but no {stem}.json to go on with"
        )
    return (
        f"--resume: no earlier run in {shown(output or ROOT)}; this one starts from the first row"
    )


def _begin(path: Path, earlier: Sequence[str], results: str, link: Path | None) -> None:
    # The results go last, replaced by the write that follows: documents can be made from them.
    for name in earlier:
        if name != results:
            (path / name).unlink(missing_ok=True)
    if link is not None and link.resolve() != path.resolve():
        _lead(link, path.name)


def _lead(link: Path, target: str) -> None:
    """Makes a symlink or moves it in one step; what is no link is somebody's own and stays."""
    if link.exists(follow_symlinks=False) and not link.is_symlink():
        return
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    with contextlib.suppress(OSError):  # a file system without links: the folder has its name
        fresh.symlink_to(target, target_is_directory=True)
        fresh.replace(link)
