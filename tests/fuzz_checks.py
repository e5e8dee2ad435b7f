"""What must hold for a case of the fuzzer: the oracle, isolation, repetition, batch invariance.

The oracle is `jax_moe.reference`. Tokens whose choice of experts hangs on the last bits of a score
are left out of comparisons with it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import jax_moe
from jax_moe import LayerInputs, buckets
from tests import numpy_oracle
from tests.backend_cases import running
from tests.fuzz_cases import Case
from tests.moe_inputs import bits

# Sum form, |d| <= ATOL * rms of the row + RTOL * |reference|: e4m3 between the matmuls costs 2.5 %
# of a row's norm, so 0.1 is four standard deviations.
RTOL, ATOL, LEAST_MATCHED = 0.2, 0.1, 0.97
# Of its norm; half an ulp of e4m3 is 1/16 of one element at most. The largest element of a group
# is exact only where the scale is made for it.
MOST_ROW_ERROR = {"f32": 0.06, "ue8m0": 0.08, "high": 0.01}
TINY, HUGE = 1e-25, 1e30  # rows all below count as zero, rows above are not compared


class Outcome(NamedTuple):
    """What checking a case on one backend found.

    Attributes:
        problem: None if all held, else one line.
        rows: Rows compared with the oracle.
        worst: Their largest relative error.
    """

    problem: str | None
    rows: int
    worst: float


def oracle(case: Case) -> np.ndarray:
    """`f32[T, H]` from `jax_moe.reference`, run at the padded size, of which there are few.

    Activations that the layer quantizes to FP8 are quantized before, by NumPy.
    """
    inputs, count = case.inputs, case.padded
    values, scales = inputs.hidden_states, inputs.hidden_states_scale
    if scales is None and case.model.precision == "fast":
        form = case.model.config.scale_format
        values, scales = numpy_oracle.quantize(np.asarray(values, np.float32), form)
    padded = inputs._replace(
        routing_logits=buckets.pad(inputs.routing_logits, 0, count),
        hidden_states=buckets.pad(values, 0, count),
        hidden_states_scale=None if scales is None else buckets.pad(scales, 1, count),
    )
    out = jax_moe.reference(*padded.arguments, config=case.model.config)
    return np.asarray(out, np.float32)[: len(case.ids)]


def check(case: Case, expected: np.ndarray, backend: str) -> Outcome:
    """Runs a case on a backend, with and without its fault, twice, and some tokens alone."""

    def run(inputs: LayerInputs, num_tokens: int | None) -> np.ndarray:
        shape = inputs.hidden_states.shape
        with running(backend) as name:
            out = jax_moe.apply(
                *inputs.arguments, backend=name, num_tokens=num_tokens, **case.model.options
            )
        if out.dtype != jnp.bfloat16 or out.shape != shape:
            raise TypeError(f"expected bfloat16 {shape}, got {out.dtype} {out.shape}")
        return np.asarray(out)

    clean = run(case.inputs, case.num_tokens)
    outcome = compare(case, np.asarray(clean, np.float32), expected)
    if outcome.problem is None and case.model.batch_invariant:
        tokens = _a_few(case)
        alone = run(_of_tokens(case.inputs, tokens), None)
        differ = (bits(alone) != bits(clean)[tokens]).any(axis=1)
        if differ.any():
            row = tokens[np.argmax(differ)]
            problem = f"{differ.sum()} of {len(tokens)} rows differ in another batch: {row}, ..."
            outcome = outcome._replace(problem=problem)
    if outcome.problem is None:
        again = run(case.spoiled, case.num_tokens)
        differ = (bits(again) != bits(clean)).any(axis=1) & case.clear & ~case.touched
        if differ.any():
            what = "a second run" if case.fault is None else f"the fault {case.fault!r}"
            row = int(np.argmax(differ))
            outcome = outcome._replace(problem=f"{what} changed {differ.sum()} rows: {row}, ...")
    return outcome


def _a_few(case: Case) -> np.ndarray:
    """Up to 16 live tokens in any order."""
    live = len(case.ids) if case.num_tokens is None else case.num_tokens
    return np.random.default_rng([case.number, 6]).permutation(live)[:16]


def _of_tokens(inputs: LayerInputs, tokens: np.ndarray) -> LayerInputs:
    scales = inputs.hidden_states_scale
    return inputs._replace(
        routing_logits=inputs.routing_logits[tokens],
        hidden_states=inputs.hidden_states[tokens],
        hidden_states_scale=None if scales is None else scales[:, tokens],
    )


def compare(case: Case, found: np.ndarray, expected: np.ndarray) -> Outcome:
    """Holds the rows of a fault-free run, `[T, H]`, to the oracle's."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    tokens = np.arange(len(found))
    live = tokens < (len(found) if case.num_tokens is None else case.num_tokens)
    local = case.ids - case.inputs.local_expert_offset
    has_local = ((local >= 0) & (local < case.model.num_local)).any(axis=1)
    zero = ~live | (case.clear & ~has_local)
    if found[zero].any():
        row = tokens[zero][np.argmax(found[zero].any(axis=1))]
        return Outcome(f"row {row} has no expert here and is not zero", 0, 0.0)
    size = np.abs(expected).max(axis=1)
    rows = case.clear & live & (size < HUGE)  # NaN compares false
    found, expected, tokens = found[rows], expected[rows], tokens[rows]
    if not np.isfinite(found).all():
        row = tokens[np.argmax(~np.isfinite(found).all(axis=1))]
        return Outcome(f"row {row} is not finite, the oracle's is", 0, np.inf)
    small = size[rows] < TINY
    if (np.abs(found[small]) > 2 * TINY).any():
        return Outcome("a row that should be zero or tiny is not", 0, np.inf)
    found, expected, tokens = (x[~small] for x in (found, expected, tokens))
    if not len(found):
        return Outcome(None, int(small.sum()), 0.0)
    difference, norm = np.abs(found - expected), np.linalg.norm(expected, axis=1)
    errors = np.linalg.norm(difference, axis=1) / norm
    rms = norm[:, None] / expected.shape[1] ** 0.5
    matched = (difference <= ATOL * rms + RTOL * np.abs(expected)).mean(axis=1)
    is_high = case.model.precision == "high"
    most = MOST_ROW_ERROR["high" if is_high else case.model.config.scale_format]
    bad = (errors > most) | (matched < LEAST_MATCHED)
    problem = None
    if bad.any():
        i = int(np.argmax(np.where(bad, errors, 0)))
        problem = (
            f"{bad.sum()} of {len(bad)} rows differ, row {tokens[i]} by {errors[i]:.3f} of its "
            f"norm with {matched[i]:.3f} of it matched"
        )
    return Outcome(problem, int(rows.sum()), float(errors.max()))
