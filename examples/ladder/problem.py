"""What every level of the ladder computes: inputs, the float32 reference, the error.

The problem is the first matmul (gemm1) of one rank of DeepSeek-V3: each token picks 8 of 256
experts, 32 of them are here, and the rows of an expert are multiplied by its weights. Rows come in
the order of a plan: expert by expert, each padded to whole tiles of `block_m` rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float8e4m3fn, Float32

from bench.gaussian import key_for, quantized_gaussian
from pallas_kernels.shapes import QUANT_BLOCK, cdiv, round_up
from pallas_kernels.types import GroupPlan, Quantized

FEW_ROWS = 8
"""Up to so many expected rows per expert, weights are the work; above, multiplications are."""


class Sizes(NamedTuple):
    """The constants of a rank's gemm1.

    Attributes:
        num_experts: Experts of all ranks.
        num_local_experts: Of this rank, the first ones.
        top_k: Experts per token.
        hidden_size: H, columns of a row.
        num_columns: 2I, rows of an expert's weights: up first, gate second.
    """

    num_experts: int
    num_local_experts: int
    top_k: int
    hidden_size: int
    num_columns: int


DEEPSEEK_V3 = Sizes(256, 32, 8, 7168, 4096)
TINY = Sizes(8, 2, 2, 1024, 256)

_SEED = 25  # of DeepSeek-V3's 32 experts, 16 tokens hit 13 and 8192 tokens bring 8179 rows


class Level(NamedTuple):
    """One level of the ladder.

    Attributes:
        number: 1 to 8.
        idea: What it adds, in a few words.
        run: `run(rows, plan, weights, weights_scale, interpret=None)`.
        block_m: Tokens of a tile, from the expected rows per expert.
        block_scales: Whether it takes scales that change along K; without, one scale per row.
        is_fused: Whether its result is SwiGLU's, quantized again, instead of bf16 sums.
    """

    number: int
    idea: str
    run: Callable[..., Any]
    block_m: Callable[[float], int]
    block_scales: bool = True
    is_fused: bool = False


class Problem(NamedTuple):
    """Inputs of a level.

    Attributes:
        rows: `e4m3[M, H]` and `f32[H/128, M]` in the order of the plan. Padding is NaN, so that a
            level that lets it into a result is caught.
        plan: Where the rows of each expert lie.
        weights: `e4m3[E, 2I, H]`.
        weights_scale: `f32[E, 2I/128, H/128]`.
    """

    rows: Quantized
    plan: GroupPlan
    weights: Float8e4m3fn[Array, "E 2*I H"]
    weights_scale: Float32[Array, "E 2*I/128 H/128"]


def expected_rows(sizes: Sizes, num_tokens: int) -> float:
    """Rows per expert, if routing is even."""
    return num_tokens * sizes.top_k / sizes.num_experts


def make_problem(level: Level, sizes: Sizes, num_tokens: int) -> Problem:
    """The inputs of a level; levels with the same tile share them."""
    block_m = level.block_m(expected_rows(sizes, num_tokens))
    return _make_problem(sizes, num_tokens, block_m, level.block_scales)


@functools.lru_cache(maxsize=2)
def _make_problem(sizes: Sizes, num_tokens: int, block_m: int, block_scales: bool) -> Problem:
    plan = jax.tree.map(jnp.asarray, make_plan(sizes, num_tokens, block_m))
    rows = _rows(num_tokens, sizes.hidden_size, plan.row_token)
    weights, weights_scale = _weights(sizes)
    if not block_scales:  # the first block's for all of K
        rows = rows._replace(scales=jnp.broadcast_to(rows.scales[:1], rows.scales.shape))
        weights_scale = jnp.broadcast_to(weights_scale[..., :1], weights_scale.shape)
    return Problem(rows, plan, weights, weights_scale)


def make_plan(sizes: Sizes, num_tokens: int, block_m: int) -> GroupPlan:
    """A plan of NumPy arrays, of random routing; its last tile, or more, is dead.

    Args:
        sizes: Of the rank.
        num_tokens: T.
        block_m: Tokens of a tile.
    """
    rng = np.random.default_rng(_SEED)
    popularity = rng.normal(0, 0.5, sizes.num_experts)  # some experts get more than others
    scores = popularity + rng.gumbel(size=(num_tokens, sizes.num_experts))
    topk_ids = np.argsort(-scores, axis=1)[:, : sizes.top_k]
    tokens_of = [np.flatnonzero((topk_ids == e).any(1)) for e in range(sizes.num_local_experts)]
    group_sizes = np.array([len(tokens) for tokens in tokens_of], np.int32)
    tiles = -(-group_sizes // block_m)
    offsets = (np.cumsum(tiles) - tiles) * block_m
    num_rows = round_up((int(tiles.sum()) + 1) * block_m, 32)
    row_token = np.full(num_rows, -1, np.int32)
    for offset, tokens in zip(offsets, tokens_of, strict=True):
        row_token[offset : offset + len(tokens)] = tokens
    tile_expert = np.zeros(num_rows // block_m, np.int32)
    tile_expert[: tiles.sum()] = np.repeat(np.arange(len(tiles)), tiles)
    fields: dict[str, Any] = {
        "group_sizes": group_sizes,
        "group_offsets": offsets.astype(np.int32),
        "row_token": row_token,
        "pair_row": np.zeros((1, 1), np.int32),  # for `unpermute`, which is not run here
        "tile_expert": tile_expert,
        "num_tiles": np.array([tiles.sum()], np.int32),
    }
    return GroupPlan(**fields)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rows(num_tokens: int, hidden_size: int, row_token: Array) -> Quantized:
    """Gaussian tokens, quantized, in the order of the plan."""
    key = key_for(0, 0)
    values, scales = quantized_gaussian(key, num_tokens, hidden_size, block_rows=1, std=1.0)
    values = jnp.where((row_token >= 0)[:, None], values[row_token], jnp.nan)
    return Quantized(values.astype(jnp.float8_e4m3fn), scales[row_token].T)


@functools.lru_cache(maxsize=1)
def _weights(sizes: Sizes) -> tuple[Array, Array]:
    """Gaussian weights, quantized by 128x128 blocks, so that sums are of order one."""
    std = sizes.hidden_size**-0.5

    def one_expert(expert: Array) -> tuple[Array, Array]:
        return quantized_gaussian(
            jax.random.fold_in(key_for(0, 1), expert),
            sizes.num_columns,
            sizes.hidden_size,
            block_rows=QUANT_BLOCK,
            std=std,
        )

    return jax.jit(lambda: lax.map(one_expert, jnp.arange(sizes.num_local_experts)))()


def specs(level: Level, sizes: Sizes, num_tokens: int) -> tuple[Any, ...]:
    """Shapes and dtypes of a problem, to compile without one."""
    block_m = level.block_m(expected_rows(sizes, num_tokens))
    shape: Any = jax.ShapeDtypeStruct
    plan = make_plan(sizes, num_tokens, block_m)
    num_rows, steps = len(plan.row_token), cdiv(sizes.hidden_size, QUANT_BLOCK)
    experts, columns = sizes.num_local_experts, sizes.num_columns
    return (
        Quantized(
            shape((num_rows, sizes.hidden_size), jnp.float8_e4m3fn),
            shape((steps, num_rows), jnp.float32),
        ),
        jax.tree.map(lambda array: shape(array.shape, array.dtype), plan),
        shape((experts, columns, sizes.hidden_size), jnp.float8_e4m3fn),
        shape((experts, columns // QUANT_BLOCK, steps), jnp.float32),
    )


@functools.partial(jax.jit, static_argnums=1)
def relative_error(problem: Problem, is_fused: bool, result: Any) -> Float32[Array, ""]:
    """Difference to a float32 matmul over that matmul, both in the Frobenius norm, live rows only.

    Args:
        problem: The inputs.
        is_fused: As in `Level`.
        result: Of the level: `bf16[M, 2I]`, or `Quantized` of `[M, I]`.
    """
    plan, block_m = problem.plan, problem.plan.block_m
    live = plan.row_token >= 0
    rows = jnp.where(live[:, None], _dequantized_rows(problem.rows), 0)
    found = _dequantized_rows(result) if is_fused else result.astype(jnp.float32)
    found = jnp.where(live[:, None], found, 0)

    def tile(tile_rows: Array) -> tuple[Array, Array]:
        first, expert = tile_rows
        x = lax.dynamic_slice_in_dim(rows, first, block_m)
        values, scales = problem.weights[expert], problem.weights_scale[expert]
        w = values.astype(jnp.float32) * jnp.repeat(
            jnp.repeat(scales, QUANT_BLOCK, 0), QUANT_BLOCK, 1
        )
        expected = jnp.matmul(x, w.T, precision=lax.Precision.HIGHEST)
        if is_fused:
            up, gate = jnp.split(expected, 2, axis=1)
            expected = gate * jax.nn.sigmoid(gate) * up
        difference = lax.dynamic_slice_in_dim(found, first, block_m) - expected
        return jnp.sum(difference**2), jnp.sum(expected**2)

    firsts = jnp.arange(len(plan.tile_expert), dtype=jnp.int32) * block_m
    difference, expected = lax.map(tile, (firsts, plan.tile_expert))
    return jnp.sqrt(jnp.sum(difference) / jnp.sum(expected))


def _dequantized_rows(rows: Quantized) -> Float32[Array, "M C"]:
    scales = jnp.repeat(rows.scales.T, QUANT_BLOCK, axis=1)
    return rows.values.astype(jnp.float32) * scales
