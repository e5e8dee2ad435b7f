"""Whether an output is right: flashinfer-bench's matched ratio, its sum form, Frobenius error."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16


class Tolerance(NamedTuple):
    """When an element matches, and how many must.

    Attributes:
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        required_matched_ratio: Least share of matching elements.
    """

    rtol: float = 0.2
    atol: float = 0.1
    required_matched_ratio: float = 0.85


class Check(NamedTuple):
    """The comparison of one output with the reference.

    Attributes:
        matched_ratio: Share of elements that do not exceed both tolerances, as flashinfer-bench's
            low-bit evaluator counts them.
        matched_ratio_sum: Share of elements with `|d| <= atol + rtol * |reference|`.
        relative_error: Frobenius norm of the difference over that of the reference.
        problem: None if right, else one line on what is wrong.
    """

    matched_ratio: float
    matched_ratio_sum: float
    relative_error: float
    problem: str | None

    def worse(self, other: "Check") -> "Check":
        """The worst of both in every figure: a row is as good as its worst trial."""
        return Check(
            min(self.matched_ratio, other.matched_ratio),
            min(self.matched_ratio_sum, other.matched_ratio_sum),
            max(self.relative_error, other.relative_error),
            self.problem or other.problem,
        )


def check(
    output: BFloat16[Array, "T H"], reference: BFloat16[Array, "T H"], tolerance: Tolerance
) -> Check:
    """Compares one output with the reference, on the device, in one fused pass.

    Args:
        output: The solution's result.
        reference: The oracle's, computed in f32.
        tolerance: The bounds to apply.

    Returns:
        The figures and the verdict. A wrong shape or dtype, an Inf or a NaN is wrong whatever the
        ratio.
    """
    if output.shape != reference.shape:
        return _failed(f"wrong shape: expected {reference.shape}, got {output.shape}")
    if output.dtype != jnp.bfloat16:
        return _failed(f"wrong dtype: expected bfloat16, got {output.dtype}")
    if output.size == 0:
        return Check(1.0, 1.0, 0.0, None)
    counts = jax.device_get(_compare(output, reference, rtol=tolerance.rtol, atol=tolerance.atol))
    matched = float(counts["matched"]) / output.size
    matched_sum = float(counts["matched_sum"]) / output.size
    error, norm = float(counts["squared_error"]) ** 0.5, float(counts["squared_norm"]) ** 0.5
    relative = error / norm if norm > 0 else (0.0 if error == 0 else float("inf"))
    problem = None
    if not counts["finite"]:
        problem = "output holds Inf or NaN"
    elif matched < tolerance.required_matched_ratio:
        problem = f"matched ratio {matched:.4f} is below {tolerance.required_matched_ratio}"
    return Check(matched, matched_sum, relative, problem)


def _failed(problem: str) -> Check:
    return Check(0.0, 0.0, float("inf"), problem)


@functools.partial(jax.jit, static_argnames=("rtol", "atol"))
def _compare(output: Array, reference: Array, *, rtol: float, atol: float) -> dict[str, Array]:
    x, y = output.astype(jnp.float32), reference.astype(jnp.float32)
    difference, size = jnp.abs(x - y), jnp.abs(y)
    fails = (difference > atol) & (difference / (size + 1e-8) > rtol)
    return {
        "matched": jnp.sum(~fails & jnp.isfinite(x)),
        "matched_sum": jnp.sum(difference <= atol + rtol * size),
        "squared_error": jnp.sum(jnp.square(difference)),
        "squared_norm": jnp.sum(jnp.square(y)),
        "finite": jnp.all(jnp.isfinite(x)),
    }
