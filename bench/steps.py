"""Commands one after another, each in a process of its own with a limit of time.

A step that hangs is killed and reported, and the others run: a lost signal between GPUs waits for
ever. One JSON object per step goes to `steps.jsonl`; whatever a step prints goes to its own log.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_LEAST_S = 20  # too little time for any step


class Step(NamedTuple):
    """One command.

    Attributes:
        name: Of its log.
        arguments: Of this Python.
        seconds: After which it is killed.
        variables: What its environment has beside this one.
    """

    name: str
    arguments: Sequence[str]
    seconds: float
    variables: Mapping[str, str] = {}


def run_all(steps: Sequence[Step], folder: Path, minutes: float) -> int:
    """Runs the steps that fit into the time.

    Args:
        steps: In order.
        folder: Of `steps.jsonl` and the logs.
        minutes: For all of them; a step gets what is left if that is less than its own limit.

    Returns:
        1 if one failed, was killed or had no time, else 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    failed = False
    with (folder / "steps.jsonl").open("a") as record:
        for step in steps:
            start = time.monotonic()
            left = deadline - start
            state = "not run: no time left"
            if left > _LEAST_S:
                state = _run(step._replace(seconds=min(step.seconds, left)), folder)
            failed |= state != "ok"
            line = {
                "step": step.name,
                "state": state,
                "seconds": round(time.monotonic() - start, 1),
                "arguments": list(step.arguments),
            }
            print(json.dumps(line), flush=True)
            record.write(json.dumps(line) + "\n")
            record.flush()
    return int(failed)


def _run(step: Step, folder: Path) -> str:
    with (folder / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *step.arguments],
            env=os.environ | dict(step.variables),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=step.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"killed after {step.seconds:.0f} s"
    return "ok" if code == 0 else f"failed with {code}"
