"""Processes beside this one that may use the GPU."""

import concurrent.futures as futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator


def _nothing() -> None:
    """A spawned process imports what it is to call, so that needs a name."""


@contextlib.contextmanager
def spawned(
    processes: int, start: Callable[[], None] = _nothing
) -> Iterator[futures.ProcessPoolExecutor]:
    """A pool of processes, which end with the block; what they have not begun by then is dropped.

    They leave memory to others, as JAX would not by itself, and share this process's environment.

    Args:
        processes: How many at most.
        start: Called in each before its first task; importable by name.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    spawn = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
    pool = futures.ProcessPoolExecutor(max(processes, 1), spawn, start)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
