"""Random cases against the oracle for as long as asked; a line repeats each failure.

    python -m tests.fuzz --minutes 10 --seed 0 [--output=FOLDER]
    python -m tests.fuzz --case 12345 --backend mosaic

`fuzz.json` in the folder of the run, one in `out/fuzz` if none is given, says what ran, on what,
and how it went; `running.txt` stays there only if the process died, and names the case. Exit code 1
on a failure, that of a signal after one.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import tqdm

from bench import commands, environment
from bench.failures import writing
from interop.arguments import natural, positive_finite
from jax_moe.io.files import write_atomically
from pallas_kernels import interruption

INTERPRETED = "interpreted_mosaic"
_COMPILING = 0.4  # share of the time that may go into opening new slots
_MOST_FAILURES = 20
_MINUTES = 1.0
_ROOT, _FILES = "out/fuzz", ("fuzz.json", "running.txt")
_SEED_STRIDE = 1_000_000


def case_numbers(seed: int, slots: list[int], num_slots: int) -> Iterator[list[int]]:
    """Yields, round after round, one fresh case number for each slot."""
    for count in range(_SEED_STRIDE):
        yield [(seed * _SEED_STRIDE + count) * num_slots + slot for slot in slots]


class Campaign:
    """Runs cases and keeps count.

    Attributes:
        failures: One record for each case and backend that failed.
        count: Cases run.
    """

    def __init__(self, backends: list[str], tell: Callable[[str], Any] = print) -> None:
        from tests import fuzz_cases, fuzz_checks  # JAX starts with them

        self.cases, self.checks = fuzz_cases, fuzz_checks
        self.backends, self.tell = backends, tell
        self.failures: list[dict[str, Any]] = []
        self.count = self.rows = 0
        self.worst = dict.fromkeys(backends, 0.0)
        self.kinds: collections.Counter[str] = collections.Counter()
        self.slots: collections.Counter[int] = collections.Counter()

    def run(self, number: int) -> None:
        """Draws one case and checks it on every backend."""
        self.count += 1
        self.slots[self.cases.slot_of(number)] += 1
        case = self.cases.draw(number)
        expected = self.checks.oracle(case)
        self.kinds[f"routing: {case.routing}"] += 1
        self.kinds[f"fault: {case.fault or 'none, run twice'}"] += 1
        for backend in self.backends:
            outcome = self._check(case, expected, backend)
            self.rows += outcome.rows
            self.worst[backend] = max(self.worst[backend], outcome.worst)
            if outcome.problem:
                command = repro(number, backend)
                fields = {"case": str(case), "backend": backend, "problem": outcome.problem}
                self.failures.append({**fields, "repeat": command})
                self.tell(f"FAILED on {backend}, {case}: {outcome.problem}\n  {command}")

    def _check(self, case: Any, expected: Any, backend: str) -> Any:
        try:
            with interruption.undisguised():
                return self.checks.check(case, expected, backend)
        except Exception as error:  # whatever it raises is a finding
            message = str(error).strip().split("\n")[0][:200]
            return self.checks.Outcome(f"{type(error).__name__}: {message}", 0, 0.0)

    def summary(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "cases": self.count,
            "checks": self.count * len(self.backends),
            "failed": len(self.failures),
            "failures": self.failures,
            "rows_compared": self.rows,
            "worst_row_error": self.worst,
            "kinds": dict(sorted(self.kinds.items())),
            "shapes": {self.cases.label(slot): count for slot, count in sorted(self.slots.items())},
        }


def repro(number: int, backend: str) -> str:
    """The command that repeats a case."""
    return f"python -m tests.fuzz --case {number} --backend {backend}"


def fuzz(campaign: Campaign, seed: int, seconds: float, slots: list[int], running: Any) -> bool:
    """Runs cases until the time is over: known shapes by turns, new ones as time allows.

    Args:
        campaign: Runs them.
        seed: Which numbers.
        seconds: How long.
        slots: The slots to use, in the order of their opening.
        running: A file that always holds the command of the case at hand.

    Returns:
        Whether it went on to the end.
    """
    started = now = time.monotonic()
    opening, opened = 0.0, 0
    with tqdm.tqdm(total=round(seconds), unit="s", dynamic_ncols=True, disable=None) as bar:
        campaign.tell = bar.write
        for numbers in case_numbers(seed, slots, len(campaign.cases.SLOTS)):
            may_open = not opened or opening <= _COMPILING * (now - started)
            for position, number in enumerate(numbers[: opened + may_open]):
                running.seek(0)
                running.truncate()
                running.write(repro(number, ",".join(campaign.backends)) + "\n")
                running.flush()
                before = now
                campaign.run(number)
                interruption.check()
                now = time.monotonic()
                if position == opened:
                    opened, opening = opened + 1, opening + now - before
                bar.set_postfix_str(
                    f"{campaign.count} cases, {len(campaign.failures)} failed", refresh=False
                )
                bar.update(min(round(now - started), bar.total) - bar.n)
                if len(campaign.failures) >= _MOST_FAILURES:
                    return False
                if now - started > seconds:
                    return True
    return True


def usable(names: str | None) -> list[str]:
    """The backends to run, by default the kernels on a GPU and `xla` on a CPU.

    Raises:
        ValueError: One does not exist or does not run here.
    """
    import jax

    from jax_moe import backends

    if names is None:
        on_gpu = [n for n in ("mosaic", "triton") if backends.unsupported_reason(n) is None]
        return on_gpu if jax.default_backend() == "gpu" and on_gpu else ["xla"]
    chosen = list(dict.fromkeys(names.split(",")))
    for name in chosen:
        if name not in (*backends.NAMES, INTERPRETED):
            known = ", ".join([*backends.NAMES, INTERPRETED])
            raise ValueError(f"--backend: expected some of {known}, got {name!r}")
        if name != INTERPRETED and (reason := backends.unsupported_reason(name)):
            raise ValueError(f"--backend: {name} {reason}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=positive_finite, help=f"{_MINUTES:g} if not given")
    parser.add_argument("--seed", type=natural, help="which cases, 0 or more; 0 if not given")
    parser.add_argument("--backend", help=f"comma-separated; also {INTERPRETED}")
    parser.add_argument("--case", type=natural, help="runs this one case alone, writes nothing")
    commands.add_output(parser, _ROOT)
    args = parser.parse_args(argv)
    for flag in ("minutes", "seed", "output") if args.case is not None else ():
        if getattr(args, flag) is not None:
            parser.error(f"--case: runs one case and writes nothing, got --{flag} too")
    if args.case is not None and args.overwrite:
        parser.error("--case: runs one case and writes nothing, got --overwrite too")
    if importlib.util.find_spec("pytest") is None:
        parser.error("needs pytest, as its cases are those of tests: pip install pytest")
    environment.prepare_process()
    try:
        campaign = Campaign(usable(args.backend))
        if args.case is not None:
            return run_one(campaign, args.case)
        minutes = _MINUTES if args.minutes is None else args.minutes
        with commands.results(args.output, _ROOT, _FILES, overwrite=args.overwrite) as folder:
            return run_into(folder, campaign, args.seed or 0, 60 * minutes)
    except ValueError as error:
        parser.error(str(error))


def run_one(campaign: Campaign, number: int) -> int:
    """Runs one case; the exit code."""
    print(campaign.cases.draw(number))
    campaign.run(number)
    print("failed" if campaign.failures else f"passed on {', '.join(campaign.backends)}")
    return 1 if campaign.failures else 0


def run_into(folder: pathlib.Path, campaign: Campaign, seed: int, seconds: float) -> int:
    """Fuzzes and writes `fuzz.json`; the exit code.

    Raises:
        FileError: A file cannot be written.
    """
    with writing(folder / "running.txt"):
        about, interrupted = run_for(campaign, seed, seconds, folder)
    failed = len(campaign.failures)
    print(f"{campaign.count} cases on {', '.join(campaign.backends)}: {failed} failures")
    with writing(folder / "fuzz.json"), write_atomically(folder / "fuzz.json") as file:
        json.dump(about | campaign.summary(), file, indent=2)
        file.write("\n")
    print(f"wrote {folder / 'fuzz.json'}")
    return interrupted or (1 if failed else 0)


def run_for(
    campaign: Campaign, seed: int, seconds: float, output: pathlib.Path
) -> tuple[dict[str, Any], int]:
    """Fuzzes.

    Returns:
        When, how long, and what on; and the exit code of the signal that ended it, or 0.
    """
    slots = list(range(len(campaign.cases.SLOTS)))
    if INTERPRETED in campaign.backends:
        slots = list(campaign.cases.INTERPRETED_SLOTS)
    started, before = datetime.datetime.now(datetime.UTC), time.monotonic()
    try:
        with (output / "running.txt").open("w") as running, interruption.remembered():
            try:
                complete, code = fuzz(campaign, seed, seconds, slots, running), 0
            except KeyboardInterrupt:
                complete, code = False, interruption.acknowledge()  # what was found is written
                print("interrupted", file=sys.stderr)
    finally:
        (output / "running.txt").unlink(missing_ok=True)
    about = {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - before, 1),
        "complete": complete,
        "seed": seed,
        "backends": campaign.backends,
        "device": environment.device(),
        "gpu": environment.gpu_state(),
        "versions": environment.versions(),
        "commit": environment.git_commit(),
    }
    return about, code


if __name__ == "__main__":
    interruption.exit_with(main)
