"""House rules of the tree that no linter checks."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess

import pytest

from tools import readme_examples

ROOT = pathlib.Path(__file__).parent.parent
MAX_LINES = 400
UNSAFE_MODULES = {"_pickle", "cPickle", "cloudpickle", "dill", "joblib"}
UNSAFE_MODULES |= {"marshal", "pickle", "shelve"}
UNSAFE_NAMES = {"eval", "exec", "torch.hub.load", "torch.load", "torch.serialization.load"}
UNSAFE_NAMES |= {f"yaml.{how}load" for how in ("", "full_", "unsafe_")}
UNSAFE_NAMES |= {f"yaml.{how}load_all" for how in ("", "full_", "unsafe_")}
UNSAFE_METHODS = {"read_pickle", "to_pickle"}
NUMPY_LOADS = {"numpy.load", "jax.numpy.load"}
IMPORTERS = {"__import__", "builtins.__import__", "importlib.__import__", "importlib.import_module"}


def tracked(*patterns: str) -> list[pathlib.Path]:
    """The files git tracks here, those of `patterns` if any."""
    listing = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [path for line in listing.stdout.splitlines() if (path := ROOT / line).exists()]


def imported(tree: ast.AST) -> dict[str, set[str]]:
    """What the names that imports bind stand for, all scopes of a file together."""
    names: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # Without `as`, `import a.b` binds `a`.
                module = alias.name if alias.asname else alias.name.split(".")[0]
                names.setdefault(alias.asname or module, set()).add(module)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                names.setdefault(alias.asname or alias.name, set()).add(f"{module}.{alias.name}")
    return names


def meanings(node: ast.AST, names: dict[str, set[str]]) -> set[str]:
    """The dotted names that an expression may stand for; `?` is what only a run could tell."""
    if isinstance(node, ast.Name):
        return names.get(node.id, {node.id})
    if isinstance(node, ast.Attribute):
        return {f"{owner}.{node.attr}" for owner in meanings(node.value, names)}
    if isinstance(node, ast.Call) and meanings(node.func, names) & IMPORTERS:
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        return {str(a.value) for a in arguments if isinstance(a, ast.Constant)} or {"?"}
    return {"?"}


def is_unsafe(meaning: str) -> bool:
    """Whether what goes by that full name runs code from files; `torch.*` includes `torch.load`."""
    parts = meaning.removeprefix("builtins.").split(".")
    if parts[0] in UNSAFE_MODULES or parts[-1] in UNSAFE_METHODS or ".".join(parts) in UNSAFE_NAMES:
        return True
    return parts[-1] == "*" and any(name.startswith(meaning[:-1]) for name in UNSAFE_NAMES)


def may_unpickle(call: ast.Call, names: dict[str, set[str]]) -> bool:
    """Whether a call sets `allow_pickle`: by name, as `numpy.load`'s third argument, or unseen."""
    keywords = {keyword.arg for keyword in call.keywords}  # None: a `**`
    unseen = None in keywords or any(isinstance(a, ast.Starred) for a in call.args)
    to_numpy = meanings(call.func, names) & NUMPY_LOADS
    return "allow_pickle" in keywords or bool(to_numpy and (unseen or len(call.args) > 2))


def unsafe(source: str) -> list[str]:
    """What in `source` could run code that a file brought along, called or only named."""
    tree = ast.parse(source)
    names = imported(tree)
    found = set().union(*names.values())
    for node in ast.walk(tree):
        found |= meanings(node, names)
    pickles = any(isinstance(n, ast.Call) and may_unpickle(n, names) for n in ast.walk(tree))
    return sorted(filter(is_unsafe, found)) + ["allow_pickle"] * pickles


