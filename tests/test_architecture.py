"""The floors of the house: imports run down only."""

from __future__ import annotations

import ast
import doctest
import pathlib

import pytest

import jax_moe

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = ("pallas_kernels", "jax_moe", "interop", "bench", "bench_main")
FRAMEWORKS = {
    "pallas_kernels": {"torch", "absl", "matplotlib"},
    "jax_moe": {"torch", "absl", "matplotlib"},
}


def imported(path: pathlib.Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


def files(floor: str) -> list[pathlib.Path]:
    module = ROOT / f"{floor}.py"
    return [module] if module.exists() else sorted((ROOT / floor).rglob("*.py"))


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_run_down_only(floor):
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    found = {path: imported(path) for path in files(floor)}
    assert found
    for path, names in found.items():
        assert not names & (above | {"tests"}), f"{path.name} imports from a floor above"
        assert not names & FRAMEWORKS.get(floor, set()), f"{path.name} imports a framework"


def test_every_public_name_is_documented():
    public = [name for name in dir(jax_moe) if name[0] != "_" and callable(getattr(jax_moe, name))]
    assert {"apply", "reference", "route", "quantize", "describe"} <= set(public)
    for name in public:
        doc = getattr(jax_moe, name).__doc__
        assert doc, name
        assert len(doc.splitlines()) > 1, name


def test_the_example_in_the_package_docstring_runs():
    result = doctest.testmod(jax_moe)
    assert result.attempted >= 8
    assert result.failed == 0
