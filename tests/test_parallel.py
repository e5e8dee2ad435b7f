"""Expert parallelism over CPU devices, each file of tests in a process that has eight of them."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys

import pytest

from tests import pairwise

ROOT = pathlib.Path(__file__).parent.parent
# What is compiled runs for milliseconds: less optimization takes half of the time.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
DEVICES = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}


def run_on_eight_devices(file: str, markers: str, seconds: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", markers]
    done = subprocess.run(
        [*command, f"tests/{file}"],
        cwd=ROOT,
        env=os.environ | DEVICES,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("file", ["parallel_layer.py", "parallel_arguments.py"])
def test_on_eight_devices(file):
    run_on_eight_devices(file, "not slow", 600)


@pytest.mark.slow
def test_every_combination_on_eight_devices():
    run_on_eight_devices("parallel_layer.py", "slow", 7200)


def test_a_covering_set_has_every_pair():
    options = {"a": (1, 2, 3), "b": ("x", "y"), "c": (True, False), "d": (0, 1, 2, 3)}
    rows = pairwise.covering(options)
    assert 12 <= len(rows) < len(pairwise.product(options)) == 48
    for a, b in itertools.combinations(options, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(options[a], options[b]))
    assert rows == pairwise.covering(options)
