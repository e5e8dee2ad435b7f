"""Which commit of this project runs."""

import os
import subprocess
from pathlib import Path


def git_commit(folder: Path | None = None) -> str:
    """The commit that `GIT_COMMIT` names, else this checkout's, "-dirty" if tracked files differ.

    The variable is for copies, whose history is missing or older than their files.
    """
    if named := os.environ.get("GIT_COMMIT"):
        return named
    root = folder or Path(__file__).resolve().parent.parent
    commit = output_of("git", "-C", str(root), "rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    changed = output_of("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def output_of(*command: str) -> str | None:
    """What a command prints, stripped; None if it is missing, fails or takes 20 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