@pytest.mark.parametrize(
    "source",
    [
        *(f"import {module}" for module in sorted(UNSAFE_MODULES)),
        "import joblib.memory",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    from _pickle import loads as read",
        "__import__('pickle').load(file)",
        "importlib.import_module('pickle')",
        "import importlib as i\ni.import_module(name='dill')",
        "from importlib import import_module as get\nget('joblib.memory')",
        "importlib.import_module('torch').load(path)",
        "eval(text)",
        "exec(text)",
        "list(map(eval, texts))",
        "builtins.eval(text)",
        "import builtins as b\nb.exec(text)",
        "from builtins import exec as run",
        "torch.load(path)",
        "import torch as t; t.load(path)",
        "import torch as t\nread = t.load",
        "import torch as t, numpy as np\ndef f():\n    import numpy as t\nt.load(path)",
        "from torch import load",
        "from torch import load as read\nread(path)",
        "from torch import *\nload(path)",
        "from torch.serialization import load",
        "from torch.serialization import load as read\nread(path)",
        "import torch.serialization\ntorch.serialization.load(path)",
        "import torch.serialization as s\ns.load(path)",
        "from torch import serialization as s\ns.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, None, True)",
        "import numpy as np\nnp.load(path, **{'allow_pickle': True})",
        "import numpy as np\nnp.load(path, **options)",
        "import numpy as np\nnp.load(*arguments)",
        "from numpy import load as read\nread(path, None, True)",
        "import functools, numpy\nfunctools.partial(numpy.load, allow_pickle=True)",
        "import pandas as pd\npd.read_pickle(path)",
        "from pandas import read_pickle",
        "pd.DataFrame(rows).to_pickle(path)",
        "frames[0].to_pickle(path)",
        "yaml.load(text)",
        "import yaml as y\ny.load(text)",
        "import yaml as y\ny.full_load(text)",
        "import yaml as y\ny.unsafe_load(text)",
        "from yaml import load as read",
        "from yaml import unsafe_load_all",
    ],
)
def test_the_rule_sees_unsafe_loading(source):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.load(file)",
        "from json import load\nload(file)",
        "def load(path): ...\nload(path)",
        "model.eval()",
        "import torch\ntorch.no_grad()(f)\nmodel.load(path)",
        "import safetensors.torch\nsafetensors.torch.load_file(path)",
        "from safetensors import torch\ntorch.load(content)",
        "from safetensors.torch import load as read\nread(content)",
        "from jax.experimental.pallas import mosaic_gpu as plgpu\nplgpu.load(x.at[0], layout=l)",
        "import triton.language as tl\ntl.load(x, mask, 0.0, **options)",
        "memref.load(mailbox, [first])",
        "from jax_moe import backends\nbackends.load(name)",
        "import numpy as np\nnp.load(path)\nnp.load(path, mmap_mode='r')\nnp.save(path, x)",
        "import yaml\nyaml.safe_load(text)",
        "import importlib\nimportlib.import_module(f'{__name__}.{name}')",
        "from importlib import import_module\nimport_module('json').load(file)",
        "from .pickle import jar\nfrom . import marshal",
        "import re, os\nre.compile(text)\nos.execv(path, [])",
        "text = 'eval(x); import pickle'",
    ],
)
def test_the_rule_leaves_safe_code_alone(source):
    assert unsafe(source) == []


def test_nothing_in_the_tree_runs_code_from_files():
    found = {
        str(path.relative_to(ROOT)): names
        for path in tracked("*.py")
        if (names := unsafe(path.read_text()))
    }
    assert found == {}


def test_errors_that_say_what_was_expected_say_what_came():
    rule = re.compile(r"(Type|Value)Error\(.*\bexpected\b(?!.*\b(got|found)\b)", re.DOTALL)
    lacking = []
    for path in tracked("interop/*.py", "jax_moe/*.py", "pallas_kernels/*.py"):
        raised = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Raise))
        lacking += [
            f"{path.relative_to(ROOT)}:{node.lineno}"
            for node in raised
            if node.exc and rule.search(ast.unparse(node.exc))
        ]
    assert lacking == []


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


HAVE_NO_PACKAGES = {
    "tools/check_pins.py": "runs before there is an environment, on any Python, alone in a folder",
}


def blocks_of_programs(source: str) -> list[ast.If]:
    """The `if __name__ == "__main__":` of a module, with further conditions or without."""
    rule = re.compile(r"""__name__ == ['"]__main__['"]""")
    found = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    return [node for node in found if rule.search(ast.unparse(node.test))]


def test_every_program_ends_as_all_do():
    """On Ctrl-C, SIGTERM, a closed pipe and a full disk: with one line and a known exit code."""
    programs, others = set(), set()
    for path in tracked("*.py"):
        blocks = blocks_of_programs(path.read_text())
        if blocks or path.name == "__main__.py":
            programs.add(name := str(path.relative_to(ROOT)))
            last = ast.unparse(blocks[-1].body[-1]) if blocks else ""
            if not last.startswith("interruption.exit_with("):
                others.add(name)
    assert len(programs) > 30
    assert others == set(HAVE_NO_PACKAGES)


def test_the_readme_examples_run_and_print_what_it_says():
    examples = readme_examples.examples((ROOT / "README.md").read_text())
    assert len(examples) > 1
    for (code, output), x64 in [*zip(examples, "00", strict=True), (examples[0], "1")]:
        printed = readme_examples.run(code, PYTHONPATH=str(ROOT), JAX_ENABLE_X64=x64)
        assert printed.strip() == output.strip()
