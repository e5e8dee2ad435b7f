"""Processes beside this one, and folders that only one of them may write into."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from interop import folder_lock
from interop.processes import spawned

HOLDER = """
import fcntl, sys
with open(sys.argv[1], "ab") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_pool_needs_no_start_of_its_own():
    with spawned(1) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()


def test_a_lock_is_freed_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    refusal = f"{tmp_path}: another run is writing here"
    with pytest.raises(ValueError, match=refusal), folder_lock.held(tmp_path):
        pytest.fail("both hold it")
    holder.kill()
    holder.communicate()
    assert (tmp_path / ".lock").exists()  # left over, and locks nobody out
    with (
        folder_lock.held(tmp_path),
        pytest.raises(ValueError, match=refusal),
        folder_lock.held(tmp_path),
    ):
        pytest.fail("both hold it")
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_folder_are_locked_one_by_one(tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    with folder_lock.file_held(one), folder_lock.file_held(other):
        for held in (one, other):
            refusal = f"{held}: another run is writing this file; use another one"
            with pytest.raises(ValueError, match=refusal), folder_lock.file_held(held):
                pytest.fail("both hold it")
    assert list(tmp_path.iterdir()) == []
