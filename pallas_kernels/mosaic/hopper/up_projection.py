"""Up-projection: block-scaled grouped matmul with SwiGLU and 1x128 requantization fused in.

a tile multiplies block j of the up half and block j of the gate half of gemm1_weights
weight-major epilogue, 32 or 64 tokens at a time:
    consumer w    clamp, silu(gate) * up, f32[64, tokens] -> bf16, transposed to shared memory
    both          barrier
    consumer w    half of the tokens, one row per warp: amax over the 128 columns -> scale
                  -> e4m3 -> global memory
    both          barrier
token-major epilogue:
    consumer w    clamp, silu(gate) * up, f32[64 tokens, 128] -> bf16, amax over the 128 columns
                  -> scale -> e4m3 -> TMA store

f16 rows, 32 tokens at a time:
    as weight-major, but f32 -> shared memory, amax -> power of two -> f16 -> global memory,
    columns in the order of `widened.wgmma_order`

The clamp is there with a `swiglu_limit` only. Scales of the format "ue8m0" are taken from the bits
of amax, see `group_quant.power_of_two_scale`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float8e4m3fn, Int32

from pallas_kernels.mosaic import layouts, rounding
from pallas_kernels.mosaic.group_quant import E4M3_MAX, SMALLEST_NORMAL, power_of_two_scale
from pallas_kernels.mosaic.hopper import widened
from pallas_kernels.mosaic.hopper.consumer import Epilogue
from pallas_kernels.mosaic.hopper.grouped_matmul import grouped_matmul
from pallas_kernels.mosaic.hopper.matmul_config import CONSUMER_ROWS, NUM_CONSUMERS, MatmulConfig
from pallas_kernels.mosaic.hopper.side_job import SideJob
from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.types import GroupPlan, Quantized, ScaleFormat

# Without the care for denormals that `exp` and `/` take: 256 instructions per tile of 128 tokens.
_SIGMOID = """{
.reg .f32 power;
mul.f32 power, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 power, power;
add.f32 power, power, 0f3F800000;
rcp.approx.ftz.f32 $0, power;
}"""

_STAGED_TOKENS = 64
_WIDE_STAGED_TOKENS = 32


class _Activation(NamedTuple):
    """What is static in the epilogues; the fields are arguments of `up_projection`."""

    swiglu_limit: float | None
    scale_format: ScaleFormat
    interpreted: bool


class _Staging(NamedTuple):
    """Shared memory of the epilogues, and the barrier at which the consumers meet over it."""

    weight_major: Any
    token_major: Any
    consumers: Any


def up_projection(
    rows: Quantized,
    plan: GroupPlan,
    gemm1_weights: Float8e4m3fn[Array, "E 2*I H"],
    gemm1_weights_scale: Float[Array, "E 2*I/128 H/128"],
    *,
    config: MatmulConfig,
    swiglu_limit: float | None = None,
    scale_format: ScaleFormat = "f32",
    gather_rows: bool = False,
    side_job: SideJob | None = None,
    zeros: Int32[Array, " n"] | None = None,
    tokens: Quantized | None = None,
    num_shared_experts: int = 0,
    interpret=None,
) -> tuple[Quantized, Array | None]:
    """`silu(second half) * first half` of `rows @ gemm1_weights[expert].T`, requantized.

    Args:
        rows: Activations `[M, H]` in the order of the plan, or of tokens `[T, H]`; e4m3, or f16
            with columns in the order of `widened.wgmma_order` (in the interpreter as they are).
        plan: Where the rows of each expert lie.
        gemm1_weights: `e4m3[E, 2 I, H]`; the second half of the rows is the gate.
        gemm1_weights_scale: `f32[E, 2 I/128, H/128]`.
        config: Tile and pipeline; its `block_m` is that of the plan.
        swiglu_limit: Cuts the gate off above it, and the other half on both sides; NaN stays. None
            for no clamp.
        scale_format: Of the result's scales; those of an f16 result are always powers of two.
        gather_rows: Whether `rows` are tokens.
        side_job: As for `grouped_matmul`.
        zeros: As for `counted_in.run`.
        tokens: As for `grouped_matmul`.
        num_shared_experts: As for `grouped_matmul`.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `e4m3[M, I]`, of f16 rows `f16[M, I]` in that same order, and `f32[I/128, M]`, padding rows
        hold anything; and what `side_job` gives, None without one.

    Raises:
        ValueError: The configuration does not fit the GPU, the plan or `side_job`.
    """
    num_rows = plan.row_token.shape[0]
    intermediate_size = gemm1_weights.shape[1] // 2
    num_columns = intermediate_size // QUANT_BLOCK
    shape: Any = jax.ShapeDtypeStruct
    activation = _Activation(swiglu_limit, scale_format, interpret is not None)
    wide = widened.is_widened(rows)
    return grouped_matmul(
        rows,
        plan,
        gemm1_weights,
        gemm1_weights_scale,
        config=config,
        num_columns=num_columns,
        weight_blocks=lambda column: (column, num_columns + column),
        epilogue=Epilogue(
            weight_major=functools.partial(_weight_major_epilogue, activation),
            token_major=functools.partial(_token_major_epilogue, activation),
            out_type=Quantized(
                shape((num_rows, intermediate_size), jnp.float16 if wide else jnp.float8_e4m3fn),
                shape((num_columns, num_rows), jnp.float32),
            ),
            staging_types=_widened_staging_types(config) if wide else _staging_types(config),
        ),
        name="moe_up_projection",
        gather_rows=gather_rows,
        side_job=side_job,
        zeros=zeros,
        tokens=tokens,
        num_shared_experts=num_shared_experts,
        interpret=interpret,
    )


def _staging_types(config: MatmulConfig) -> _Staging:
    both = config.has_token_major_tiles  # room for either epilogue, so less for one of them
    staged_tokens = min(config.block_m, _STAGED_TOKENS // 2 if both else _STAGED_TOKENS)
    weight_major = (NUM_CONSUMERS, staged_tokens, CONSUMER_ROWS)
    token_major = (NUM_CONSUMERS, 2, CONSUMER_ROWS if both else 8, CONSUMER_ROWS)
    config.check_smem(2, math.prod(weight_major) * 2 + math.prod(token_major))
    tiling = plgpu.TilingTransform((8, CONSUMER_ROWS))
    return _Staging(
        weight_major=plgpu.SMEM(
            weight_major, jnp.bfloat16, transforms=(tiling, plgpu.SwizzleTransform(128))
        ),
        token_major=plgpu.SMEM(
            token_major, jnp.float8_e4m3fn, transforms=(tiling, plgpu.SwizzleTransform(64))
        ),
        consumers=plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
    )


def _widened_staging_types(config: MatmulConfig) -> _Staging:
    staged = (NUM_CONSUMERS, min(config.block_m, _WIDE_STAGED_TOKENS), CONSUMER_ROWS)
    config.check_smem(2, math.prod(staged) * 4, row_bytes=2)
    tiles = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    return _Staging(
        weight_major=plgpu.SMEM(staged, jnp.float32, transforms=tiles),
        token_major=(),
        consumers=plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
    )


def _weight_major_epilogue(
    activation: _Activation, accumulators, tile, width, outputs: Quantized, staging: _Staging
):
    """Weights x tokens: a token's 128 columns lie in both consumers, which synchronize for it."""
    warpgroup = lax.axis_index("warpgroup")
    layout = layouts.row_per_warp(CONSUMER_ROWS)
    staged = staging.weight_major
    wide = staged.dtype == jnp.float32  # f16 is rounded once, when the row's scale is known
    activated = _swiglu(accumulators, activation)
    activated = widened.transposed(activated) if wide else activated.astype(staged.dtype)
    chunk = staged.shape[1]
    for first in range(0, width, chunk):
        tokens = min(width - first, chunk)
        staged.at[warpgroup, pl.ds(0, tokens)].T[...] = activated[:, first : first + tokens]
        _sync_consumers(staging.consumers)
        mine = tokens // NUM_CONSUMERS
        staged_rows = [staged.at[i, pl.ds(warpgroup * mine, mine)] for i in range(NUM_CONSUMERS)]
        if wide:
            interpreted = activation.interpreted
            halves = [widened.load_rows(rows, interpreted=interpreted) for rows in staged_rows]
        else:
            halves = [plgpu.load(rows, layout=layout) for rows in staged_rows]
            halves = [half.astype(jnp.float32) for half in halves]
        amax = functools.reduce(lax.max, [jnp.max(jnp.abs(half), axis=1) for half in halves])
        if wide:
            scale, inverse = widened.power_of_two_scale(amax)
        else:
            scale, inverse = _scale_of(amax, activation.scale_format)
        inverse = lax.broadcast_in_dim(inverse, (mine, CONSUMER_ROWS), [0])
        row = pl.ds(tile.row + first + warpgroup * mine, mine)
        for i, half in enumerate(halves):
            column = tile.column * QUANT_BLOCK + i * CONSUMER_ROWS
            at = (row, pl.ds(column, CONSUMER_ROWS))
            values = half * inverse
            values = values.astype(jnp.float16) if wide else _to_e4m3(values)
            layouts.store(outputs.values, at, values)
        layouts.store(outputs.scales, (tile.column, row), scale)
        _sync_consumers(staging.consumers)


