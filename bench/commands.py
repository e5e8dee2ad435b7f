"""What the commands of this package share.

A command that measures for minutes makes the folder of its results first, so that nothing is
measured that cannot be written.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import run_folder
from bench.failures import FileError
from interop.arguments import folder_name as folder_name
from jax_moe.io.files import kept_if_used, naming, shown


def folder(text: str) -> Path:
    """The type of an argument that is a folder to write into; it is made, with its parents."""
    path = folder_name(text)
    try:
        run_folder.make_writable(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def usable(text: str) -> Path:
    """`folder` that leaves nothing: it is made once the command is known to be able to run."""
    path = folder_name(text)
    with kept_if_used(path):
        folder(text)
    return path


def file(text: str) -> Path:
    """The type of an argument that is a file to write, in a folder that exists."""
    if not text:
        raise argparse.ArgumentTypeError("expected a file, got an empty name")
    try:
        path = folder_name(text)
        with naming(path):
            is_folder, has_folder = path.is_dir(), path.parent.is_dir()
            is_other = os.path.lexists(path) and (path.is_symlink() or not path.is_file())
        if is_folder:
            raise ValueError(f"expected a file, got the folder {shown(path)}")
        if is_other:  # it would be replaced, and not what it leads to
            raise ValueError(f"expected a file, got the link, socket or device {shown(path)}")
        if not has_folder:
            raise ValueError(f"expected a path in a folder that exists, got {shown(path)}")
        run_folder.make_writable(path.parent)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`; its help begins with the first line of the docstring."""
    summary = (doc or "").partition("\n")[0]
    return argparse.ArgumentParser(prog=f"python -m {module}", description=summary)


def add_output(parser: argparse.ArgumentParser, root: str) -> None:
    """Adds the arguments that `results` takes."""
    parser.add_argument(
        "--output", type=usable, help=f"folder; default: one per run in {root}, linked as latest"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that --output holds"
    )


@contextlib.contextmanager
def shown_if_cut_short(table: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Prints what was measured before the body's `FileError`, Ctrl-C or SIGTERM ends the command.

    Args:
        table: The lines, the first of them a title.
    """
    try:
        yield
    except (FileError, KeyboardInterrupt):
        if len(lines := table()) > 1:
            print("\n".join(lines), flush=True)
        raise


@contextlib.contextmanager
def results(
    output: Path | None, root: str, files: tuple[str, ...], *, overwrite: bool = False
) -> Iterator[Path]:
    """The folder of a command's results: of one run, and one process at a time writes there.

    Args:
        output: The folder that was asked for; None makes one in `root`, named by the time.
        root: Of runs without `output`.
        files: All that the command writes, its JSON first.
        overwrite: Replace the run in `output`. It stays until the command writes its first rows,
            which removes or replaces what was made of the earlier ones.

    Yields:
        The folder.

    Raises:
        ValueError: It cannot be used, holds a run, or another process writes into it.
        SystemExit: A file cannot be written, as on a full disk; one line names it.
    """
    stem = files[0].removesuffix(".json")
    with run_folder.opened(
        output, stem=stem, overwrite=overwrite, root=Path(root), files=files
    ) as found:
        path = found.path / files[0]
        before = _stamp(path)
        try:
            yield found.path
        except FileError as error:
            sys.exit(str(error))
        except KeyboardInterrupt:
            if _stamp(path) not in (None, before):
                print(f"what was finished is in {shown(path)}", flush=True)
            raise
        finally:
            if output is None and path.exists():
                found.begin()  # `latest` leads there


def _stamp(path: Path) -> tuple[int, int] | None:
    """Another one once the file has been replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
