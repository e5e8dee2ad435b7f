"""Expert parallelism over CPU devices, each file of tests in a process that has eight of them."""

from __future__ import annotations

import itertools
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from tests import pairwise

ROOT = pathlib.Path(__file__).parent.parent
# What is compiled runs for milliseconds: less optimization takes half of the time.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
DEVICES = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}


def run_on_eight_devices(files: list[str], markers: str, seconds: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", markers]
    done = subprocess.run(
        [*command, *(f"tests/{file}" for file in files)],
        cwd=ROOT,
        env=os.environ | DEVICES,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    "files",
    [
        ["parallel_layer.py"],
        [
            "parallel_arguments.py",
            "parallel_cache.py",
            "parallel_choice.py",
            "parallel_surroundings.py",
        ],
    ],
)
def test_on_eight_devices(files):
    run_on_eight_devices(files, "not slow", 600)


@pytest.mark.slow
def test_every_combination_on_eight_devices():
    run_on_eight_devices(["parallel_layer.py", "parallel_surroundings.py"], "slow", 7200)


def blocks_of(document: str) -> dict[str, str]:
    """The Python of a document, by what stands after "python" on the fence."""
    found: dict[str, str] = {}
    for title, text in re.findall(r"```python ?(.*?)\n(.*?)```", document, re.DOTALL):
        found[title] = found.get(title, "") + text
    return found


def examples() -> dict[str, str]:
    return blocks_of((ROOT / "docs" / "expert_parallel.md").read_text())


def test_the_example_of_one_host_runs(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(examples()[""])
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=ROOT,
        env=os.environ | DEVICES | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ranks: 8 (expert=8)" in done.stdout


def in_two_processes(*command: Any) -> list[subprocess.Popen[str]]:
    """The command twice, with an address and the process's number, four devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = DEVICES["XLA_FLAGS"].replace("count=8", "count=4")
    environment = os.environ | DEVICES | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    return [
        subprocess.Popen(
            [sys.executable, *(part.format(address=address, host=host) for part in command)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in range(2)
    ]


def ended(processes: list[subprocess.Popen[str]], seconds: int) -> list[tuple[int, str]]:
    """Exit code and output of each; none is left running."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out) for process, out in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_two_processes():
    for host, (code, out) in enumerate(
        ended(in_two_processes("-m", "tests.two_processes", "{address}", "{host}"), 300)
    ):
        assert code == 0, out[-4000:]
        for exchange in ("collectives", "two_level"):
            assert f"host {host}: {exchange} differs in 0 elements" in out


@pytest.mark.slow
def test_the_example_of_several_hosts_runs(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(examples()["several hosts"])
    for code, out in ended(in_two_processes(str(script), "{address}", "2", "{host}"), 300):
        assert code == 0, out[-4000:]
        assert "of 2 has 64 outputs" in out


@pytest.mark.slow
def test_a_peer_that_dies_is_an_error_and_not_a_hang():
    """Seconds after its death: ten without a heartbeat, and some for the message."""
    processes = in_two_processes("-m", "tests.two_processes", "{address}", "{host}", "--die")
    processes[1].communicate(timeout=300)
    died = time.monotonic()
    ((code, out),) = ended(processes[:1], 60)
    assert code != 0
    assert time.monotonic() - died < 40
    assert re.search(r"(?i)heartbeat|connection (closed|reset)|unavailable", out), out[-4000:]


def test_a_covering_set_has_every_pair():
    options = {"a": (1, 2, 3), "b": ("x", "y"), "c": (True, False), "d": (0, 1, 2, 3)}
    rows = pairwise.covering(options)
    assert 12 <= len(rows) < len(pairwise.product(options)) == 48
    for a, b in itertools.combinations(options, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(options[a], options[b]))
    assert rows == pairwise.covering(options)
