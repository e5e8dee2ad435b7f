"""Checks and times a level: in the CPU interpreter at a tiny size, on a Hopper GPU at full size."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

import jax_moe.device
from bench import environment, gpu_clock, roofline, timers
from examples.ladder.problem import (
    DEEPSEEK_V3,
    TINY,
    Level,
    Problem,
    Sizes,
    make_problem,
    relative_error,
)
from pallas_kernels.mosaic import hopper
from pallas_kernels.shapes import QUANT_BLOCK

FEW_TOKENS, MANY_TOKENS = 16, 8192
TINY_FEW_TOKENS, TINY_MANY_TOKENS = 8, 400
NUM_CALLS = 20

# Per second, by the data sheets: bytes of HBM, and dense FP8 operations.
_DATA_SHEETS = {"H200": (4.8e12, 1.979e15), "H100": (3.35e12, 1.979e15)}


class Rates(NamedTuple):
    """What the roofline is computed from.

    Attributes:
        bytes_per_s: Reads of HBM.
        flops_per_s: Dense FP8 operations.
        source: Where both are from.
    """

    bytes_per_s: float
    flops_per_s: float
    source: str


class Measured(NamedTuple):
    """One level at one number of tokens.

    Attributes:
        number: Of the level.
        idea: Of the level.
        num_tokens: T.
        relative_error: To a float32 matmul, in the Frobenius norm.
        time_us: Median of the calls; None in the interpreter.
        floor_us: The least time at the rates; None in the interpreter.
    """

    number: int
    idea: str
    num_tokens: int
    relative_error: float
    time_us: float | None
    floor_us: float | None

    @property
    def fraction(self) -> float | None:
        """Of the roofline."""
        return self.floor_us / self.time_us if self.time_us and self.floor_us else None

    def __str__(self) -> str:
        """One line."""
        line = f"level {self.number} {self.idea}: T={self.num_tokens}, "
        line += f"relative error {self.relative_error:.1e}"
        if self.time_us is None or self.fraction is None:
            return f"{line} (interpreted)"
        return f"{line}, {self.time_us:.1f} us, {self.fraction:.0%} of the roofline"


class Gpu:
    """The clock and the rates of a Hopper GPU; made before anything that is to be timed."""

    def __init__(self) -> None:
        """Attaches the profiler and probes the two rates, where torch and Triton are there."""
        has_clock = gpu_clock.unavailable_reason() is None
        self._clock = gpu_clock.GpuClock() if has_clock else None
        self.timer = "GPU time by torch's profiler" if has_clock else "host time; torch is missing"
        self.rates = self._rates()

    def _rates(self) -> Rates:
        if probed := roofline.measure(self._clock):
            return Rates(probed.read_bytes_per_s, probed.fp8_flops_per_s, probed.probes)
        kind = jax.devices()[0].device_kind
        known = [rates for name, rates in _DATA_SHEETS.items() if name in kind]
        if not known:
            names = list(_DATA_SHEETS)
            raise RuntimeError(f"expected torch and Triton, or one of {names}, got {kind}")
        return Rates(*known[0], source=f"data sheet of {kind}")

    def time_us(self, program: jax.stages.Compiled, problem: Problem) -> float:
        """The median time of a call with a cold L2."""
        run = timers.Execution(lambda: program(*problem), jax.block_until_ready, "jit", None)
        timers.warm_up(run, 3)
        if self._clock is None:
            return statistics.median(timers.wall_times(run, NUM_CALLS))
        return statistics.median(sample.span_us for sample in self._clock.time(run, NUM_CALLS))


def floor_us(level: Level, sizes: Sizes, problem: Problem, rates: Rates) -> float:
    """The least time: bytes over the read rate or operations over the FP8 rate, the longer one.

    Only live rows and the experts that are hit count, each byte once.
    """
    rows = int(problem.plan.group_sizes.sum())
    hit_experts = int((problem.plan.group_sizes > 0).sum())
    columns, hidden = sizes.num_columns, sizes.hidden_size
    row_bytes = hidden + 4 * hidden // QUANT_BLOCK
    row_bytes += columns // 2 + 4 * columns // 2 // QUANT_BLOCK if level.is_fused else 2 * columns
    expert_bytes = columns * hidden + 4 * columns * hidden // QUANT_BLOCK**2
    moved = hit_experts * expert_bytes + rows * row_bytes
    flops = 2 * rows * columns * hidden
    return 1e6 * max(moved / rates.bytes_per_s, flops / rates.flops_per_s)


def run(level: Level, sizes: Sizes, num_tokens: int, gpu: Gpu | None) -> Measured:
    """Runs a level once, checks it, and times it on a GPU.

    Args:
        level: Which one.
        sizes: Of the rank.
        num_tokens: T.
        gpu: None runs the interpreter.

    Raises:
        RuntimeError: The result is wrong; a wrong result has no time.
    """
    problem = make_problem(level, sizes, num_tokens)
    call = jax.jit(lambda *arrays: level.run(*arrays, interpret=jax_moe.device.interpret_params()))
    with jax.enable_x64(False):  # the kernels' integers have 32 bits
        program = call.lower(*problem).compile()
    error = float(relative_error(problem, level.is_fused, program(*problem)))
    limit = max_error(level)
    if not error <= limit:  # NaN is wrong, too
        raise RuntimeError(
            f"level {level.number}: expected a relative error up to {limit}, got {error}"
        )
    if gpu is None:
        return Measured(level.number, level.idea, num_tokens, error, None, None)
    time = gpu.time_us(program, problem)
    floor = floor_us(level, sizes, problem, gpu.rates)
    return Measured(level.number, level.idea, num_tokens, error, time, floor)


def max_error(level: Level) -> float:
    """What a right result may differ by.

    Rounding to bf16 costs 1.7e-3 and requantizing to e4m3 2.6e-2; sums that stay in the tensor
    cores for all of K are not much better than bf16.
    """
    if level.is_fused:
        return 4e-2
    return 2.5e-3 if level.block_scales else 5e-3


def run_all(levels: list[Level], gpu: Gpu | None) -> Iterator[Measured]:
    """Few tokens and many, for each level."""
    sizes = DEEPSEEK_V3 if gpu else TINY
    few, many = (FEW_TOKENS, MANY_TOKENS) if gpu else (TINY_FEW_TOKENS, TINY_MANY_TOKENS)
    for level in levels:
        for num_tokens in (few, many):
            yield run(level, sizes, num_tokens, gpu)


def find_gpu() -> Gpu | None:
    """The Hopper GPU of this process; None where there is no GPU. Call it before JAX is used.

    Raises:
        RuntimeError: The GPU is another one.
    """
    environment.prepare_process()
    if not environment.has_gpu_driver():
        jax.config.update("jax_platforms", "cpu")  # or JAX's CUDA plugin complains
    if jax.default_backend() != "gpu":
        return None
    capability = jax.devices()[0].compute_capability
    if capability != hopper.COMPUTE_CAPABILITY:
        raise RuntimeError(
            f"expected a Hopper GPU of compute capability {hopper.COMPUTE_CAPABILITY}, got "
            f"{jax.devices()[0].device_kind} of {capability}; "
            "JAX_PLATFORMS=cpu NPROC=16 interprets"
        )
    return Gpu()


def main(level: Level, argv: Sequence[str] | None = None) -> None:
    """What `python examples/ladder/level_....py` does: check, time, print."""
    description = (
        f"Level {level.number} of the ladder, {level.idea}: checked and timed on a Hopper GPU, "
        "checked in the interpreter on a CPU."
    )
    argparse.ArgumentParser(description=description).parse_args(argv)
    gpu = find_gpu()
    if gpu:
        print(f"{jax.devices()[0].device_kind}, {gpu.timer}, {gpu.rates.source}")
        _print_each(run_all([level], gpu))
        return
    with jax_moe.interpret_mode():
        _print_each(run_all([level], None))


def _print_each(measured: Iterator[Measured]) -> None:
    for one in measured:
        print(one, flush=True)
