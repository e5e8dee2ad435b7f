"""Files that a user's machine keeps: where, and how they are replaced."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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

    Raises:
        OSError: It cannot be written; names a file, which a full disk's error does not.
    """
    target = Path(path)
    # Not of `tempfile`, which makes files private: this one has the mode that the umask leaves.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, f"x{mode[1:]}", encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
