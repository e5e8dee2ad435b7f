"""Plain jax.numpy: runs on anything XLA compiles for, and shows what each stage computes.

The matmuls visit the live tiles of the local experts only. Weights are dequantized to float32 one
expert at a time; activations are requantized between the matmuls exactly as the kernels do it,
or, with `precision="high"`, rounded to f16 under a power of two per row and 128 columns.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float8e4m3fn, Float32, Int32

from jax_moe.config import Precision, ScaleFormat
from jax_moe.device import device_of
from jax_moe.numerics import (
    dequantize_rows,
    dequantize_weight,
    matmul,
    power_of_two_scales,
    scaled_f16,
    swiglu,
    take,
    to_bits,
)
from jax_moe.router import route as route
from jax_moe.transforms import as_varying
from jax_moe.types import GroupPlan, Quantized
from pallas_kernels.scores import divide, multiply
from pallas_kernels.shapes import QUANT_BLOCK, max_rows

NAME = "xla"
KEEPS_LOWERED = False
layer = None
tiling_table = None

_MAX_E4M3 = 448.0
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
_MAX_BLOCK_M = 128


def unsupported_reason(platform: str, compute_capability: str | None) -> str | None:
    """Never: XLA runs everywhere."""
    return None


def quantize(
    x: Float[Array, "R C"], *, scale_format: ScaleFormat = "f32", precision: Precision = "fast"
) -> Quantized:
    """Rows to e4m3 or f16 with one scale per 128 columns; see `jax_moe.quantize`."""
    if precision == "high":
        return Quantized(*scaled_f16(x))
    rows, columns = x.shape
    blocks = x.astype(jnp.float32).reshape(rows, columns // QUANT_BLOCK, QUANT_BLOCK)
    blocks = jnp.where(jnp.abs(blocks) < _SMALLEST_NORMAL, 0.0, blocks)
    # Magnitudes as integers: XLA's float maximum over many rows may drop a NaN on a CPU.
    magnitude = lax.bitcast_convert_type(blocks, jnp.int32) & np.int32(0x7FFFFFFF)
    amax = lax.bitcast_convert_type(magnitude.max(axis=2, keepdims=True), jnp.float32)
    scales = divide(jnp.maximum(amax, _MAX_E4M3 * _SMALLEST_NORMAL), np.float32(_MAX_E4M3))
    if scale_format == "ue8m0":
        scales = power_of_two_scales(scales)
    # The cast alone would turn values above 464 into NaN.
    values = jnp.clip(divide(blocks, scales), -_MAX_E4M3, _MAX_E4M3).astype(jnp.float8_e4m3fn)
    return Quantized(values.reshape(rows, columns), scales[:, :, 0].T)


def plan_groups(
    topk_ids: Int32[Array, "T k"],
    local_expert_offset: Int32[Array, ""],
    *,
    num_local_experts: int,
    num_experts: int,
    expected_rows: float,
    precision: Precision = "fast",
    batch_invariant: bool = False,
) -> GroupPlan:
    """Counting sort of the local pairs by expert; see `jax_moe.plan_groups`.

    XLA picks a matmul's algorithm by its shape, so batch invariance takes tiles of one height.
    """
    num_tokens, top_k = topk_ids.shape
    block_m = _MAX_BLOCK_M if batch_invariant else _block_m(expected_rows)
    rows = max_rows(num_tokens, top_k, num_local_experts, block_m)

    local_ids = topk_ids - local_expert_offset
    is_local = (local_ids >= 0) & (local_ids < num_local_experts)
    is_local &= (topk_ids >= 0) & (topk_ids < num_experts)
    experts = jnp.arange(num_local_experts, dtype=jnp.int32)[None, None]
    hits = jnp.where(is_local, local_ids, -1)[:, :, None] == experts
    hits = hits.any(axis=1).astype(jnp.int32)  # [T, E_local]
    ranks = jnp.cumsum(hits, axis=0, dtype=jnp.int32) - hits
    group_sizes = hits.sum(axis=0, dtype=jnp.int32)

    tiles = (group_sizes + block_m - 1) // block_m
    tile_ends = jnp.cumsum(tiles, dtype=jnp.int32)
    group_offsets = (tile_ends - tiles) * block_m

    local_ids = jnp.where(is_local, local_ids, 0)
    pair_row = group_offsets[local_ids] + jnp.take_along_axis(ranks, local_ids, axis=1)
    tokens = lax.broadcasted_iota(jnp.int32, topk_ids.shape, 0)
    row_token = jnp.full((rows,), -1, jnp.int32)
    row_token = row_token.at[jnp.where(is_local, pair_row, rows)].set(tokens, mode="drop")

    tile_ids = jnp.arange(rows // block_m, dtype=jnp.int32)
    tile_expert = (tile_ids[:, None] >= tile_ends[None]).sum(axis=1, dtype=jnp.int32)
    return GroupPlan(
        group_sizes=group_sizes,
        group_offsets=group_offsets,
        row_token=row_token,
        pair_row=jnp.where(is_local, pair_row, -1),
        tile_expert=jnp.where(tile_expert < num_local_experts, tile_expert, 0),
        num_tiles=tile_ends[-1:],
    )


def _block_m(rows_per_expert: float) -> int:
    """Rows of a tile: few where few are expected, so that little of a tile is padding."""
    block_m = 8
    while block_m < min(rows_per_expert, _MAX_BLOCK_M):
        block_m *= 2
    return block_m


def up_project(
    hidden_states: Float[Array, "T H"],
    hidden_states_scale: Float32[Array, "H//128 T"],
    gemm1_weights: Float8e4m3fn[Array, "E_local 2*I H"],
    gemm1_weights_scale: Float32[Array, "E_local 2*I//128 H//128"],
    plan: GroupPlan,
    *,
    swiglu_limit: float | None = None,
    scale_format: ScaleFormat = "f32",
    precision: Precision = "fast",
    batch_invariant: bool = False,
) -> Quantized:
    """Gather, GEMM1, SwiGLU, requantization; see `jax_moe.up_project`."""
    rows, intermediate = plan.row_token.shape[0], gemm1_weights.shape[1] // 2

    def tile(start: Array, weight: Array, out: Quantized) -> Quantized:
        tokens = lax.dynamic_slice_in_dim(plan.row_token, start, plan.block_m)  # -1: any row
        x = dequantize_rows(take(hidden_states, tokens), hidden_states_scale[:, tokens])
        hidden = swiglu(matmul(x, weight), swiglu_limit)
        values, scales = quantize(hidden, scale_format=scale_format, precision=precision)
        return Quantized(
            lax.dynamic_update_slice_in_dim(out.values, to_bits(values), start, 0),
            lax.dynamic_update_slice_in_dim(out.scales, scales, start, 1),
        )

    dtype = jnp.float16 if precision == "high" else jnp.float8_e4m3fn
    out = Quantized(
        to_bits(jnp.zeros((rows, intermediate), dtype)),
        jnp.zeros((intermediate // QUANT_BLOCK, rows), jnp.float32),
    )
    bits, scales = _for_each_live_tile(tile, gemm1_weights, gemm1_weights_scale, plan, out)
    return Quantized(lax.bitcast_convert_type(bits, dtype), scales)


def down_project(
    activations: Quantized,
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    plan: GroupPlan,
    *,
    batch_invariant: bool = False,
) -> Float[Array, "M H"]:
    """GEMM2, one row per pair, bf16 or f32; see `jax_moe.down_project`."""
    dtype = jnp.bfloat16 if activations.values.dtype == jnp.float8_e4m3fn else jnp.float32

    def tile(start: Array, weight: Array, out: Array) -> Array:
        rows = start + jnp.arange(plan.block_m, dtype=jnp.int32)
        x = dequantize_rows(take(activations.values, rows), activations.scales[:, rows])
        product = matmul(x, weight).astype(dtype)
        return lax.dynamic_update_slice_in_dim(out, to_bits(product), start, 0)

    out = to_bits(jnp.zeros((plan.row_token.shape[0], gemm2_weights.shape[1]), dtype))
    out = _for_each_live_tile(tile, gemm2_weights, gemm2_weights_scale, plan, out)
    return lax.bitcast_convert_type(out, dtype)


def _for_each_live_tile(
    tile: Callable[[Array, Array, Any], Any],
    weights: Array,
    weights_scale: Array,
    plan: GroupPlan,
    out: Any,
) -> Any:
    """`out = tile(first row, float32 weight, out)` for the tiles of every expert that has rows.

    The live experts come first in the loop instead of a `cond` inside it, which would copy `out`.
    """
    (live,) = jnp.nonzero(plan.group_sizes, size=plan.group_sizes.size, fill_value=0)

    def one_expert(i: Array, out: Any) -> Any:
        expert = live[i]
        weight = dequantize_weight(take(weights, expert), weights_scale[expert])
        first = plan.group_offsets[expert]
        tiles = (plan.group_sizes[expert] + plan.block_m - 1) // plan.block_m
        return lax.fori_loop(
            0, tiles, lambda j, out: tile(first + j * plan.block_m, weight, out), out
        )

    out = as_varying(out, (weights, weights_scale, plan))
    return lax.fori_loop(0, (plan.group_sizes > 0).sum(dtype=jnp.int32), one_expert, out)


def unpermute(
    expert_outputs: Float[Array, "M H"],
    topk_weights: Float32[Array, "T k"],
    plan: GroupPlan,
    *,
    batch_invariant: bool = False,
    output_dtype: str = "bfloat16",
) -> Float[Array, "T H"]:
    """Weighted float32 sum of a token's local pairs; see `jax_moe.unpermute`.

    XLA fuses products with the sums after them for some T, so batch invariance keeps them apart.
    """
    product = multiply if batch_invariant else operator.mul
    num_tokens, top_k = topk_weights.shape
    total = jnp.zeros((num_tokens, expert_outputs.shape[1]), jnp.float32)
    for choice in range(top_k):
        rows = plan.pair_row[:, choice, None]
        values = take(expert_outputs, rows[:, 0]).astype(jnp.float32)
        weighted = product(values, topk_weights[:, choice, None])
        total += jnp.where(rows >= 0, weighted, 0)
    return total.astype(output_dtype)


def workspace_bytes(
    num_tokens: int,
    top_k: int,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    precision: Precision = "fast",
) -> int:
    """Bound on the temporary memory for up to 256 experts; see `jax_moe.workspace_bytes`."""
    rows = max_rows(num_tokens, top_k, num_local_experts, _MAX_BLOCK_M)
    one_expert = 3 * intermediate_size * hidden_size
    wider = 2 if precision == "high" else 1
    one_row = wider * (intermediate_size + 2 * hidden_size) + 4 * intermediate_size // QUANT_BLOCK
    one_tile = 4 * _MAX_BLOCK_M * (hidden_size + 2 * intermediate_size)
    one_token = 16 * 256 + 64 * top_k + 16 * num_local_experts  # routing and plan
    total = rows * one_row + 4 * one_expert + 4 * one_tile + num_tokens * one_token + (1 << 20)
    if precision == "high":  # f16 hidden states with their scales
        total += num_tokens * (2 * hidden_size + 4 * hidden_size // QUANT_BLOCK)
    if device_of().platform == "cpu":  # there XLA copies e4m3 arrays to see them as bytes
        total += num_local_experts * one_expert + num_tokens * hidden_size
    return total
