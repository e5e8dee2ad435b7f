"""The 19 published workloads, their definition, and routing drawn from the captured moments.

Neither torch nor jax.
"""

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float32

from interop import definitions

ROUTED_SCALING_FACTOR = 2.5  # in all 19 workloads


class Workload(NamedTuple):
    """One published workload: uuid, T, first local expert, id of its routing blob file."""

    uuid: str
    num_tokens: int
    local_expert_offset: int
    blob: str


def _load(name: str) -> Any:
    return json.loads(resources.files("interop").joinpath("data", name).read_text("utf-8"))


@functools.cache
def workloads() -> tuple[Workload, ...]:
    """The 19 workloads in published order."""
    return tuple(Workload(**row) for row in _load("workloads.json"))


def definition() -> dict[str, Any]:
    """The definition without reference source: axes, inputs in call order, outputs."""
    return dict(definitions.DEFAULT.record)


@functools.cache
def _moments() -> dict[str, Any]:
    return _load("routing_moments.json")


def captured_routing(
    num_tokens: int, rng: np.random.Generator, num_experts: int = 256
) -> tuple[Float32[np.ndarray, "T E"], BFloat16[np.ndarray, " E"]]:
    """Draws routing logits and bias like the one captured routing (workload 5e8dc11c).

    The logits are independent normals rounded to the bfloat16 grid, so exact ties occur as in the
    capture; the bias has two values. Real tokens are correlated, these are not.

    Args:
        num_tokens: T.
        rng: the source of the draw; the caller names its seed.
        num_experts: E. Below 256 the first columns of the draw are taken, above 256 the bias is
            repeated.

    Returns:
        `routing_logits` f32[T, E] and `routing_bias` bf16[E].
    """
    logits, bias = _moments()["routing_logits"], _moments()["routing_bias"]
    raw = rng.standard_normal((num_tokens, max(num_experts, 256))) * logits["std"] + logits["mean"]
    values = np.full(256, bias["low"], np.float32)
    values[bias["experts_with_high"]] = bias["high"]
    drawn = raw[:, :num_experts].astype(ml_dtypes.bfloat16).astype(np.float32)
    return drawn, np.resize(values, num_experts).astype(ml_dtypes.bfloat16)
