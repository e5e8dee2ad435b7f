"""Few tokens: their routing and their rows, made ready for the matmuls, in one launch.

    CTAs of the routing   4 tokens each, see `routing`
    CTAs of the rows      16 groups of 128 columns each, 4 per warp:
                          bf16, f16 or f32 -> e4m3 and scales        precision="fast"
                                           -> f16 and scales         "high"
                          e4m3             -> f16, exact             "high"

Neither waits for the other. As a launch of its own beside the routing the rows cost a few us: a
CUDA graph with two kernels at its root takes longer to start than a chain.

Groups are counted as they lie in memory, row by row, so that a single row fills whole warps. The
last CTA overlaps with the one before instead of masking: it writes the same bits twice.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.mosaic import group_quant, launch, layouts, routing
from pallas_kernels.mosaic.hopper import widened
from pallas_kernels.mosaic.indexed_memory import store_at
from pallas_kernels.shapes import QUANT_BLOCK, cdiv
from pallas_kernels.types import Precision, Quantized, Routing, ScaleFormat

MAX_TOKENS = 256
"""Of more tokens, launches that run side by side are as fast."""

_GROUPS = 16


def has_rows_to_prepare(
    hidden_states: Float[Array, "T H"], is_quantized: bool, precision: Precision
) -> bool:
    """Whether `route_and_prepare` takes these hidden states.

    Args:
        hidden_states: `[T, H]`.
        is_quantized: Whether they are e4m3, with scales.
        precision: Of the layer.
    """
    num_tokens, hidden_size = hidden_states.shape
    num_groups = num_tokens * hidden_size // QUANT_BLOCK
    is_ready = is_quantized and precision == "fast"
    return not is_ready and num_tokens <= MAX_TOKENS and num_groups >= layouts.ROWS_PER_WARPGROUP


def route_and_prepare(
    routing_logits: Float[Array, "T E"],
    routing_bias: Float[Array, " E"] | None,
    routed_scaling_factor: Float[Array, ""],
    hidden_states: Float[Array, "T H"],
    hidden_states_scale: Float32[Array, "H//128 T"] | None,
    *,
    scale_format: ScaleFormat = "f32",
    precision: Precision = "fast",
    interpret=None,
    **routing_options: Any,
) -> tuple[Routing, Quantized]:
    """Chooses experts, and makes rows as an up-projection of that precision takes them.

    Args:
        routing_logits: As `routing.route` takes them.
        routing_bias: As there.
        routed_scaling_factor: As there.
        hidden_states: `[T, H]`, see `has_rows_to_prepare`: f32, bf16 or f16, or e4m3 with "high".
        hidden_states_scale: Of e4m3, else None.
        scale_format: Of the scales that e4m3 gets here.
        precision: "fast" for e4m3, "high" for f16.
        interpret: Interpreter parameters, or None for the GPU.
        **routing_options: As `routing.route` takes them.

    Returns:
        What `routing.route` returns, and the rows. In f16 their columns are in the order of
        `widened.wgmma_order`, but for the interpreter.
    """
    chosen, (values, *scales) = launch.side_by_side(
        routing.blocks(
            routing_logits,
            routing_bias,
            routed_scaling_factor,
            **routing_options,
            interpret=interpret,
        ),
        _blocks_of_rows(
            hidden_states,
            is_quantized=hidden_states_scale is not None,
            scale_format=scale_format,
            precision=precision,
            interpret=interpret,
        ),
        kernel_name=routing.KERNEL_NAME,
        interpret=interpret,
    )
    scale = scales[0] if hidden_states_scale is None else hidden_states_scale
    return Routing(*chosen), Quantized(values.reshape(hidden_states.shape), scale)


def _blocks_of_rows(x, *, is_quantized, scale_format, precision, interpret) -> launch.Blocks:
    """Blocks that give values, a group per row, and scales where there are none yet."""
    num_rows, num_columns = x.shape
    num_groups = x.size // QUANT_BLOCK
    at_once = _GROUPS if num_groups >= _GROUPS else layouts.ROWS_PER_WARPGROUP
    dtype = jnp.float16 if precision == "high" else jnp.float8_e4m3fn
    values = jax.ShapeDtypeStruct((num_groups, QUANT_BLOCK), dtype)
    scales = jax.ShapeDtypeStruct((num_columns // QUANT_BLOCK, num_rows), jnp.float32)
    return launch.Blocks(
        num_blocks=cdiv(num_groups, at_once),
        inputs=(x.reshape(values.shape),),
        out_type=(values,) if is_quantized else (values, scales),
        body=functools.partial(
            _prepare, at_once=at_once, scale_format=scale_format, interpret=interpret
        ),
    )


def _prepare(block, x_gmem, values_gmem, *scales_gmem, at_once, scale_format, interpret):
    first = lax.min(block * at_once, jnp.int32(x_gmem.shape[0] - at_once))
    at = (pl.ds(first, at_once), pl.ds(0, QUANT_BLOCK))
    if values_gmem.dtype == jnp.float16:
        layout = widened.ROW_LAYOUT
        x = widened.load_rows(x_gmem.at[at], optimized=False, interpreted=bool(interpret))
        if not scales_gmem:
            layouts.store(values_gmem, at, x.astype(jnp.float16))
            return
        values, scale = widened.to_scaled_f16(x.astype(jnp.float32))
    else:
        layout = layouts.row_per_warp(QUANT_BLOCK)
        x = plgpu.load(x_gmem.at[at], layout=layout, optimized=False).astype(jnp.float32)
        values, scale = group_quant.to_e4m3(
            x, layout, scale_format=scale_format, interpret=interpret
        )
    layouts.store(values_gmem, at, values)
    of_row = layout.reduce(1)
    group = layouts.iota((at_once,), 0, of_row) + first
    num_blocks, num_rows = scales_gmem[0].shape
    row = lax.div(group, jnp.int32(num_blocks))
    offset = (group - row * num_blocks) * num_rows + row
    store_at(scales_gmem[0], offset, scale, layout=of_row, interpret=interpret)
