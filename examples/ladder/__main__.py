"""All levels on one Hopper GPU, in one process: a table and a JSON file.

python -m examples.ladder       writes ladder.md and ladder.json into a folder in out/ladder
python -m examples.ladder --output FOLDER [--overwrite]
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import signal
import sys
import time

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports last, Ctrl-C just ends

import jax

from bench import commands, environment
from bench.failures import writing
from examples.ladder import harness
from examples.ladder.problem import Level
from pallas_kernels import interruption
from pallas_kernels.files import write_atomically

_FOLDER = pathlib.Path(__file__).parent
_ROOT, _FILES = "out/ladder", ("ladder.json", "ladder.md")


def levels() -> list[Level]:
    """All levels, in order."""
    names = sorted(path.stem for path in _FOLDER.glob("level_*.py"))
    return [importlib.import_module(f"examples.ladder.{name}").LEVEL for name in names]


def table(measured: list[harness.Measured], about: dict[str, object]) -> str:
    """A Markdown document of the measurements.

    Args:
        measured: Levels by numbers of tokens.
        about: How they were measured, by name.
    """
    tokens = sorted({one.num_tokens for one in measured})
    by_place = {(one.number, one.num_tokens): one for one in measured}
    header = ["level", *(f"T={t}: us | of the roofline | relative error" for t in tokens)]
    lines = ["# The ladder, measured", "", "| " + " | ".join(header) + " |"]
    lines.append("|---|" + "--:|--:|--:|" * len(tokens))
    for number, idea in sorted({(one.number, one.idea) for one in measured}):
        cells = [cell for t in tokens for cell in _cells(by_place.get((number, t)))]
        lines.append("| " + " | ".join([f"{number} {idea}", *cells]) + " |")
    lines += ["", *(f"- {name}: {value}" for name, value in about.items())]
    return "\n".join(lines) + "\n"


def _cells(one: harness.Measured | None) -> list[str]:
    if one is None:
        return ["", "", ""]
    time_us = "" if one.time_us is None else f"{one.time_us:.1f}"
    fraction = "" if one.fraction is None else f"{one.fraction:.1%}"
    return [time_us, fraction, f"{one.relative_error:.1e}"]


def main(argv: list[str] | None = None) -> int:
    """Runs the levels; 1 where one failed, 2 where there is no GPU. What was measured is kept."""
    parser = argparse.ArgumentParser(prog="python -m examples.ladder")
    commands.add_output(parser, _ROOT)
    args = parser.parse_args(argv)
    gpu = harness.find_gpu()
    if gpu is None:
        print(
            "needs a Hopper GPU; each level interprets itself on a CPU: "
            "python examples/ladder/level_1_plain.py",
            file=sys.stderr,
        )
        return 2
    try:
        with commands.results(args.output, _ROOT, _FILES, overwrite=args.overwrite) as folder:
            return run(gpu, folder)
    except ValueError as error:
        parser.error(str(error))


def run(gpu: harness.Gpu, folder: pathlib.Path) -> int:
    """Measures, prints and writes; the exit code.

    Raises:
        FileError: A file cannot be written.
    """
    started = time.perf_counter()
    measured: list[harness.Measured] = []
    failed: list[str] = []
    for level in levels():
        try:
            for one in harness.run_all([level], gpu):
                measured.append(one)
                print(one, flush=True)
        except Exception as error:  # the other levels still count
            failed.append(f"level {level.number}: {type(error).__name__}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
        seconds = time.perf_counter() - started
        write(folder, measured, _about(gpu, failed, seconds))  # what is there is kept
    print(f"{folder / 'ladder.md'} and {folder / 'ladder.json'}")
    return 1 if failed else 0


def _about(gpu: harness.Gpu, failed: list[str], seconds: float) -> dict[str, object]:
    rates = gpu.rates
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": environment.git_commit(),
        "time": f"median of {harness.NUM_CALLS} calls, cold L2, {gpu.timer}",
        "roofline": f"{rates.bytes_per_s / 1e12:.2f} TB/s and "
        f"{rates.flops_per_s / 1e12:.0f} TFLOP/s ({rates.source})",
        "whole run": f"{seconds:.0f} s",
        "failed": failed or "none",
    }


def write(folder: pathlib.Path, measured: list[harness.Measured], about: dict[str, object]) -> None:
    """Writes `ladder.json` and `ladder.md`."""
    rows = [{**one._asdict(), "fraction": one.fraction} for one in measured]
    path = folder / "ladder.json"
    with writing(path), write_atomically(path) as file:
        json.dump({"about": about, "levels": rows}, file, indent=1)
    path = folder / "ladder.md"
    with writing(path), write_atomically(path) as file:
        file.write(table(measured, about))


if __name__ == "__main__":
    interruption.exit_with(main)
