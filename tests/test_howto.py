"""The examples of `docs/howto/` run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.hf_checkpoint import make_checkpoint
from tests.test_parallel import DEVICES, blocks_of, ended, in_two_processes
from tests.test_repository import ROOT
from tools import readme_examples

FOLDER = ROOT / "docs" / "howto"
SHOWN = ("add_a_model", "add_a_gpu", "add_a_tiling_knob", "add_a_benchmark_solution")
"""Pages whose examples print something that the page shows."""
SIZES = {
    "model_type": "deepseek_v3",
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of one small layer, with a configuration that says what it is."""
    made = make_checkpoint(tmp_path / "model", num_experts=SIZES["n_routed_experts"])
    path = made.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SIZES))
    return made.folder


def example_of(page: str) -> str:
    return blocks_of((FOLDER / f"{page}.md").read_text())[""]


def run(page: str, *arguments: object, devices: int) -> str:
    flags = re.sub(r"count=\d+", f"count={devices}", DEVICES["XLA_FLAGS"])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example_of(page), *map(str, arguments)],
        env=os.environ | DEVICES | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_examples_print_what_the_pages_say():
    found = [
        example
        for page in SHOWN
        for example in readme_examples.examples((FOLDER / f"{page}.md").read_text())
    ]
    assert len(found) == 5
    printed = readme_examples.run("".join(code for code, _ in found), PYTHONPATH=str(ROOT))
    assert printed == "".join(output for _, output in found)


def test_every_page_is_listed():
    index = (FOLDER / "README.md").read_text()
    pages = {path.name for path in FOLDER.glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))


@pytest.mark.slow
def test_a_checkpoint_is_read(folder):
    assert run("read_a_checkpoint", folder, devices=1) == "(16, 256)\n"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_one_host_serves(folder, devices):
    lines = run("serve_from_one_host", folder, devices=devices).splitlines()
    assert lines == ["1 (1, 256)", "7 (7, 256)", "30 (30, 256)"]


@pytest.mark.slow
def test_several_hosts_serve(folder, tmp_path):
    script = tmp_path / "serve.py"
    script.write_text(example_of("serve_from_several_hosts"))
    processes = in_two_processes(str(script), str(folder), "{address}", "2", "{host}")
    for host, (code, out) in enumerate(ended(processes, 300)):
        assert code == 0, out[-4000:]
        for count in (0, 3, 30):
            assert f"host {host} served {count + host}\n" in out
