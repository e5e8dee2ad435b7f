"""What a grouped matmul reads, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Array, Float, Float8e4m3fn, Int32


class GroupedRows(NamedTuple):
    """Expert-major rows and where they lie; see docs/architecture.md for the plan's fields.

    With `row_token`, row r of the M rows is `values[row_token[r]]` and R, the rows of `values`, is
    anything; without, M is R.
    """

    values: Float8e4m3fn[Array, "R K"]
    scales: Float[Array, "K/128 R"]
    group_sizes: Int32[Array, "E"]
    group_offsets: Int32[Array, "E"]
    tile_expert: Int32[Array, "M/block_m"]
    num_tiles: Int32[Array, "1"]
    row_token: Int32[Array, "M"] | None = None

    @property
    def num_rows(self) -> int:
        """M."""
        return (self.values if self.row_token is None else self.row_token).shape[0]


class Operands(NamedTuple):
    """The kernel's references to global memory; `side_job` holds the inputs of the side job."""

    rows: GroupedRows
    weights: Any
    weights_scale: Any
    side_job: tuple[Any, ...]
