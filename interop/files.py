"""Files: atomic writes, and reads that stay inside a folder."""

from pathlib import Path

from pallas_kernels.files import write_atomically

__all__ = ["MAX_FILE_BYTES", "confined_file", "write_atomically"]

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
