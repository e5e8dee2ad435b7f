"""Checks and times FP8 mixture-of-experts solutions on the definition's 19 workloads.

python bench_main.py                                   # the right thing for this machine
python bench_main.py --list                            # what can run here, and why not
python bench_main.py --solutions=jax_moe,deepgemm --workloads=1,80,14107
python bench_main.py --solutions=sglang_v1,sglang_v2,jax_moe --report
python bench_main.py --scaling --breakdown --output=out/scaling    # on a GPU
python bench_main.py --model=kimi-k2 --solutions=jax_moe
python bench_main.py --shared_expert                   # what it adds to the layer
python bench_main.py --documents=out/bench/latest      # write a run's documents again
"""

import argparse
import contextlib
import logging
import math
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports last, just end

from bench import environment

if lacking := environment.lacking_packages():
    sys.exit(f"bench_main.py: needs {', '.join(lacking)}: pip install -e '.[bench]' in this folder")
environment.prepare_process()  # before jax and torch are imported

from absl import app, flags  # noqa: E402

from bench import (  # noqa: E402
    commands,
    gpu_clock,
    inputs,
    layers,
    parallel,
    routing,
    session,
    shared_expert,
    solutions,
    timers,
)
from bench.correctness import Tolerance  # noqa: E402
from bench.documents import Options  # noqa: E402
from bench.settings import CPU_ITERATIONS, Settings  # noqa: E402
from bench.workloads import FULL, MOST_LAYERS, sizes_of  # noqa: E402
from jax_moe import backends, models  # noqa: E402
from jax_moe.config import PRECISIONS, checked_precision  # noqa: E402
from pallas_kernels import interruption  # noqa: E402

USAGE_ERROR = 2

_SOLUTIONS = flags.DEFINE_list(
    "solutions", None, "Names from --list, or 'all'. Default: all on a GPU, the basics on a CPU."
)
_WORKLOADS = flags.DEFINE_list(
    "workloads", ["all"], "Token counts, first characters of uuids, or 'all'."
)
_MODEL = flags.DEFINE_enum(
    "model", models.DEEPSEEK_V3.name, models.names(), "Whose rank is measured, by sizes and router."
)
_NUM_LOCAL_EXPERTS = flags.DEFINE_integer(
    "num_local_experts", None, "Of the rank; a divisor of all. Default: the model's.", lower_bound=1
)
_BACKEND = flags.DEFINE_enum(
    "backend", "auto", ["auto", *backends.NAMES], "What the solution jax_moe runs."
)
_PRECISION = flags.DEFINE_enum(
    "precision", "fast", PRECISIONS, "At which the solution jax_moe runs."
)
_BATCH_INVARIANT = flags.DEFINE_bool(
    "batch_invariant", False, "Whether the solution jax_moe keeps a token's bits in any batch."
)
_INPUTS = flags.DEFINE_enum("inputs", "realistic", inputs.KINDS, "How inputs are made.")
_DATASET = flags.DEFINE_string("dataset", None, "flashinfer-trace folder of --inputs=dataset.")
_ROUTING = flags.DEFINE_enum(
    "routing",
    "moments",
    routing.PATTERNS,
    "Routing of generated inputs: the captured moments, or patterns of one local expert per token.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of all draws.", lower_bound=0, upper_bound=2**31 - 1)
