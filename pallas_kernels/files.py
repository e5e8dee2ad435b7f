"""Files that a user's machine keeps: where, and how they are replaced."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def cache_folder() -> Path:
    """`jax_moe` in the user's cache folder: `XDG_CACHE_HOME` if that is absolute, else `~/.cache`.

    Raises:
        RuntimeError: The user has no home folder.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "jax_moe"


def kind(mode: int) -> str:
    """What a file is by the mode that the system tells, for errors: "a folder"."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
    return kinds.get(stat.S_IFMT(mode), "a link, socket or device")


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
