"""The floors of the house: imports run down only."""

from __future__ import annotations

import ast
import doctest
import pathlib
import re

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


def test_kernels_are_cut_into_pieces_that_can_be_read():
    for path in files("pallas_kernels"):
        source = path.read_text()
        assert len(source.splitlines()) <= 400, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                limit = 120 if isinstance(node, ast.ClassDef) else 110
                assert lines <= limit, f"{path.name}: {node.name} has {lines} lines"


PRIVATE_WORDS = re.compile(
    r"""\b(?:_?mailbox\w*|tickets?|retire|ring|rings|idle_work\w*|has_idle_warps|one_thread|k_blocks
    |box_rows|tokens_are_rows|row_epilogue|walk|tile_walk|matmul_ring|row_gather|single_warp|cut_tiles
    |holder|hand_over|add_rest|_reach|_late|lag|_meet|announce\w*)\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""What used to stand for tile queues, work counters, pipelines, side jobs, stream-K and swap-AB."""


def test_kernels_use_the_words_of_the_field():
    for path in files("pallas_kernels"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not PRIVATE_WORDS.search(line), f"{path.name}:{number}: {line.strip()}"


NAMES = {"inputs", "INPUTS", "arguments"}


def positions(source):
    """Numbers in brackets after a tuple of the layer's arguments."""

    def is_number(node):
        node = node.operand if isinstance(node, ast.UnaryOp) else node
        return isinstance(node, ast.Constant) and isinstance(node.value, int)

    def is_arguments(node):
        if isinstance(node, ast.Call):
            node = node.func
            return isinstance(node, ast.Name) and node.id in {"make_inputs", "rank_specs"}
        if isinstance(node, ast.Attribute):
            return node.attr == "arguments"
        return isinstance(node, ast.Name) and node.id in NAMES

    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Subscript) and is_arguments(node.value)
        for index in [node.slice]
        if (
            is_number(index)
            if not isinstance(index, ast.Slice)
            else any(part is not None and is_number(part) for part in (index.lower, index.upper))
        )
    ]


@pytest.mark.parametrize(
    "source",
    ["inputs[0]", "f(*inputs[4:8])", "arguments[-1]", "inputs.arguments[:8]", "make_inputs(3)[2]"],
)
def test_the_rule_sees_a_position(source):
    assert positions(source)


def test_arguments_of_the_layer_go_by_name():
    """`jax_moe.LayerInputs` and `RoutedInputs` name them."""
    assert positions("inputs[number] = arguments[name]; inputs.hidden_states[:3]; ten[0]") == []
    folders = (*FLOORS, "tests", "tools", "examples")
    found = {
        str(path.relative_to(ROOT)): wrong
        for folder in folders
        for path in files(folder)
        if (wrong := positions(path.read_text()))
    }
    assert found == {}


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
