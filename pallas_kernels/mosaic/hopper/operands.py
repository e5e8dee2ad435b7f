"""What a grouped matmul reads, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array

from pallas_kernels.mosaic.hopper.side_job import SideJob
from pallas_kernels.types import GroupPlan, Quantized


class Operands(NamedTuple):
    """Arrays in global memory; references to them inside of the kernel.

    Attributes:
        rows: In the order of the plan; the tokens, if they are gathered.
        plan: Without the fields that no matmul reads, which are None.
        row_token: Of the plan, if the rows are gathered; else None.
        weights: e4m3[E,N,K].
        weights_scale: f32[E,N/128,K/128].
        side_job: Inputs of the side job.
        zeros: What the kernel counts in, if it does (`counted_in`).
        tokens: In their own order, the rows of shared experts where `rows` lack them; else None.
    """

    rows: Quantized
    plan: GroupPlan
    row_token: Any
    weights: Any
    weights_scale: Any
    side_job: tuple[Any, ...]
    zeros: Any = None
    tokens: Quantized | None = None


def operands(
    rows: Quantized,
    plan: GroupPlan,
    weights: Array,
    weights_scale: Array,
    *,
    gather_rows: bool,
    side_job: SideJob | None,
    tokens: Quantized | None = None,
) -> Operands:
    """The operands of `grouped_matmul`, whose arguments these are."""
    return Operands(
        rows=rows,
        plan=plan._replace(row_token=None, pair_row=None),  # type: ignore[arg-type]
        row_token=plan.row_token if gather_rows else None,
        weights=weights,
        weights_scale=weights_scale,
        side_job=side_job.inputs if side_job else (),
        tokens=tokens,
    )
