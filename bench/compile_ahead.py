"""Compiles the JAX solutions of a run in worker processes before anything is timed.

Lowering a Pallas kernel is seconds of Python, so threads do not help, and a full run has over a
hundred programs. The workers share the GPU and hand back serialized programs; the process that
times loads them. Whatever a worker cannot compile is compiled, or fails, where it is needed.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable

from bench import inputs
from bench.settings import Settings

MAX_WORKERS = 8


class Program(NamedTuple):
    """A compiled program as `jax.experimental.serialize_executable` makes it."""

    serialized: bytes
    in_tree: Any
    out_tree: Any

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Program":
        """Serializes a program.

        Raises:
            ValueError: It cannot be serialized.
            NotImplementedError: Likewise.
        """
        return cls(*serialize_executable.serialize(compiled))

    def load(self) -> jax.stages.Compiled:
        """Loads it as a program of its own, whose CUDA graph is not built yet."""
        return serialize_executable.deserialize_and_load(*self)


Programs = dict[tuple[str, int], Program]  # by solution and token count


def default_workers() -> int:
    """As many as the host carries beside the compilers' own threads."""
    return max(1, min(MAX_WORKERS, (os.cpu_count() or 1) // 2))


def compile_ahead(
    settings: Settings, jobs: Sequence[tuple[str, int]], done: Callable[[], None]
) -> Programs:
    """Compiles solutions for token counts, several at a time.

    Args:
        settings: Gives the workers, the sizes and the backend.
        jobs: JAX solutions without an untimed preparation, each with a token count.
        done: Told after each job.

    Returns:
        The programs; those that failed are missing.
    """
    programs: Programs = {}
    if not jobs:
        return programs
    pool = futures.ProcessPoolExecutor(
        min(settings.compile_workers, len(jobs)),
        multiprocessing.get_context("spawn"),  # a fork would inherit JAX's threads
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's business
    )
    with pool:
        submitted = {pool.submit(_compile, settings, *job): job for job in jobs}
        try:
            for future in futures.as_completed(submitted):
                if future.exception() is None:
                    programs[submitted[future]] = future.result()
                done()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return programs


def _compile(settings: Settings, name: str, num_tokens: int) -> Program:
    from bench.solutions import registry

    run = registry(settings.backend)[name].run
    specs = inputs.argument_specs(num_tokens, settings.sizes)
    return Program.of(jax.jit(run).lower(*specs).compile())
