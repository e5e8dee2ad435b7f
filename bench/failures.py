"""What went wrong, in one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jax_moe.io.files import shown


def one_line(error: Exception) -> str:
    """For a table: an exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


class FileError(Exception):
    """A file of the run cannot be written: one line that names it and says why."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an `OSError` of the body, such as a full disk's, into a `FileError` of `path`."""
    try:
        yield
    except OSError as error:
        raise FileError(unwritten(path, error)) from None


def unwritten(path: Path, error: OSError) -> str:
    """What is said of a file that cannot be written."""
    return f"{shown(path)}: cannot be written: {error.strerror or error}"
