"""Runs the examples of a document and compares what they print with what the document says.

    python tools/readme_examples.py README.md

An example is a `python` block that a `text` block follows. Each runs in a process of its own, in
the current folder and on a CPU.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from pallas_kernels import interruption


def examples(document: str) -> list[tuple[str, str]]:
    """Code and output of each example."""
    return re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", document, re.DOTALL)


def run(code: str, **environment: str) -> str:
    """What an example prints.

    Args:
        code: Of the example.
        **environment: Variables besides those of this process.

    Raises:
        RuntimeError: It fails; has what it wrote to standard error.
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def main(path: str) -> int:
    """Command line; 1 if an example prints something else, or there is none.

    Raises:
        SystemExit: There is no such document; names it.
    """
    try:
        found = examples(pathlib.Path(path).read_text())
    except (OSError, UnicodeError) as error:
        sys.exit(f"document: expected a Markdown file, got {path!r}: {error}")
    if not found:
        print(f"{path}: expected a `python` block that a `text` block follows, got none")
        return 1
    for number, (code, expected) in enumerate(found, 1):
        try:
            printed = run(code)
        except RuntimeError as error:
            print(f"{path}: example {number} fails:\n{error}")
            return 1
        if printed.strip() != expected.strip():
            print(f"{path}: example {number} prints {printed!r}, not {expected!r}")
            return 1
    print(f"{path}: {len(found)} examples print what it says")
    return 0


def command() -> int:
    """`main`, with its arguments from the command line."""
    parser = argparse.ArgumentParser(prog="python tools/readme_examples.py")
    parser.add_argument("document", help="a Markdown file")
    return main(parser.parse_args().document)


if __name__ == "__main__":
    interruption.exit_with(command)
