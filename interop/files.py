"""Files: atomic writes, and reads that stay inside a folder."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

MAX_FILE_BYTES = 2**31


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
    resolved = path.resolve()
    if not resolved.is_relative_to(root):
        raise ValueError(f"{path}: leads out of the data set folder")
    if not resolved.is_file():
        raise ValueError(f"{path}: no such file in the data set")
    if resolved.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: {resolved.stat().st_size} bytes, more than {MAX_FILE_BYTES}")
    return resolved


@contextmanager
def write_atomically(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` and renames it over `path` on success.

    Args:
        path: the file to replace; its folder must exist.
        mode: "w" (UTF-8 text) or "wb".

    Yields:
        The open temporary file. An exception inside leaves `path` as it was.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
