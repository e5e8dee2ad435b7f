"""Runs the files of tests for Triton's interpreter, which needs a process of its own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(marked):
    folder = pathlib.Path(__file__).parent
    cases = [folder / "triton_interpreted.py", folder / "triton_interpreted_matmuls.py"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-m",
            marked,
            *map(str, cases),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_jax_triton_leaves_the_cache_of_torch_alone():
    code = (
        "import os; from pallas_kernels.triton.launch import load_jax_triton;"
        "load_jax_triton(); print(os.environ.get('TRITON_CACHE_DIR'))"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for value in ("/some/folder", None):
        environment.pop("TRITON_CACHE_DIR", None)
        if value is not None:
            environment["TRITON_CACHE_DIR"] = value
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == str(value), done.stderr
