"""Triton kernels through jax-triton: any NVIDIA GPU from Ada (sm_89) on."""

import importlib.util

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float8e4m3fn, Float32, Int32

from jax_moe.backends import in_precision, precision_of
from jax_moe.config import MoEConfig, Precision, ScaleFormat
from jax_moe.device import device_of
from jax_moe.router import with_shared
from jax_moe.transforms import as_varying
from jax_moe.types import GroupPlan, Quantized, Routing
from pallas_kernels import device
from pallas_kernels.shapes import QUANT_BLOCK, max_rows
from pallas_kernels.triton import down_projection, group_quant, routing, tilings, up_projection
from pallas_kernels.triton import plan as plan_kernels
from pallas_kernels.triton import unpermute as unpermute_kernel
from pallas_kernels.triton.launch import Launch, call

NAME = "triton"
KEEPS_LOWERED = False
layer = None
tiling_table = None

_CHOOSE = {"fast": tilings.choose, "high": tilings.choose_widened}


def unsupported_reason(platform: str, compute_capability: str | None) -> str | None:
    """Needs an NVIDIA GPU with FP8, and jax-triton."""
    if platform != "gpu" or compute_capability is None:
        return "needs an NVIDIA GPU"
    if tilings.number_of(compute_capability) < tilings.OLDEST:
        return "needs compute capability 8.9 or newer"
    if importlib.util.find_spec("jax_triton") is None:
        return "needs jax-triton: install the extra triton"
    return None


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
    launch = routing.launch(
        routing_logits.astype(jnp.float32),
        routing_bias,
        routed_scaling_factor,
        **config.routing_options,
    )
    return with_shared(Routing(*_run(launch)), routing_logits.shape[1], num_shared_experts)


def quantize(
    x: Float[Array, "R C"], *, scale_format: ScaleFormat = "f32", precision: Precision = "fast"
) -> Quantized:
    """Rows to e4m3 or f16 with one scale per 128 columns; see `jax_moe.quantize`."""
    return Quantized(*_run(group_quant.launch(x, scale_format, precision)))


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

    Batch invariance takes tiles of one height: so one program computes every row.
    """
    num_tokens = topk_ids.shape[0]
    sizes = {"num_local_experts": num_local_experts, "num_experts": num_experts}
    counts = None
    if not plan_kernels.is_counted_by_all(num_tokens, topk_ids.shape[1]):
        (counts,) = _run(plan_kernels.count_launch(topk_ids, local_expert_offset, **sizes))
    block_m = tilings.block_m(expected_rows, _capability())
    if precision == "high":
        block_m = min(block_m, tilings.MAX_WIDENED_BLOCK_M)
    if batch_invariant:
        block_m = tilings.INVARIANT_BLOCK_M
    return GroupPlan(
        *_run(
            plan_kernels.plan_launch(
                topk_ids, local_expert_offset, counts, block_m=block_m, **sizes
            )
        )
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
    num_local_experts, columns, hidden_size = gemm1_weights.shape
    sizes = (hidden_size, columns // 2, num_local_experts)
    choose = _CHOOSE[precision]
    tiling = choose(plan.block_m, _capability(), *sizes, only_shipped=batch_invariant)
    return Quantized(
        *_run(
            up_projection.launch(
                *in_precision(Quantized(hidden_states, hidden_states_scale), precision),
                gemm1_weights,
                gemm1_weights_scale,
                plan.row_token,
                plan.tile_expert,
                plan.num_tiles,
                config=tiling.up_projection,
                num_sms=device.num_sms(),
                swiglu_limit=swiglu_limit,
                scale_format=scale_format,
            )
        )
    )


def down_project(
    activations: Quantized,
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    plan: GroupPlan,
    *,
    batch_invariant: bool = False,
) -> Float[Array, "M H"]:
    """GEMM2, one row per pair, bf16 or f32; see `jax_moe.down_project`."""
    num_local_experts, hidden_size, intermediate_size = gemm2_weights.shape
    sizes = (hidden_size, intermediate_size, num_local_experts)
    choose = _CHOOSE[precision_of(activations.values)]
    tiling = choose(plan.block_m, _capability(), *sizes, only_shipped=batch_invariant)
    (expert_outputs,) = _run(
        down_projection.launch(
            *activations,
            gemm2_weights,
            gemm2_weights_scale,
            plan.tile_expert,
            plan.num_tiles,
            config=tiling.down_projection,
            num_sms=device.num_sms(),
        )
    )
    return expert_outputs


def unpermute(
    expert_outputs: Float[Array, "M H"],
    topk_weights: Float32[Array, "T k"],
    plan: GroupPlan,
    *,
    batch_invariant: bool = False,
    output_dtype: str = "bfloat16",
) -> Float[Array, "T H"]:
    """Weighted float32 sum of a token's local pairs; see `jax_moe.unpermute`."""
    rows = (expert_outputs, topk_weights, plan.pair_row)
    (output,) = _run(unpermute_kernel.launch(*rows, output_dtype=output_dtype))
    return output


def workspace_bytes(
    num_tokens: int,
    top_k: int,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    precision: Precision = "fast",
) -> int:
    """Bound on the temporary memory; see `jax_moe.workspace_bytes`."""
    wider = 2 if precision == "high" else 1
    bounds = []
    for block_m in tilings.BLOCK_MS:
        rows = max_rows(num_tokens, top_k, num_local_experts, block_m)
        activations = rows * (wider * intermediate_size + 4 * intermediate_size // QUANT_BLOCK)
        bounds.append(activations + rows * (2 * wider * hidden_size + 8))
    tokens = num_tokens * (wider * hidden_size + 4 * hidden_size // QUANT_BLOCK + 16 * top_k)
    return max(bounds) + tokens + (1 << 20)


def _run(launch: Launch) -> list[Array]:
    """Runs a launch; inside `shard_map` the outputs differ between devices as the inputs do."""
    return as_varying(call(launch, _capability()), launch.inputs)


def _capability() -> int:
    capability = device_of().compute_capability
    if capability is None:
        raise NotImplementedError(f"backend='triton': needs an NVIDIA GPU (got: {device_of()})")
    return tilings.number_of(capability)
