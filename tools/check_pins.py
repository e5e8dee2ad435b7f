"""Says whether this interpreter holds what pyproject.toml asks for; installs and downloads nothing.

    python tools/check_pins.py [--extras triton,dev] [--also jax==0.11.2] [--deep]

Prints one line for each package that is missing or outside its range, and exits with 1 if there
are any. `--deep` also follows the requirements of the packages found.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import pathlib
import sys
from collections.abc import Iterator

try:
    import tomllib

    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name
except ImportError as error:
    running = f"Python {sys.version.split()[0]} of {sys.executable}"
    sys.exit(f"needs Python 3.12 or newer with the package 'packaging'; {running}: {error}")

PYPROJECT = pathlib.Path(__file__).parent.parent / "pyproject.toml"


def project_requirements(extras: list[str]) -> list[str]:
    """The project's own requirements, with those of `extras`.

    Raises:
      SystemExit: pyproject.toml knows no such extra.
    """
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    optional = project["optional-dependencies"]
    for extra in extras:
        if extra not in optional:
            raise SystemExit(f"extras: expected some of {', '.join(optional)}; got {extra!r}")
    return project["dependencies"] + [line for extra in extras for line in optional[extra]]


def requirement(text: str) -> str:
    """The type of an argument that is a requirement."""
    try:
        return str(Requirement(text))
    except InvalidRequirement:
        expected = f"expected a requirement such as jax==0.11.2, got {text!r}"
        raise argparse.ArgumentTypeError(expected) from None


def problems(requirements: list[str], *, deep: bool) -> Iterator[str]:
    """Yields one line for each requirement that the installed packages do not satisfy."""
    pending = [(Requirement(line), "jax-moe") for line in requirements]
    seen = set()
    while pending:
        requirement, wanted_by = pending.pop(0)
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{wanted_by} needs {requirement}; it is not installed"
            continue
        if not requirement.specifier.contains(installed.version, prereleases=True):
            yield f"{wanted_by} needs {requirement}; got {installed.version}"
        if not deep or key in seen:
            continue
        seen.add(key)
        for line in installed.requires or []:
            child = Requirement(line)
            wanted = child.marker is None or any(
                child.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            )
            if wanted:
                child.marker = None
                pending.append((child, requirement.name))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--extras", default="", help="comma-separated extras of pyproject.toml")
    parser.add_argument(
        "--also", default=[], action="append", type=requirement, help="a requirement more"
    )
    parser.add_argument("--deep", action="store_true", help="follow the packages' requirements")
    args = parser.parse_args()
    extras = [extra for extra in args.extras.split(",") if extra]
    lines = list(problems(project_requirements(extras) + args.also, deep=args.deep))
    try:
        print("\n".join(lines), end="\n" if lines else "", flush=True)
    except OSError as error:  # a full disk, or nobody reads
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed once more
        sys.exit(f"standard output: cannot be written: {error.strerror}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