_WARMUP = flags.DEFINE_integer("warmup", 10, "Untimed calls before the timed.", lower_bound=1)
_ITERATIONS = flags.DEFINE_integer(
    "iterations", 100, "Timed calls per trial; calls slower than 10 ms take fewer.", lower_bound=1
)
_NUM_TRIALS = flags.DEFINE_integer(
    "num_trials", 5, "Draws of activations, each checked and timed.", lower_bound=1
)
_RTOL = flags.DEFINE_float("rtol", 0.2, "Relative tolerance.", lower_bound=0)
_ATOL = flags.DEFINE_float("atol", 0.1, "Absolute tolerance.", lower_bound=0)
_RATIO = flags.DEFINE_float(
    "required_matched_ratio", 0.85, "Least share of right elements.", lower_bound=0, upper_bound=1
)
_TIMER = flags.DEFINE_enum(
    "timer", None, ["gpu", "wall"], "Whose times count. Default: gpu if there is one and torch."
)
_WALL_TIME = flags.DEFINE_bool("wall_time", True, "Also take host times in a --timer=gpu run.")
_COOL_DOWN = flags.DEFINE_float(
    "cool_down", 0.2, "Idle seconds before each row's timed calls. Default without a GPU: 0.",
    lower_bound=0, upper_bound=60,
)  # fmt: skip
_FLUSH = flags.DEFINE_enum(
    "flush", "write", timers.FLUSHES, "How the L2 is emptied before each timed call of a GPU."
)
_SUSTAINED = flags.DEFINE_bool("sustained", False, "Also time calls back to back for 0.5 s.")
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder of results, report and plots. Default: one per run in out/bench, linked as latest.",
)
_RESUME = flags.DEFINE_bool(
    "resume", False, "Keep the finished rows in --output, or of the latest run, and do the rest."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the run that --output holds.")
_DOCUMENTS = flags.DEFINE_string(
    "documents", None, "Write the documents of the run in this folder again, measure nothing."
)
_JOBS = flags.DEFINE_integer(
    "jobs", 0, "Processes that compile ahead; 0 compiles row by row, as --wall_time needs.",
    lower_bound=0,
)  # fmt: skip
_LIST = flags.DEFINE_bool("list", False, "List the solutions and what they need, then stop.")
_REPORT = flags.DEFINE_bool("report", False, "Also write the published comparison's document.")
_BREAKDOWN = flags.DEFINE_bool("breakdown", False, "Also show the time of every kernel.")
_PROFILE = flags.DEFINE_string("profile", None, "Folder for a Perfetto trace of each row.")
_RANKS = flags.DEFINE_integer(
    "ranks", None, "Time the layer over this many devices instead.",
    lower_bound=1, upper_bound=FULL.num_experts,
)  # fmt: skip
_LAYERS = flags.DEFINE_integer(
    "layers", None, "Time the layer so many times in one scan instead.",
    lower_bound=1, upper_bound=MOST_LAYERS,
)  # fmt: skip
_SHARED_EXPERT = flags.DEFINE_bool(
    "shared_expert", False, "Time what --model's shared expert adds to its layer instead."
)
_SCALING = flags.DEFINE_bool("scaling", False, "T = 1, 2, 4 ... 16384 instead of the workloads.")

_OF_JAX_MOE = (_BACKEND, _PRECISION, _BATCH_INVARIANT)
_READ_BY = {
    "list": ("backend", "model", "precision", "batch_invariant"),
    "documents": ("report", "breakdown"),
    "ranks": ("output", "overwrite"),
    "layers": ("output", "overwrite"),
    "shared_expert": ("model", "output", "overwrite"),
}
"""What other flags count beside one that asks for something other than timed solutions."""
_PARSED = {"int": "an integer", "float": "a number", "bool": "true or false"}
_NOT_PARSED = re.compile(
    r"flag --(\w+)=(.*): (?:invalid literal|could not convert|\('Non-boolean)", re.DOTALL
)
_OURS = [one.name for one in list(vars().values()) if isinstance(one, flags.FlagHolder)]

for _name in ("rtol", "atol", "required_matched_ratio", "cool_down"):
    flags.register_validator(_name, math.isfinite, "expected a finite number")


def _settings() -> Settings:
    """The flags, with what was left open filled in for this machine.

    Raises:
        ValueError: Flags contradict each other or the machine.
    """
    on_gpu = environment.default_backend() == "gpu"
    dataset, output = _folder(_DATASET), _folder(_OUTPUT)
    for flag in (_SOLUTIONS, _WORKLOADS):
        if flag.value is not None and not all(name.strip() for name in flag.value or [""]):
            raise ValueError(f"--{flag.name}: expected names separated by commas, got an empty one")
    if (_INPUTS.value == "dataset") != (_DATASET.value is not None):
        raise ValueError("--dataset=FOLDER and --inputs=dataset go together")
    if _SCALING.value and _INPUTS.value == "dataset":
        raise ValueError("--scaling has no data set: its token counts are not among the workloads")
    if _INPUTS.value == "dataset" and models.get(_MODEL.value) != models.DEEPSEEK_V3:
        raise ValueError(
            f"--dataset: holds {models.DEEPSEEK_V3.name}'s routing, got --model={_MODEL.value}"
        )
    if _INPUTS.value == "dataset" and _ROUTING.present:
        raise ValueError(f"--routing={_ROUTING.value}: is of generated inputs, not of --dataset")
    if (local := _NUM_LOCAL_EXPERTS.value) is not None:
        if _INPUTS.value == "dataset":
            raise ValueError("--num_local_experts: the workloads of --dataset are of ranks of 32")
        experts = sizes_of(models.get(_MODEL.value), reduced=not on_gpu).num_experts
        if experts % local:
            held = f"{experts} experts" if on_gpu else f"{experts} experts, all at reduced size"
            raise ValueError(f"--num_local_experts: expected a divisor of {held}, got {local}")
    if _FLUSH.present and not on_gpu:
        raise ValueError(f"--flush={_FLUSH.value}: is how a GPU's L2 is emptied; there is no GPU")
    missing = gpu_clock.unavailable_reason()
    if _TIMER.value == "gpu" and missing:
        raise ValueError(f"--timer=gpu: {missing}")
    timer = _TIMER.value or ("wall" if missing else "gpu")
    if _BREAKDOWN.value and timer != "gpu":
        raise ValueError(f"--breakdown: kernel times need --timer=gpu, {missing or 'got wall'}")
    if not _WALL_TIME.value and timer != "gpu":
        raise ValueError(f"--nowall_time: needs --timer=gpu, {missing or 'got wall'}")
    if _SUSTAINED.value and timer != "gpu":
        raise ValueError(f"--sustained: needs --timer=gpu, {missing or 'got wall'}")
    if _SOLUTIONS.value is not None:
        names = tuple(_SOLUTIONS.value)
        ours = [flag for flag in _OF_JAX_MOE if flag.value != flag.default]
        if ours and not {"jax_moe", "all"} & set(names):
            raise ValueError(
                f"--{ours[0].name}={ours[0].value}: is what the solution jax_moe runs, which "
                f"--solutions={','.join(names)} leaves out"
            )
    elif any(flag.present for flag in _OF_JAX_MOE):
        names = ("jax_moe",)
    else:
        names = solutions.default_names(on_gpu)
    few = not on_gpu
    return Settings(
        solutions=names,
        workloads=tuple(_WORKLOADS.value),
        model=models.get(_MODEL.value).name,
        num_local_experts=local,
        backend=_BACKEND.value,
        precision=checked_precision(_PRECISION.value),
        batch_invariant=_BATCH_INVARIANT.value,
        inputs=_INPUTS.value,
        dataset=None if dataset is None else str(dataset),
        routing=_ROUTING.value,
        seed=_SEED.value,
        warmup=1 if few and not _WARMUP.present else _WARMUP.value,
        iterations=CPU_ITERATIONS if few and not _ITERATIONS.present else _ITERATIONS.value,
        num_trials=1 if few and not _NUM_TRIALS.present else _NUM_TRIALS.value,
        tolerance=Tolerance(_RTOL.value, _ATOL.value, _RATIO.value),
        timer=timer,
        wall_time=_WALL_TIME.value,
        cool_down=0.0 if few and not _COOL_DOWN.present else _COOL_DOWN.value,
        flush=_FLUSH.value,
        sustained=_SUSTAINED.value,
        scaling=_SCALING.value,
        on_gpu=on_gpu,
        output=output,
    )


def _folder(flag: flags.FlagHolder) -> Path | None:
    """The folder that a flag names, with `~` for the user's home; None if it was not given."""
    if flag.value is None:
        return None
    try:
        return commands.folder_name(flag.value)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--{flag.name}: {error}") from None


def _check_mode(mode: str) -> None:
    """Refuses flags that are not read where something other than the solutions is asked for.

    Raises:
        ValueError: One was given; names it.
    """
    others = [name for name in _OURS if flags.FLAGS[name].present]
    others = [name for name in others if name != mode and name not in _READ_BY[mode]]
    if others:
        known = ", ".join(f"--{name}" for name in _READ_BY[mode])
        raise ValueError(f"--{mode}: reads {known} alone, got --{others[0]} too")


def _results(mode: Any) -> contextlib.AbstractContextManager[Path]:
    """The folder of the results of a mode, the module that measures it."""
    overwrite = _OVERWRITE.value
    return commands.results(_folder(_OUTPUT), mode.ROOT, mode.FILES, overwrite=overwrite)


def _documents(folder: Path) -> int:
    """Writes the documents of a finished run again."""
    options = Options(report=_REPORT.value, breakdown=_BREAKDOWN.value)
    return session.write_documents(folder, options)


def main(argv: Sequence[str]) -> int:
    """Runs what the flags say; returns the exit code."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; all options are flags, see --help")
        for mode in _READ_BY:
            if flags.FLAGS[mode].value is not None and flags.FLAGS[mode].value is not False:
                _check_mode(mode)
        if _LIST.value:
            environment.default_backend()  # or a line that says that there is none
            options = {flag.name: flag.value for flag in (_PRECISION, _BATCH_INVARIANT)}
            print(session.list_solutions(_BACKEND.value, _MODEL.value, **options))
            return session.OK
        for chatty in ("jax", "matplotlib"):  # absl shows INFO, such as "no TPU"
            logging.getLogger(chatty).setLevel(logging.WARNING)
        with interruption.remembered():
            if (folder := _folder(_DOCUMENTS)) is not None:
                return _documents(folder)
            if _RANKS.value is not None:
                with _results(parallel) as folder:
                    return parallel.run(_RANKS.value, folder)
            if _LAYERS.value is not None:
                with _results(layers) as folder:
                    return layers.run(_LAYERS.value, (), folder)
            if _SHARED_EXPERT.value:
                with _results(shared_expert) as folder:
                    return shared_expert.run(_MODEL.value, (), folder)
            environment.enable_compilation_cache()
            return session.execute(
                _settings(),
                Options(report=_REPORT.value, breakdown=_BREAKDOWN.value),
                resume=_RESUME.value,
                overwrite=_OVERWRITE.value,
                profile=_folder(_PROFILE),
                jobs=_JOBS.value,
            )
    except ValueError as error:
        print(f"bench_main.py: {error}", file=sys.stderr)
        return USAGE_ERROR


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; a wrong one is one line and exit code 2."""
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # --help was printed; absl would end with 1
        sys.exit(0)
    except (flags.Error, ValueError) as error:  # the second for a value of --no<flag>
        print(f"bench_main.py: {_reason(error)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def _reason(error: Exception) -> str:
    """What is wrong with a flag; where absl shows what Python's parsers say, our own words."""
    text = str(error)
    if found := _NOT_PARSED.match(text):
        name, value = found.groups()
        return f"--{name}: expected {_PARSED[flags.FLAGS[name].flag_type()]}, got {value!r}"
    return text.splitlines()[0]


if __name__ == "__main__":
    interruption.exit_with(lambda: app.run(main, flags_parser=_parse))
