"""A folder or a file that one process at a time writes."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jax_moe.io.files import naming, shown

_NAME = ".lock"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, a file `.lock` in it that goes with the lock.

    The system frees it with the process, however that ends: a file that is left over locks nobody
    out.

    Args:
        folder: It must exist.

    Raises:
        ValueError: Another process holds it, or the file cannot be written.
    """
    refusal = f"{shown(folder)}: another run is writing here; use another folder"
    with _held(folder / _NAME, refusal):
        yield


@contextlib.contextmanager
def file_held(file: Path) -> Iterator[None]:
    """`held` of a file alone, by `.NAME.lock` beside it.

    Args:
        file: It may not be there; its folder must exist.

    Raises:
        ValueError: Another process holds it, or the lock cannot be written.
    """
    refusal = f"{shown(file)}: another run is writing this file; use another one"
    with _held(file.with_name(f".{file.name}{_NAME}"), refusal):
        yield


@contextlib.contextmanager
def _held(path: Path, refusal: str) -> Iterator[None]:
    with naming(path):
        file = _locked(path)
    if file is None:
        raise ValueError(refusal)
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> IO[bytes] | None:
    """The locked file, or None if another process has it."""
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        # Its former holder may have removed the file between the two lines above.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
