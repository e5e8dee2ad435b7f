"""Which commit of this project runs."""

import functools
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

_OF_A_HOOK = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
)


def git_commit(folder: Path | None = None) -> str:
    """The commit of a checkout, "-dirty" if tracked files differ, or "unknown".

    Args:
        folder: Of the checkout; None is the one whose code runs. That one's commit is what
            `GIT_COMMIT` names, if set: for copies, whose history is missing or older than their
            files.
    """
    here = Path(__file__).resolve().parent.parent
    root = here if folder is None else folder.resolve()
    if root == here and (named := os.environ.get("GIT_COMMIT")):
        return named
    # Within a hook git sets variables that name the hook's repository.
    ours = {name: value for name, value in os.environ.items() if name not in _OF_A_HOOK}
    git = functools.partial(output_of, "git", "-C", str(root), environ=ours)
    if git("rev-parse", "--show-prefix") != "":
        return "unknown"  # no repository, or files of ours that lie within another one
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def output_of(*command: str, environ: Mapping[str, str] | None = None) -> str | None:
    """What a command prints, stripped; None if it is missing, fails or takes 20 s."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, env=environ
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
