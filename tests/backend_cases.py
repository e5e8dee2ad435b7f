"""Which backends a test runs on: `@pytest.mark.parametrize("case", ...)` and `running(case)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

import jax_moe
from jax_moe import backends

EVERYWHERE = [
    "xla",
    pytest.param("mosaic", marks=pytest.mark.gpu),
    pytest.param("triton", marks=pytest.mark.gpu),
]
"""All backends: the plain one on the CPU, the kernels on a GPU."""


def slow(*values: Any) -> Any:
    """A row of parameters that `make test` leaves out: others take the same path."""
    return pytest.param(*values, marks=pytest.mark.slow)


@contextlib.contextmanager
def running(case: str) -> Iterator[str]:
    """The backend's name, in the context it needs; skips where it does not run.

    `interpreted_mosaic` is the mosaic backend in the CPU interpreter: seconds a call.
    """
    name = case.removeprefix("interpreted_")
    with jax_moe.interpret_mode() if name != case else contextlib.nullcontext():
        if reason := backends.unsupported_reason(name):
            pytest.skip(f"{name}: {reason}")
        yield name
