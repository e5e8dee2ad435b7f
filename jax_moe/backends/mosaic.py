"""The stages as Pallas Mosaic GPU kernels for Hopper (compute capability 9.0).

In `jax_moe.interpret_mode` the same kernels run in the CPU interpreter, on two simulated
multiprocessors.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Float32, Int32

from jax_moe.backends import in_precision, of_live_tokens, precision_of
from jax_moe.config import MoEConfig, Precision, ScaleFormat
from jax_moe.device import interpret_params
from jax_moe.numerics import scaled_f16
from jax_moe.types import GroupPlan, LayerInputs, Quantized, RoutedInputs, Routing
from pallas_kernels.mosaic import group_quant, hopper, permute, routing, tilings
from pallas_kernels.mosaic import plan as plan_kernels
from pallas_kernels.mosaic import unpermute as unpermute_kernel
from pallas_kernels.mosaic.hopper import widened, zero_rows
from pallas_kernels.mosaic.hopper.counted_in import num_zeros
from pallas_kernels.mosaic.hopper.down_projection import down_projection
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig, has_spare_warps
from pallas_kernels.mosaic.hopper.side_job import SideJob
from pallas_kernels.mosaic.hopper.up_projection import up_projection
from pallas_kernels.mosaic.routing_and_rows import has_rows_to_prepare, route_and_prepare
from pallas_kernels.shapes import QUANT_BLOCK, max_rows

NAME = "mosaic"
KEEPS_LOWERED = True  # Pallas lowers these kernels in Python, which takes seconds

_INTERPRETED_SMS = 2
_TMA_ROWS = 8  # of a swizzled tile: TMA takes tokens in such groups
_CHOOSE = {"fast": tilings.choose, "high": tilings.choose_widened}


def unsupported_reason(platform: str, compute_capability: str | None) -> str | None:
    """Why the kernels cannot run there: they are built on Hopper's wgmma and TMA."""
    if platform == "gpu" and compute_capability == hopper.COMPUTE_CAPABILITY:
        return None
    return f"needs an NVIDIA GPU of compute capability {hopper.COMPUTE_CAPABILITY} (Hopper)"


def route(
    routing_logits: Float[Array, "T E"],
    routing_bias: Float[Array, " E"] | None,
    routed_scaling_factor: Float32[Array, ""],
    *,
    config: MoEConfig,
    batch_invariant: bool = False,
    num_shared_experts: int = 0,
) -> Routing:
    """Group-limited top-k; see `jax_moe.stages.route_with_shared`."""
    return routing.route(
        routing_logits.astype(jnp.float32),
        routing_bias,
        routed_scaling_factor,
        **config.routing_options,
        num_shared_experts=num_shared_experts,
        interpret=interpret_params(),
    )


def quantize(
    x: Float[Array, "R C"], *, scale_format: ScaleFormat = "f32", precision: Precision = "fast"
) -> Quantized:
    """Rows to e4m3 or f16 with one scale per 128 columns; see `jax_moe.quantize`."""
    if precision == "high":
        return Quantized(*scaled_f16(x))  # left to XLA, which makes one pass or two of it
    return group_quant.quantize(x, scale_format=scale_format, interpret=interpret_params())


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
    """Local pairs to expert-major rows; see `jax_moe.plan_groups`.

    Batch invariance changes no tile: all widths sum alike, where K is in one segment.
    """
    return plan_kernels.plan_groups(
        topk_ids,
        jnp.asarray(local_expert_offset),
        num_local_experts=num_local_experts,
        num_experts=num_experts,
        block_m=_block_m(expected_rows, precision),
        interpret=interpret_params(),
    )


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
    rows = in_precision(Quantized(hidden_states, hidden_states_scale), precision)
    activations, _ = _up(
        _reordered(rows),
        gemm1_weights,
        gemm1_weights_scale,
        plan,
        swiglu_limit=swiglu_limit,
        scale_format=scale_format,
        batch_invariant=batch_invariant,
    )
    return _reordered(activations)


