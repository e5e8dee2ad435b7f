"""The interpreter's look for races, and what it says, on every JAX of the window."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

from jax.experimental.pallas import mosaic_gpu as plgpu

# From 0.12 on, the first race would end the kernel; 0.11 has no such choice.
_GO_ON = {"on_race": "warn"} if hasattr(plgpu.InterpretGPUParams, "on_race") else {}
# The copies of one simulated TMA thread are ordered: with few threads that hides races.
INTERPRET = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=256, **_GO_ON)


@contextlib.contextmanager
def output() -> Iterator[io.StringIO]:
    """The text that the race detector writes: JAX 0.11 prints it, 0.12 logs it."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stdout(text):
            yield text
    finally:
        logging.getLogger().removeHandler(handler)
