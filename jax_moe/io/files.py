"""Files: atomic writes, and reads of folders that nobody vouches for, which stay inside them.

Whatever a path holds (NUL, lone surrogates, a name too long, a symlink that leads to itself) and
whatever reading it runs into is a `ValueError` that names the path.
"""

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jax_moe.io.strict_json import parse_object
from pallas_kernels.files import kind as kind
from pallas_kernels.files import write_atomically

__all__ = [
    "MAX_FILE_BYTES",
    "confined",
    "confined_file",
    "confined_files",
    "data_set_root",
    "folder_name",
    "found_at",
    "kind",
    "naming",
    "parse_utf8",
    "read_bytes",
    "read_lines",
    "read_object",
    "shown",
    "write_atomically",
]

MAX_FILE_BYTES = 2**31
_MAX_SHOWN = 1024


def shown(path: str | os.PathLike[str]) -> str:
    """A path for an error of one line: as it is if that prints, else quoted; shortened if long."""
    text = os.fspath(path)
    if len(text) > _MAX_SHOWN:
        text = f"{text[: _MAX_SHOWN // 2]}...{text[-_MAX_SHOWN // 2 :]}"
    return text if text.isprintable() else ascii(text)


def folder_name(name: str, value: Any) -> str:
    """A folder that a caller names, as text; it need not exist.

    Args:
        name: The argument's.
        value: What the caller passed.

    Returns:
        The path.

    Raises:
        TypeError: It is no path of text.
        ValueError: It is empty, or holds what no name can: a NUL, a lone surrogate.
    """
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str):
        raise TypeError(f"{name}: expected a path, got {type(value).__name__}")
    if not path:
        raise ValueError(f"{name}: expected a path, got an empty one")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise ValueError(f"{name}: expected a path, got {shown(path)}, which no file can be called")
    return path


def found_at(path: str | os.PathLike[str]) -> str:
    """What is at a path, for errors: "a file"."""
    try:
        return kind(os.stat(path).st_mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that loops"
        return "a link to nothing" if os.path.islink(path) else "nothing"
    except ValueError:  # a NUL in the path
        return "nothing"


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what touching a path raises into a `ValueError` that names it.

    Args:
        path: The path, as it was named.

    Raises:
        ValueError: The body raised OSError, ValueError or RuntimeError, which is what pathlib
            raises on a symlink loop (up to Python 3.12).
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        if isinstance(error, FileExistsError):  # of a folder that was to be made
            reason = f"expected a folder, got {found_at(path)}"
        raise ValueError(f"{shown(path)}: cannot be used: {reason or error}") from None


@contextmanager
def kept_if_used(folder: Path | None) -> Iterator[None]:
    """Makes a folder, with its parents, and removes those of them that are new and empty after.

    Args:
        folder: Where it cannot be made nothing is said: what the body writes there will. None is
            no folder.
    """
    made = []
    if folder is not None:
        made = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for one in made:
                one.rmdir()


def data_set_root(folder: str | os.PathLike[str]) -> Path:
    """Resolves the root of a data set.

    Args:
        folder: The root, as it was named.

    Returns:
        The resolved path.

    Raises:
        ValueError: It is no folder.
    """
    with naming(folder):
        root = Path(folder).resolve()
        is_folder = root.is_dir()
    if not is_folder:
        raise ValueError(f"{shown(folder)}: not a data set folder")
    return root


def confined(root: Path, path: Path) -> Path:
    """Resolves a path that must lie in a folder, symlinks followed; it need not exist.

    Args:
        root: The folder, resolved.
        path: The path, as it was named.

    Returns:
        The resolved path.

    Raises:
        ValueError: It leads out of the folder or cannot be resolved.
    """
    with naming(path):
        resolved = path.resolve()
    if not resolved.is_relative_to(root):
        raise ValueError(f"{shown(path)}: leads out of the data set folder")
    return resolved


def confined_file(root: Path, path: Path) -> Path:
    """Resolves the path of a file that must lie in a folder, symlinks followed.

    Args:
        root: The folder, resolved.
        path: The file, as it was named.

    Returns:
        The resolved path.

    Raises:
        ValueError: It leads out of the folder, is no file, or is larger than `MAX_FILE_BYTES`.
    """
    resolved = confined(root, path)
    with naming(path):
        size = resolved.stat().st_size if resolved.is_file() else None
    if size is None:
        raise ValueError(f"{shown(path)}: no such file in the data set")
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{shown(path)}: {size} bytes, more than {MAX_FILE_BYTES}")
    return resolved


def confined_files(root: Path, folder: str, pattern: str) -> list[Path]:
    """Lists the files below a folder of a data set; folders that are symlinks are not entered.

    Args:
        root: The data set, resolved.
        folder: Its folder. It may be a symlink within the data set.
        pattern: Of the files' names, such as "*.json".

    Returns:
        The paths, sorted; they may be symlinks and lead anywhere. Empty if there is no folder.

    Raises:
        ValueError: The folder leads out of the data set: nothing there is listed.
    """
    start = confined(root, root / folder)
    with naming(root / folder):
        return sorted(start.glob(f"**/{pattern}"))


def read_bytes(root: Path, path: Path) -> bytes:
    """Reads a file that must lie in a folder; arguments and errors as for `confined_file`."""
    resolved = confined_file(root, path)
    with naming(path):
        return resolved.read_bytes()


def read_object(root: Path, path: Path) -> dict[str, Any]:
    """Reads a file of one JSON object, with the errors of `confined_file` and `parse_utf8`."""
    return parse_utf8(read_bytes(root, path), shown(path))


def read_lines(root: Path, path: Path, max_bytes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a file of one JSON object a line; empty lines are skipped.

    Args:
        root: The folder in which the file must lie, resolved.
        path: The file, as it was named.
        max_bytes: What a line may hold.

    Yields:
        "file:line" for errors, and the object.

    Raises:
        ValueError: As for `confined_file` and `parse_utf8`, or a line is too long.
    """
    resolved = confined_file(root, path)
    with naming(path):
        file = resolved.open("rb")
    with file:
        for number in itertools.count(1):
            with naming(path):
                line = file.readline(max_bytes + 1)
            if not line:
                return
            where = f"{shown(path)}:{number}"
            if len(line) > max_bytes:
                raise ValueError(f"{where}: line longer than {max_bytes} bytes")
            if line.strip():
                yield where, parse_utf8(line, where)


def parse_utf8(content: bytes, where: str) -> dict[str, Any]:
    """`parse_object` of UTF-8 and nothing else: `json.loads` would guess UTF-16 and UTF-32.

    Args:
        content: The object.
        where: What to call it in errors.

    Returns:
        The object.

    Raises:
        ValueError: Not UTF-8, or refused by `parse_object`.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not valid JSON: expected UTF-8, got other bytes: {error}"
        ) from None
    return parse_object(text, where)
