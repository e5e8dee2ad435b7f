"""Everything there is to know about expert parallelism on the GPUs of one host, in one call.

    python -m bench.parallel_gpus --output out/parallel_gpus --minutes 9
    python -m bench.parallel_gpus --output out/parallel_gpus --documents    # again from its files

A folder holds one run. `--only` adds steps to it that are not there yet, with the same ranks, GPUs,
versions and commit, and `--resume` measures those that have not ended well; what would replace a
step or mix runs needs `--overwrite`, which begins anew.

Each step is a process of its own with a limit (`bench.steps`): all compile at the same time, then
each has the GPUs for itself. Multicast (NVLS) stays off.

    check        every exchange against the sum over one-rank layers; the same bits in 100 runs;
                 with and without CUDA graphs
    layer        `bench.parallel` for each number of tokens, in one and several pieces, with even
                 and skewed routing, the local work beside it
    primitives   collectives and the kernels between GPUs, 1 KB to 256 MB per rank
    trace        a Perfetto trace of one layer, and its time by kernel
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from bench import commands, environment, parallel, parallel_documents, parallel_folder
from bench.failures import FileError
from bench.steps import Step, run_all
from bench.workloads import FULL, REDUCED
from interop.arguments import positive, positive_finite, up_to
from jax_moe.io.files import naming, shown
from pallas_kernels import interruption

SKEWED = (128, 1024, 8192)
"""Tokens per rank at which routing that is not even is measured too."""

_EXCHANGES = ("collectives", "nvlink")

STEPS = (
    ("check_collectives", ["check", "collectives"], True, 60),
    ("check_nvlink", ["check", "nvlink"], True, 60),
    ("check_nvlink_no_graphs", ["check", "nvlink"], False, 60),
    *((f"layer_{t}", ["layer", str(t)], True, 75) for t in (128, 8, 1024)),
    # Many programs each, for as many pieces: a process per exchange, so that they compile sooner.
    *((f"layer_8192_{name}", ["layer", "8192", name], True, 75) for name in _EXCHANGES),
    ("primitives_collectives", ["primitives", "collectives"], True, 60),
    ("primitives_nvlink", ["primitives", "nvlink"], True, 60),
    *((f"layer_{t}", ["layer", str(t)], True, 75) for t in (32, 1)),
    *((f"layer_4096_{name}", ["layer", "4096", name], True, 75) for name in _EXCHANGES),
    *(
        (f"trace_{name}_{t}", ["trace", name, str(t)], False, 45)
        for name in _EXCHANGES
        for t in (128, 4096)
    ),
    ("primitives_ragged", ["primitives", "ragged"], True, 40),
)
"""Name, what, whether with CUDA graphs, seconds of its turn; the most telling first."""

NAMES = tuple(name for name, *_ in STEPS)

WITHOUT_GPUS = (
    "check_collectives", "layer_1024", "primitives_collectives", "trace_collectives_128",
)  # fmt: skip
"""What CPU devices can check, at reduced size."""

NO_GRAPHS = "--xla_gpu_enable_command_buffer="
_MINUTES = 9.0  # for all steps
_BEFORE_S = 420  # for a step to start and compile while all others do


def steps_of(
    folder: Path, only: str, ranks: int | None = None, others: Sequence[str] = ()
) -> list[Step]:
    """The steps whose name holds `only`, with NVLS off, and memory left to each other.

    Args:
        folder: Of the results.
        only: Parts of names, by commas; all if empty.
        ranks: How many devices; None means all GPUs.
        others: More arguments of the command, for the record of a step.

    Raises:
        ValueError: There is no step of such a name here.
    """
    parts = [part.strip() for part in only.split(",")]
    there = [name for name in NAMES if name in WITHOUT_GPUS or environment.has_gpu_driver()]
    for part in parts if only else ():
        if not part or not any(part in name for name in there):
            raise ValueError(f"--only: expected parts of {', '.join(there)}, got {part!r}")
    flags = os.environ.get("XLA_FLAGS", "")
    variables = {"NCCL_NVLS_ENABLE": "0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = ["-m", "bench.parallel_gpus", "--output", str(folder)]
    command += [] if ranks is None else ["--ranks", str(ranks)]
    command += others
    return [
        Step(
            name,
            [*command, "--step", name, *what],
            seconds,
            variables | {"XLA_FLAGS": (flags if graphs else f"{flags} {NO_GRAPHS}").strip()},
            before=_BEFORE_S,
            quiet=not name.startswith("check"),
        )
        for name, what, graphs, seconds in STEPS
        if name in there and any(part in name for part in parts)
    ]


def pieces_of(num_tokens: int) -> tuple[int, ...]:
    """Numbers of pieces worth a measurement: each reads the weights again."""
    return (1,) if num_tokens < 1024 else (1, 2) if num_tokens < 4096 else (1, 2, 4)


def run_step(name: str, what: Sequence[str], ranks: int, folder: Path) -> int:
    """What the process of a step does.

    Args:
        name: Of the step.
        what: Its kind, then the kind's arguments.
        ranks: How many devices.
        folder: Of all results; those of this step go to `NAME.json`, a layer's to a folder.

    Returns:
        The exit code: 1 if a result is wrong or failed.
    """
    on_gpu = environment.default_backend() == "gpu"
    sizes, (kind, *rest) = FULL if on_gpu else REDUCED, what
    if kind == "layer":
        num_tokens = int(rest[0]) if on_gpu else min(int(rest[0]), 17)
        routings = ("even", "captured", "zipf") if int(rest[0]) in SKEWED else ("even",)
        wanted = rest[1:] or _EXCHANGES
        exchanges = tuple(name for name in parallel.exchanges_on(ranks) if name in wanted)
        case = parallel.Case(exchanges, pieces_of(int(rest[0])), routings)
        return parallel.execute(ranks, (num_tokens,), case, folder / name)
    rows: Iterable[dict[str, Any]]
    if kind == "check":
        from bench.parallel_check import check

        rows = check(ranks, (1, 32, 1024) if on_gpu else (1, 5), rest[0], sizes)
    elif kind == "primitives":
        from bench.parallel_primitives import BYTES, measure

        mesh = parallel.mesh_of(ranks)
        rows = measure(mesh, rest[0], BYTES if on_gpu else BYTES[:2], 20 if on_gpu else 1)
    else:
        from bench.parallel_trace import record

        exchange, num_tokens = rest[0], int(rest[1]) if on_gpu else 5
        path = folder / f"{name}.json.gz"
        rows = (record(*one) for one in [(ranks, num_tokens, exchange, sizes, path)])
    return _kept(rows, environment.about(sizes.over(ranks)), folder / f"{name}.json")


def _kept(rows: Iterable[dict[str, Any]], about: dict[str, Any], path: Path) -> int:
    """Writes the rows as they come."""
    kept = []
    for row in rows:
        kept.append(row)
        parallel_documents.write_json({"about": about, "rows": kept}, path)
        print(json.dumps({key: row[key] for key in row if key != "kernels"}), flush=True)
    return int(any(row.get("problem") or row.get("right") is False for row in kept))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = commands.parser("bench.parallel_gpus", __doc__)
    parser.add_argument(
        "--output",
        type=commands.folder_name,
        default="out/parallel_gpus",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--minutes", type=positive_finite, help=f"for all steps; {_MINUTES:g} if not given"
    )
    parser.add_argument("--jobs", type=positive, help="steps that compile at once; one per core")
    parser.add_argument(
        "--ranks", type=up_to(FULL.num_experts), help="devices; all GPUs, or two CPU devices"
    )
    parser.add_argument("--only", help="steps whose name holds one of these, by commas")
    parser.add_argument(
        "--resume", action="store_true", help="leave out the steps that have ended well"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that --output holds"
    )
    parser.add_argument(
        "--documents", action="store_true", help="write them again, measure nothing"
    )
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        environment.prepare_process()
        parallel.devices_for(args.ranks or 2)
        environment.enable_compilation_cache()
        name, *what = args.step
        try:
            return run_step(name, what, args.ranks or jax.device_count(), args.output)
        except FileError as error:
            print(error, file=sys.stderr)
            return 1
    try:
        if args.documents:
            for name in ("minutes", "jobs", "ranks", "only", "resume", "overwrite"):
                value = getattr(args, name)
                if value is not None and value is not False:
                    raise ValueError(f"--documents: reads --output alone, got --{name} too")
            return _documents_again(args.output)
        return _measure(parser, args)
    except ValueError as error:
        print(f"python -m bench.parallel_gpus: {error}", file=sys.stderr)
        return 2
    except FileError as error:
        print(error, file=sys.stderr)
        return 1


def _measure(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Runs the steps that were asked for; returns the exit code."""
    minutes = _MINUTES if args.minutes is None else args.minutes
    others = ["--minutes", f"{minutes:g}"]
    others += [] if args.jobs is None else ["--jobs", str(args.jobs)]
    others += [] if args.only is None else ["--only", args.only]
    others += [f"--{name}" for name in ("resume", "overwrite") if getattr(args, name)]
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite contradict each other")
    if args.only == "":
        raise ValueError("--only: expected names of steps, or parts of them, got nothing")
    if args.ranks is not None:
        _check_ranks(args.ranks)
    steps = steps_of(args.output, args.only or "", args.ranks, others)
    try:
        commands.folder(str(args.output))
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --output: {error}")
    wanted = [step.name for step in steps]
    with parallel_folder.opened(
        args.output, wanted, NAMES, args.ranks, resume=args.resume, overwrite=args.overwrite
    ) as left:
        steps = [step for step in steps if step.name in left]
        try:
            code = run_all(steps, args.output, minutes, args.jobs or os.cpu_count() or 1)
        except KeyboardInterrupt:
            said = "--resume goes on, --documents writes what there is"
            if args.overwrite and not parallel_folder.results_in(args.output, NAMES):
                said = "no step has results, what was there is as it was"
            print(f"interrupted: {said}", file=sys.stderr)
            return interruption.acknowledge()
        if args.overwrite and not parallel_folder.results_in(args.output, NAMES):
            print(f"no step has results: {shown(args.output)} is as it was", file=sys.stderr)
            return code
        return _write_documents(args.output) or code


def _check_ranks(ranks: int) -> None:
    """Before the steps start, each of which would find out by itself."""
    on_gpu = environment.has_gpu_driver()
    experts = (FULL if on_gpu else REDUCED).num_experts
    if experts % ranks:
        raise ValueError(f"--ranks: expected a divisor of {experts} experts, got {ranks}")
    if on_gpu and ranks > (most := parallel_folder.num_devices()):
        raise ValueError(f"--ranks: expected at most {most} GPUs, got {ranks}")


def _documents_again(folder: Path) -> int:
    """Writes the documents of a run that is there; returns the exit code."""
    try:
        with contextlib.ExitStack() as stack:
            with naming(folder):
                is_there = folder.is_dir()
            if is_there:
                stack.enter_context(parallel_folder.held(folder, NAMES))
            if not parallel_folder.holds_a_run(folder, NAMES):
                raise ValueError(f"{shown(folder)}: there is no run")
            return _write_documents(folder)
    except ValueError as error:
        raise ValueError(f"--documents: {error}") from None


def _write_documents(folder: Path) -> int:
    for path in parallel_documents.write(folder):
        print(f"wrote {shown(path)}")
    return 0


if __name__ == "__main__":
    interruption.exit_with(main)
