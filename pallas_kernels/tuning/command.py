"""The tuners' command line: which sizes to measure, and where the table goes."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels import device
from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.tuning import cache, search, table_format
from pallas_kernels.tuning.search import Sizes, Tuner
from pallas_kernels.tuning.table_format import Key, Table

type Tuners = Callable[[jax.Device], Tuner | str]
"""The tuner for a GPU, or why there is none, in a few words."""


NO_GPU = "needs an NVIDIA GPU, and JAX sees none"
GENERATION = "expected --folder too; the cache's tables are of one GPU kind"


class Options(NamedTuple):
    """How to measure.

    Attributes:
        iterations: Calls of each candidate.
        folder: Where tables go instead of the user's cache folder.
        generation: Whether a table is for all GPUs of this compute capability, as most shipped ones
            are, instead of this kind alone.
    """

    iterations: int
    folder: Path | None
    generation: bool = False


def main(argv: list[str], module: str, tuners: Tuners, default: Sizes = search.DEEPSEEK_V3) -> int:
    """Measures one rank's sizes; returns the exit code.

    Args:
        argv: Arguments.
        module: What `python -m` runs.
        tuners: Finds the tuner.
        default: Sizes of what the arguments do not name.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description="Measures tilings on this GPU and keeps the best ones in the cache folder. "
        "`python -m jax_moe.tune --model NAME` knows the sizes of models.",
    )
    for name, value in default._asdict().items():
        flag = _flag(name).removeprefix("argument ")
        parser.add_argument(flag, type=positive, default=value, help=f"default: {value}")
    add_options(parser)
    args = parser.parse_args(argv)
    sizes = Sizes(*(getattr(args, name) for name in Sizes._fields))
    if wrong := unfit(sizes):
        parser.error(wrong)
    return run(module, tuners, sizes, options_of(args))


def unfit(sizes: Sizes) -> str | None:
    """What the kernels do not take of some sizes, by the flag's name; None if they take all."""
    for name in ("hidden_size", "intermediate_size"):
        if (found := getattr(sizes, name)) % QUANT_BLOCK:
            return f"{_flag(name)}: expected a multiple of {QUANT_BLOCK}, got {found}"
    for name in ("num_local_experts", "top_k"):
        if (found := getattr(sizes, name)) > sizes.num_experts:
            return f"{_flag(name)}: expected at most the {sizes.num_experts} experts, got {found}"
    return None


def _flag(name: str) -> str:
    return f"argument --{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `Options`."""
    parser.add_argument("--iterations", type=positive, default=10, help="calls per candidate")
    parser.add_argument("--folder", type=_folder, help="where to write instead of the cache folder")
    parser.add_argument(
        "--generation",
        action="store_true",
        help="name the table for all GPUs of this compute capability; goes with --folder",
    )


def options_of(args: argparse.Namespace) -> Options:
    """The parsed arguments of `add_options`."""
    return Options(args.iterations, args.folder, args.generation)


def _folder(text: str) -> Path:
    """The type of an argument that is a folder to write into; it is made, with its parents."""
    if not text:  # pathlib's current directory, which nobody means by it
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    try:
        path = Path(text).expanduser()
        if path.exists() and not path.is_dir():
            raise ValueError("it is no folder")
        _make_writable(path)
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"expected a path, got {text!r}: that user has no home"
        ) from None
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot write there: {error}") from None
    return path


def _make_writable(folder: Path) -> None:
    """Makes a folder and writes to it: asked now, not after minutes."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def positive(text: str) -> int:
    """The type of an argument that is a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def run(module: str, tuners: Tuners, sizes: Sizes, options: Options) -> int:
    """Measures, writes the table and says what is in it.

    Args:
        module: Who runs, for messages.
        tuners: Finds the tuner.
        sizes: Of the rank that is measured.
        options: How to measure.

    Returns:
        The exit code.
    """
    if options.generation and options.folder is None:
        return _failed(f"{module}: --generation: {GENERATION}")
    gpu = device.local_gpu()
    tuner = tuners(gpu) if gpu is not None else NO_GPU
    if gpu is None or isinstance(tuner, str):
        return _failed(f"{module}: {tuner}")
    try:
        from tqdm import tqdm
    except ImportError:
        return _failed(f"{module}: needs the package tqdm (pip install tqdm)")
    serves = tuner.gpu.architecture if options.generation else gpu.device_kind
    key = Key(tuner.kernels.name, serves, sizes.of_table)
    try:
        path = (options.folder or cache.folder()) / key.file_name
        _make_writable(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        return _failed(f"{module}: cannot write the table: {error}")
    start = cache.nearest_shipped(tuner.kernels, tuner.gpu, sizes.of_table)
    with tqdm(unit="tiling") as progress:
        table, rows = search.tune(
            tuner, start, search.cupti_timer(options.iterations), sizes, progress
        )
    note = f"Measured by python -m {module} on an {gpu.device_kind}, at {_text_of(sizes)}."
    try:
        table_format.write(path, key, table, rows, note)
    except OSError as error:
        return _failed(f"{module}: cannot write the table: {error}")
    for line in _summary(start, table):
        print(line)
    used = "" if options.folder else "; programs started from now on use it"
    print(f"{path}: written{used}")
    return 0


def _failed(line: str) -> int:
    print(line, file=sys.stderr)
    return 1


def _text_of(sizes: Sizes) -> str:
    return ", ".join(f"{name}={value}" for name, value in sizes._asdict().items())


def _summary(start: Table[Any], table: Table[Any]) -> Iterator[str]:
    for block_m, pair in table.items():
        for role, config in pair._asdict().items():
            same = config == getattr(start[block_m], role)
            yield f"{role} {config}{' (as shipped)' if same else ''}"
