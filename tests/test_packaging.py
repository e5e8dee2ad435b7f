"""What the library is packed as: one version everywhere, a wheel of the library alone."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser

import pytest

import jax_moe
from bench import environment
from tests.test_repository import ROOT, tracked

PACKAGES = ("interop", "jax_moe", "pallas_kernels")
OURS = "https://github.com/jax-moe/jax-moe"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    version, date = re.findall(r"^## (\S+) \((\S+)\)", changelog, re.MULTILINE)[0]
    assert version == PROJECT["version"] == jax_moe.__version__
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{date}"\n' in citation


def test_addresses_of_the_project_are_one_and_lead_to_files():
    """An index page shows the README alone, so its links of pictures are absolute."""
    documents = (*tracked("*.md"), ROOT / "CITATION.cff", ROOT / "pyproject.toml")
    raw = OURS.replace("github.com", "raw.githubusercontent.com")
    found = 0
    for document in documents:
        text = document.read_text()
        for path in re.findall(rf"(?:{OURS}/(?:blob|tree)|{raw})/main/([\w./-]+)", text):
            found += 1
            assert (ROOT / path).exists(), f"{document.name}: {path}"
    assert found > 2
    assert OURS in (ROOT / "CITATION.cff").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert pictures
    assert all(picture.startswith(f"{raw}/main/") for picture in pictures)


def test_the_library_needs_few_packages():
    names = {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]}
    assert names == {"jax", "jaxtyping", "ml_dtypes", "numpy"}
    extra = {re.match(r"[\w-]+", one)[0] for one in PROJECT["optional-dependencies"]["bench"]}
    assert extra | {"jax", "jaxtyping"} == set(environment._NEEDED.values())


def test_the_benchmark_says_which_packages_it_lacks():
    code = "import runpy, sys; sys.modules.update(absl=None, jaxtyping=None); "
    code += "runpy.run_path('bench_main.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    line = "bench_main.py: needs absl-py, jaxtyping: pip install -e '.[bench]' in this folder"
    assert done.stderr.strip() == line


def test_a_command_that_lacks_a_package_names_it(tmp_path):
    code = "import sys; sys.modules['safetensors'] = None; "
    code += "from interop.flashinfer_bench.__main__ import main; sys.exit(main(['export', 'set']))"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "export: needs the package safetensors of the extra bench"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked():
        if path.relative_to(ROOT).parts[0] != "results":
            copy = folder / "source" / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    command = [sys.executable, *build, "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(ROOT)) for path in tracked(*PACKAGES)}
    assert {f"{package}/py.typed" for package in PACKAGES} <= wanted
    assert wanted - held == set()
    information = f"jax_moe-{PROJECT['version']}.dist-info/"
    assert {name for name in held - wanted if not name.startswith(information)} == set()


@pytest.mark.slow
def test_the_wheel_describes_itself(wheel):
    archive = zipfile.ZipFile(wheel)
    name = f"jax_moe-{PROJECT['version']}.dist-info/METADATA"
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == jax_moe.__version__
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(needed) == 4
    assert len(metadata.get_all("Project-URL")) == 4
