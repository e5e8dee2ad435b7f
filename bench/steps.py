"""Commands, each in a process of its own with a limit of time.

A step that hangs is killed and reported, and the others run: a lost signal between GPUs waits for
ever. The state of each goes to `steps.jsonl` (`bench.step_record`), from the start on; whatever a
step prints goes to its own log.

Steps that measure share the machine in turns. Several are started at once and compile at the same
time; each then asks for its turn (`wait_for_turn`), and one after the other has the GPUs for itself
while no other step compiles, so that the host is quiet and memory is needed once. A step's limit
counts from the start of its turn.
"""

import contextlib
import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import step_record
from bench.failures import writing

_LEAST_S = 20  # too little time for any step
_POLL_S = 0.05
_QUIET_S = 150  # that a step waits for the others to have compiled, before it begins anyway
_HUNG = "killed after"  # how the state begins of a step that was killed in its turn
_ASKS = "BENCH_STEP_ASKS"  # the file that a step makes to ask for its turn
_ADVICE = "\n--------------------\nFor simplicity, JAX has removed"  # below an error of JAX


class Step(NamedTuple):
    """One command.

    Attributes:
        name: Of its log.
        arguments: Of this Python.
        seconds: Of its turn, after which it is killed.
        variables: What its environment has beside this one.
        before: Seconds after which it is killed if it has not asked for its turn; None for a step
            that never asks, whose turn begins at its start.
        quiet: Whether its turn waits, if not for ever, until every step that was started with it
            has asked for its own.
    """

    name: str
    arguments: Sequence[str]
    seconds: float
    variables: Mapping[str, str] = {}
    before: float | None = None
    quiet: bool = True


def wait_for_turn() -> frozenset[str]:
    """Called by a step once it has compiled: returns when the GPUs are its own.

    Returns:
        Names of the steps before that were killed in their turns. Empty, at once, in a process that
        is no step.

    Raises:
        SystemExit: What started the step has gone.
    """
    asks = os.environ.get(_ASKS)
    if asks is None:
        return frozenset()
    Path(asks).touch()
    line = sys.stdin.readline()
    if not line:
        raise SystemExit("what started this step has gone")
    return frozenset(json.loads(line))


def run_all(steps: Sequence[Step], folder: Path, minutes: float, jobs: int = 1) -> int:
    """Runs the steps that fit into the time.

    Args:
        steps: In the order of their turns.
        folder: Of `steps.jsonl` and the logs.
        minutes: For all of them; a step gets what is left if that is less than its own limit.
        jobs: How many are started at once.

    Returns:
        1 if one failed, was killed or had no time, else 0.

    Raises:
        FileError: A file of the record cannot be written; names it.
        ValueError: The record that is there is damaged; names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = step_record.read(folder)
    for step in steps:
        record[step.name] = _line(step, step_record.NOT_ENDED, 0.0)
    step_record.write(folder, record)
    deadline = time.monotonic() + 60 * minutes
    states: dict[str, str] = {}
    for batch in itertools.batched(steps, jobs):
        with contextlib.closing(_run(batch, folder, deadline, states)) as ends:
            for step, state, seconds in ends:
                states[step.name] = state
                line = _line(step, state, seconds)
                if state != step_record.OK and seconds:  # else it never began: the log is older
                    line["said"] = _last_line(folder / f"{step.name}.log")
                print(json.dumps(line), flush=True)
                del record[step.name]  # in the order in which they end
                record[step.name] = line
                step_record.write(folder, record)
    return int(any(state != step_record.OK for state in states.values()))


def _line(step: Step, state: str, seconds: float) -> dict[str, Any]:
    return {
        "step": step.name,
        "state": state,
        "seconds": round(seconds, 1),
        "arguments": list(step.arguments),
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _last_line(log: Path) -> str:
    if not log.exists():
        return ""
    text = log.read_text(errors="replace").partition(_ADVICE)[0]
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return "its log is empty"
    return "".join(one if one.isprintable() else " " for one in lines[-1][:300])


def _run(
    batch: Sequence[Step], folder: Path, deadline: float, states: Mapping[str, str]
) -> Generator[tuple[Step, str, float]]:
    """Each step with its state and the seconds of its turn, in the order in which they end."""
    if deadline - time.monotonic() <= _LEAST_S:
        yield from ((step, "not run: no time left", 0.0) for step in batch)
        return
    waiting = [_Process(step, folder) for step in batch]
    try:
        while waiting:
            one = _next(waiting, deadline)
            start = time.monotonic()
            killed = [name for name, state in states.items() if state.startswith(_HUNG)]
            yield one.step, one.turn(deadline, killed), time.monotonic() - start
            waiting.remove(one)
    finally:
        for one in waiting:
            one.kill()


def _next(waiting: Sequence["_Process"], deadline: float) -> "_Process":
    """The first whose turn can begin; those that take too long to ask are killed here."""
    while True:
        for one in waiting:
            one.kill_if_late(deadline)
        settled = [one.has_asked or one.has_ended for one in waiting]
        is_quiet = all(settled) or all(one.age > _QUIET_S for one in waiting)
        for one, is_settled in zip(waiting, settled, strict=True):
            if is_settled and (is_quiet or one.has_ended or not one.step.quiet):
                return one
        time.sleep(_POLL_S)


class _Process:
    """A step that was started."""

    def __init__(self, step: Step, folder: Path) -> None:
        self.step = step
        self._start = time.monotonic()
        self._asks = (folder / f"{step.name}.asks").resolve()
        self._asks.unlink(missing_ok=True)
        self._late: float | None = None
        variables = dict(step.variables)
        if step.before is not None:
            variables[_ASKS] = str(self._asks)
        path = folder / f"{step.name}.log"
        with writing(path), path.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *step.arguments],
                env=os.environ | variables,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )

    @property
    def has_asked(self) -> bool:
        """For its turn; a step that never asks always has."""
        return self.step.before is None or self._asks.exists()

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._start

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """Ends it and what it started."""
        if not self.has_ended:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        self._asks.unlink(missing_ok=True)

    def kill_if_late(self, deadline: float) -> None:
        """Kills what has not asked for its turn in time."""
        if self.has_ended or self.has_asked:
            return
        is_late = self.step.before is not None and self.age > self.step.before
        if is_late or time.monotonic() > deadline:
            self._late = self.age
            self.kill()

    def turn(self, deadline: float, killed: Sequence[str]) -> str:
        """Lets it run to its end, and says how that was."""
        if self._late is not None:
            return f"not begun: killed after {self._late:.0f} s of compiling"
        seconds = min(self.step.seconds, deadline - time.monotonic())
        if seconds <= 0:
            self.kill()
            return "not run: no time left"
        try:
            self._process.communicate(json.dumps(list(killed)) + "\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return f"{_HUNG} {seconds:.0f} s"
        finally:
            self._asks.unlink(missing_ok=True)
        code = self._process.returncode
        return step_record.OK if code == 0 else f"failed with {code}"
