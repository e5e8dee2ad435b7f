"""The arrays that travel between the kernels, by name.

Symbols: T tokens, E experts, E_local local experts, k = top_k, M rows of the worst case
(`shapes.max_rows`), block_m rows of a tile, R and C rows and columns of any matrix.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from jax import Array
from jaxtyping import Float8e4m3fn, Float16, Float32, Int32

type ScaleFormat = Literal["f32", "ue8m0"]
"""Scales of activations: any float32, or powers of two."""

type Precision = Literal["fast", "high"]
"""What activations are rounded to on their way: FP8, or 16 bits."""


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight.

    Attributes:
        topk_ids: i32[T,k], global expert ids, best first. From `route` they are distinct within a
            token and in 0..E-1. Elsewhere an id outside of 0..E-1 (-1, say) means "no expert", and
            an id that occurs twice counts with both weights.
        topk_weights: f32[T,k], the factors of the weighted sum, `routed_scaling_factor` included.
    """

    topk_ids: Int32[Array, "T k"]
    topk_weights: Float32[Array, "T k"]


class GroupPlan(NamedTuple):
    """Where each local (token, expert) pair sits among the rows of the grouped matmuls.

    Rows are expert-major: experts ascending, tokens ascending inside an expert, each expert padded
    to a multiple of `block_m`. Nothing reads a padding row or a dead tile into a result. A token
    that names one expert twice has one row there, which both of its pairs point to.

    With `block_m = 4`, tokens 0, 1, 2 choosing local experts {1}, {0, 1}, {1} and E_local = 2::

        group_sizes    1 3
        group_offsets  0 4
        row_token      1 -1 -1 -1   0 1 2 -1   -1 ...
        tile_expert    0            1           0 ...
        num_tiles      2

    Attributes:
        group_sizes: i32[E_local], live rows of each local expert.
        group_offsets: i32[E_local], first row of each expert, a multiple of block_m.
        row_token: i32[M], source token of each row; -1 in the padding of live tiles, anything past
            them.
        pair_row: i32[T,k], row of each (token, choice) pair; -1 where the expert is not local.
        tile_expert: i32[M/block_m], local expert of each tile; 0 in dead tiles.
        num_tiles: i32[1], live tiles; the rest is skipped.
    """

    group_sizes: Int32[Array, " E_local"]
    group_offsets: Int32[Array, " E_local"]
    row_token: Int32[Array, " M"]
    pair_row: Int32[Array, "T k"]
    tile_expert: Int32[Array, " tiles"]
    num_tiles: Int32[Array, " 1"]

    @property
    def block_m(self) -> int:
        """Rows of a tile (static, from the shapes)."""
        return self.row_token.shape[0] // max(self.tile_expert.shape[0], 1)


class Quantized(NamedTuple):
    """FP8 rows with one f32 scale per row and block of 128 columns; `values * scales` dequantizes.

    With `precision="high"` the values have 16 bits and the scales are powers of two.

    Attributes:
        values: e4m3[R,C]; f16[R,C] with "high".
        scales: f32[C/128,R], block-major: the orientation of `hidden_states_scale`.
    """

    values: Float8e4m3fn[Array, "R C"] | Float16[Array, "R C"]
    scales: Float32[Array, "C//128 R"]
