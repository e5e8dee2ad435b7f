"""House rules of the tree that no linter checks."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAX_LINES = 400
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "pickle.load"}


def tracked(*patterns: str) -> list[pathlib.Path]:
    """The files git tracks here, those of `patterns` if any."""
    listing = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [path for line in listing.stdout.splitlines() if (path := ROOT / line).exists()]


def unsafe(source: str) -> list[str]:
    """What in `source` could run code that a file brought along."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            imported = {f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").split(".")[0] in UNSAFE_MODULES or imported & UNSAFE_CALLS:
                found += sorted(imported)
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in UNSAFE_CALLS:
                found.append(ast.unparse(node.func))
            found += [k.arg for k in node.keywords if k.arg == "allow_pickle"]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.memory",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "from torch import load",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text)",
    ],
)
def test_the_rule_sees_unsafe_loading(source):
    assert unsafe(source)


def test_the_rule_leaves_safe_code_alone():
    assert (
        unsafe("import json\nmodel.eval()\njson.load(file)\nsafetensors.torch.load_file(p)") == []
    )


def test_nothing_in_the_tree_runs_code_from_files():
    found = {
        str(path.relative_to(ROOT)): names
        for path in tracked("*.py")
        if (names := unsafe(path.read_text()))
    }
    assert found == {}


def test_no_file_is_long():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in tracked("*.py")}
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_unfinished_work_is_marked():
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX")) + r")\b")
    marked = [
        str(p.relative_to(ROOT)) for p in tracked("*.py", "*.sh") if marks.search(p.read_text())
    ]
    assert marked == []


def test_links_of_the_documents_lead_somewhere():
    missing = []
    for document in tracked("*.md"):
        targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
        targets += re.findall(r'(?:src|srcset)="([^":]+)"', document.read_text())
        missing += [f"{document.name}: {t}" for t in targets if not (document.parent / t).exists()]
    assert missing == []


def test_make_targets_of_the_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        f"{document.name}: make {target}"
        for document in tracked("*.md")
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", document.read_text(), re.MULTILINE)
        if target not in targets
    }
    assert named == set()


def test_tests_that_the_documents_name_exist():
    """As in `test_api.test_jit_equals_eager`; and each of the 35 faults has its row."""
    missing, named = [], 0
    for document in tracked("*.md"):
        text = document.read_text()
        for file, test in re.findall(r"`(\w+)\.(test_\w+)`", text):
            named += 1
            path = ROOT / "tests" / f"{file}.py"
            if not path.exists() or f"\ndef {test}(" not in path.read_text():
                missing.append(f"{document.name}: {file}.{test}")
    assert missing == []
    assert named > 100
    faults = re.findall(r"^\| (\d+) \|.*`.*`", (ROOT / "docs/reliability.md").read_text(), re.M)
    assert faults == [str(number) for number in range(1, 36)]


def test_the_readme_example_runs_and_prints_what_it_says():
    readme = (ROOT / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", readme, re.DOTALL)
    assert examples
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for code, output in examples:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == output.strip()


def test_a_wheel_holds_every_module_and_data_file(tmp_path):
    packages = ("jax_moe", "pallas_kernels", "interop", "bench")
    source = tmp_path / "source"
    for path in tracked("pyproject.toml", "README.md", "LICENSE", "bench_main.py", *packages):
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    command = [sys.executable, *build, "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(p.relative_to(ROOT)) for p in tracked("bench_main.py", *packages)}
    assert wanted - held == set()
