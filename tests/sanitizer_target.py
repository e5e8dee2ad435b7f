"""Runs every GPU kernel of a backend at small shapes, and checks what comes out.

    python -m tests.sanitizer_target mosaic

`make sanitize` runs this under compute-sanitizer. Its token counts meet every tile height, in both
precisions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import jax_moe
from jax_moe import LayerInputs, backends
from jax_moe.config import Precision
from pallas_kernels import interruption
from tests import numpy_oracle
from tests.moe_inputs import SMALL, bits, make_inputs, relative_error

TOKENS = (7, 100, 250, 1100)
"""1, 16, 32 and 144 rows expected of each of 32 experts, after padding; the last need more than one
program for the plan."""

HIGH_TOKENS = (7, 250)
"""Both tile heights of `precision="high"`."""

UNQUANTIZED_TOKENS = (21, 260)
"""Rows made ready in the routing's launch, and in one of their own."""

TO_ORACLE = 0.04  # "high" does not round the rows that the oracle gets rounded


def layers() -> Iterator[tuple[LayerInputs, Precision]]:
    """Arguments of `apply`: quantized ones, a K long enough to be cut, others to quantize."""
    cut = make_inputs(5, hidden_size=3584)
    unquantized = [_unquantized(make_inputs(num_tokens)) for num_tokens in UNQUANTIZED_TOKENS]
    precisions: dict[Precision, tuple[int, ...]] = {"fast": TOKENS, "high": HIGH_TOKENS}
    for precision, tokens in precisions.items():
        for num_tokens in tokens:
            yield make_inputs(num_tokens, seed=num_tokens), precision
        for inputs in (cut, *unquantized):
            yield inputs, precision


def _unquantized(inputs: LayerInputs) -> LayerInputs:
    x = np.random.default_rng(1).standard_normal(inputs.hidden_states.shape, np.float32)
    return inputs._replace(hidden_states=x, hidden_states_scale=None)


def run(backend: str) -> dict[str, Any]:
    """Runs the layer on all of them.

    Raises:
        AssertionError: A result is wrong.
    """
    errors = {}
    for inputs, precision in layers():
        out = jax_moe.apply(*inputs.arguments, config=SMALL, backend=backend, precision=precision)
        values = inputs
        if inputs.hidden_states_scale is None:
            x = numpy_oracle.quantize(inputs.hidden_states)
            values = inputs._replace(hidden_states=x[0], hidden_states_scale=x[1])
        expected = numpy_oracle.layer(*values.arguments, config=SMALL)
        error = relative_error(out, expected)
        assert error < TO_ORACLE, f"T={len(expected)}: {error}"
        assert not bits(out)[~expected.any(axis=1)].any()
        name = f"{precision} T={len(expected)} {inputs.hidden_states.dtype.name}"
        errors[name] = round(error, 4)
    return {"backend": backend, "relative_errors": errors}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the errors as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitizer_target")
    parser.add_argument("backend", choices=backends.NAMES)
    backend = parser.parse_args(argv).backend
    if reason := backends.unsupported_reason(backend):
        parser.error(f"{backend}: {reason}")
    print(json.dumps(run(backend)), flush=True)


if __name__ == "__main__":
    interruption.exit_with(main)