def layer(
    inputs: LayerInputs | RoutedInputs,
    num_tokens: Array | None,
    *,
    num_experts: int,
    expected_rows: float,
    config: MoEConfig | None = None,
    swiglu_limit: float | None = None,
    scale_format: ScaleFormat = "f32",
    precision: Precision = "fast",
    batch_invariant: bool = False,
    output_dtype: str = "bfloat16",
    num_shared_experts: int = 0,
) -> Float[Array, "T H"]:
    """All stages.

    The rows are made ready beside the routing. The plan's kernel clears what the matmuls count in.
    Where the up-projection has a warp to spare, it writes the zeros of tokens without a local
    expert meanwhile, and `unpermute` the other tokens only.
    """
    rows, inputs = _rows_and_routing(inputs, config, scale_format, precision)
    weights, interpret = inputs.weights, interpret_params()
    plan, zeros = plan_kernels.plan_with_zeros(
        of_live_tokens(inputs.routing.topk_ids, num_tokens),
        jnp.asarray(inputs.local_expert_offset),
        num_local_experts=weights.num_local_experts,
        num_experts=num_experts,
        block_m=_block_m(expected_rows, precision),
        zeros=(num_zeros(),) * 2 if interpret is None else (),
        interpret=interpret,
    )
    up_zeros, down_zeros = zeros or (None, None)
    activations, zeroed = _up(
        rows,
        weights.gemm1_weights,
        weights.gemm1_weights_scale,
        plan,
        swiglu_limit=swiglu_limit,
        scale_format=scale_format,
        batch_invariant=batch_invariant,
        side_job=_zeroing(weights.gemm1_weights, plan, precision),
        zeros=up_zeros,
        num_shared_experts=num_shared_experts,
    )
    expert_outputs = _down(
        activations,
        weights.gemm2_weights,
        weights.gemm2_weights_scale,
        plan,
        batch_invariant=batch_invariant,
        zeros=down_zeros,
    )
    return unpermute(
        expert_outputs, inputs.routing.topk_weights, plan, zeroed, output_dtype=output_dtype
    )


def _rows_and_routing(
    inputs: LayerInputs | RoutedInputs,
    config: MoEConfig | None,
    scale_format: ScaleFormat,
    precision: Precision,
) -> tuple[Quantized, RoutedInputs]:
    """The rows as the up-projection takes them, and the inputs once experts are chosen."""
    if isinstance(inputs, RoutedInputs):
        return _rows_first(inputs, scale_format, precision)
    assert config is not None
    given = inputs.hidden_states, inputs.hidden_states_scale
    if has_rows_to_prepare(given[0], given[1] is not None, precision):
        chosen, rows = route_and_prepare(
            inputs.routing_logits.astype(jnp.float32),
            inputs.routing_bias,
            inputs.routed_scaling_factor,
            *given,
            **config.routing_options,
            scale_format=scale_format,
            precision=precision,
            interpret=interpret_params(),
        )
        return rows, inputs.routed(chosen)
    rows, inputs = _rows_first(inputs, scale_format, precision)
    chosen = route(
        inputs.routing_logits, inputs.routing_bias, inputs.routed_scaling_factor, config=config
    )
    return rows, inputs.routed(chosen)


def _rows_first[Inputs: (LayerInputs, RoutedInputs)](
    inputs: Inputs, scale_format: ScaleFormat, precision: Precision
) -> tuple[Quantized, Inputs]:
    """The rows as the up-projection takes them; nothing is routed or planned before they are there.

    So XLA puts them into memory of their own, and the CUDA graph runs both side by side. By itself
    it makes the rows last, in memory that the routing has used, and the graph waits for that.
    """
    if inputs.hidden_states_scale is None:
        rows = quantize(inputs.hidden_states, scale_format=scale_format, precision=precision)
    else:
        rows = Quantized(inputs.hidden_states, inputs.hidden_states_scale)
    rows = _reordered(in_precision(rows, precision))
    field = "routing_logits" if isinstance(inputs, LayerInputs) else "routing"
    rows, after_rows = lax.optimization_barrier((rows, getattr(inputs, field)))
    return rows, inputs._replace(**{field: after_rows})


def _block_m(expected_rows: float, precision: Precision) -> int:
    most = tilings.MAX_WIDENED_BLOCK_M if precision == "high" else tilings.MAX_BLOCK_M
    return min(tilings.block_m(expected_rows), most)


def _up(
    rows: Quantized,
    weights: Array,
    weights_scale: Array,
    plan: GroupPlan,
    *,
    swiglu_limit: float | None,
    scale_format: ScaleFormat,
    batch_invariant: bool,
    side_job: SideJob | None = None,
    zeros: Array | None = None,
    num_shared_experts: int = 0,
) -> tuple[Quantized, Array | None]:
    """The activations, and what `side_job` gives; rows are gathered on the way, or permuted before.

    The up-projection gathers rows itself where they are few. Else it reads those of shared experts,
    which are the tokens in order, where they are, if TMA can: it takes 8 rows at a time.
    """
    gathers, interpret = tilings.gathers(plan.block_m), interpret_params()
    precision = precision_of(rows.values)
    num_tokens = len(rows.values)
    in_order = not gathers and num_tokens >= plan.block_m and num_tokens % _TMA_ROWS == 0
    shared = num_shared_experts if in_order else 0
    tokens = rows if shared else None
    if not gathers and shared < weights.shape[0]:
        rows = permute.permute_rows(rows, plan, num_shared_experts=shared, interpret=interpret)
    return up_projection(
        rows,
        plan,
        weights,
        weights_scale,
        config=_up_config(weights, plan, precision, batch_invariant),
        swiglu_limit=swiglu_limit,
        scale_format=scale_format,
        gather_rows=gathers,
        side_job=side_job,
        zeros=zeros,
        tokens=tokens,
        num_shared_experts=shared,
        interpret=interpret,
    )