def _token_major_epilogue(
    activation: _Activation, accumulators, tile, width, outputs: Quantized, staging: _Staging
):
    """Tokens x weights: consumer w holds its 64 tokens' 128 columns and waits for no other."""
    warpgroup = lax.axis_index("warpgroup")
    # The barrier keeps both conversions, which then take two numbers at a time.
    activated = lax.optimization_barrier(_swiglu(accumulators, activation).astype(jnp.bfloat16))
    activated = activated.astype(jnp.float32)
    scale, inverse = _scale_of(jnp.max(jnp.abs(activated), axis=1), activation.scale_format)
    quantized = _to_e4m3(activated * lax.broadcast_in_dim(inverse, activated.shape, [0]))
    rows = pl.ds(tile.row + warpgroup * CONSUMER_ROWS, CONSUMER_ROWS)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for half in range(QUANT_BLOCK // CONSUMER_ROWS):
        first = half * CONSUMER_ROWS
        mine = staging.token_major.at[warpgroup, half]
        mine[...] = quantized[:, first : first + CONSUMER_ROWS]
        plgpu.commit_smem()
        columns = pl.ds(tile.column * QUANT_BLOCK + first, CONSUMER_ROWS)
        plgpu.copy_smem_to_gmem(mine, outputs.values.at[rows, columns])
    layouts.store(outputs.scales, (tile.column, rows), scale)


def _swiglu(accumulators, activation: _Activation):
    up, gate = accumulators
    limit = activation.swiglu_limit
    if limit is not None:  # minimum and maximum both keep NaN
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    if activation.interpreted:
        return gate * jax.nn.sigmoid(gate) * up
    return gate * rounding.map_registers(_SIGMOID, gate, layout=plgpu.Layout.WGMMA) * up


def _scale_of(amax, scale_format: ScaleFormat):
    """The scale of rows with such an amax, and its reciprocal."""
    if scale_format == "ue8m0":
        return power_of_two_scale(amax)
    scale = lax.max(amax, jnp.float32(E4M3_MAX * SMALLEST_NORMAL)) / E4M3_MAX
    return scale, 1.0 / scale


def _to_e4m3(scaled):
    return jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)


def _sync_consumers(barrier):
    """Both consumer warpgroups wait for each other; shared memory writes become visible."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