def _reordered(rows: Quantized) -> Quantized:
    """f16 columns in the order in which the matmuls read them, or back."""
    if not widened.is_widened(rows) or interpret_params() is not None:
        return rows
    return rows._replace(values=widened.wgmma_order(rows.values))


def _up_config(
    weights: Array, plan: GroupPlan, precision: Precision, batch_invariant: bool = False
) -> MatmulConfig:
    num_local_experts, columns, hidden_size = weights.shape
    chosen = _CHOOSE[precision](plan.block_m, hidden_size, columns // 2, num_local_experts)
    return _adapted(chosen.up_projection, batch_invariant)


def _zeroing(weights: Array, plan: GroupPlan, precision: Precision) -> SideJob | None:
    """The work of writing the output's zeros, where the up-projection has a warp for it."""
    config = _up_config(weights, plan, precision)
    gathers, interpret = tilings.gathers(plan.block_m), interpret_params()
    spare = has_spare_warps(config, gathered=gathers, interpret=interpret)
    if not spare or plan.pair_row.shape[1] > zero_rows.MAX_PAIRS:
        return None
    return zero_rows.zero_rows(plan.pair_row, weights.shape[2])


def down_project(
    activations: Quantized,
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    plan: GroupPlan,
    *,
    batch_invariant: bool = False,
) -> Float[Array, "M H"]:
    """GEMM2; see `jax_moe.down_project`."""
    activations = _reordered(activations)
    return _down(
        activations, gemm2_weights, gemm2_weights_scale, plan, batch_invariant=batch_invariant
    )


def _down(
    activations: Quantized,
    gemm2_weights: Array,
    gemm2_weights_scale: Array,
    plan: GroupPlan,
    *,
    batch_invariant: bool,
    zeros: Array | None = None,
) -> Array:
    num_local_experts, hidden_size, intermediate_size = gemm2_weights.shape
    choose = _CHOOSE[precision_of(activations.values)]
    chosen = choose(plan.block_m, hidden_size, intermediate_size, num_local_experts)
    return down_projection(
        activations,
        plan,
        gemm2_weights,
        gemm2_weights_scale,
        config=_adapted(chosen.down_projection, batch_invariant),
        zeros=zeros,
        interpret=interpret_params(),
    )


def unpermute(
    expert_outputs: Float[Array, "M H"],
    topk_weights: Float32[Array, "T k"],
    plan: GroupPlan,
    zeroed: BFloat16[Array, "T H"] | None = None,
    *,
    batch_invariant: bool = False,
    output_dtype: str = "bfloat16",
) -> Float[Array, "T H"]:
    """Weighted sum per token; see `jax_moe.unpermute`. Zeros in `zeroed` are there already."""
    return unpermute_kernel.unpermute(
        expert_outputs,
        topk_weights,
        plan.pair_row,
        zeroed=zeroed,
        output_dtype=output_dtype,
        interpret=interpret_params(),
    )


def workspace_bytes(
    num_tokens: int,
    top_k: int,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    precision: Precision = "fast",
) -> int:
    """Worst case of the temporary memory: every pair local.

    Live at once are the activations and either the gathered rows or the expert outputs.
    """
    rows = max_rows(num_tokens, top_k, num_local_experts, tilings.MAX_BLOCK_M)
    wider = 2 if precision == "high" else 1
    bytes_of_quantized = wider + 4 / QUANT_BLOCK
    activations = rows * intermediate_size * bytes_of_quantized
    gathered = rows * hidden_size * bytes_of_quantized
    outputs = wider * rows * hidden_size * 2
    plan = 4 * (2 * rows + 4 * num_tokens * top_k)
    partials = tilings.partials_bytes(hidden_size, intermediate_size, num_local_experts)
    # With "high", f16 tokens, and what XLA makes them from.
    tokens = num_tokens * hidden_size * 8 if precision == "high" else 0
    return int(activations + max(gathered, outputs)) + tokens + plan + partials + 2**20


def tiling_table(hidden_size: int, intermediate_size: int, num_local_experts: int) -> object:
    """The tilings in use for these sizes."""
    return tilings.table(hidden_size, intermediate_size, num_local_experts)


def _adapted(config: MatmulConfig, batch_invariant: bool) -> MatmulConfig:
    """A tiling of the table as this call takes it."""
    if batch_invariant:  # every tile sums K in one chain
        config = dataclasses.replace(config, split_k_steps=None)
    if interpret_params() is None:
        return config
    return dataclasses.replace(config, sms=_INTERPRETED_SMS)
