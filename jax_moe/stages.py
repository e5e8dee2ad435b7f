"""The stages of the layer, one by one: what `apply` runs, for those who compose their own.

The data flows as `quantize`, `route`, `plan_groups`, `up_project`, `down_project`, `unpermute`.
Keep to one backend along the way: the rows of a tile are its choice.
All are forward only, run one by one under `jax.vmap`, and are jitted when called eagerly. What a
plan of your own holds is checked under `jax.experimental.checkify` (`jax_moe.debug`).
"""

import functools
from typing import Any

import jax
from jax import Array
from jaxtyping import BFloat16, Float, Float8e4m3fn, Float32, Int32

from jax_moe import backends, debug, transfers, validate
from jax_moe.config import DEEPSEEK_V3, MoEConfig
from jax_moe.device import device_of
from jax_moe.transforms import forward_only
from jax_moe.types import GroupPlan, Quantized, Routing
from pallas_kernels.shapes import even_rows


def route(
    routing_logits: Float32[Array, "T E"],
    routing_bias: Float[Array, " E"],
    routed_scaling_factor: float | Float32[Array, ""],
    *,
    config: MoEConfig = DEEPSEEK_V3,
    backend: str = "auto",
) -> Routing:
    """Picks the experts of each token: group-limited sigmoid top-k (arXiv:2412.19437, 2.1.2).

    A group's score is the sum of its two best `sigmoid(logits) + bias`; the best `topk_group`
    groups are kept, and the best `top_k` experts of those are chosen. Weights are the sigmoids
    *without* bias over their sum: `s / (sum(s) + 1e-20) * factor`.

    The ids are distinct and in 0..E-1 for every input. Ties, of experts and of groups, go to the
    lowest id. A score (or a group's sum) that is NaN ranks below every number, -inf included. Only
    a token that is left with a NaN logit among its chosen experts gets NaN weights, all of them;
    other tokens are not affected. A NaN or infinite bias changes the choice, never the weights.

    Args:
        routing_logits: f32[T,E].
        routing_bias: bf16[E] or f32[E].
        routed_scaling_factor: Real scalar, may be traced.
        config: How experts are picked.
        backend: As in `jax_moe.apply`.

    Returns:
        `Routing` of `topk_ids` i32[T,k] and `topk_weights` f32[T,k].

    Raises:
        TypeError: An argument is no array, or of the wrong dtype.
        ValueError: A shape does not fit, or the groups do not fit the experts.
        NotImplementedError: The backend does not run on this device.
    """
    validate.routing(routing_logits, routing_bias, config, {})
    factor = validate.real("routed_scaling_factor", routed_scaling_factor)
    return _run("route", backend, routing_logits, routing_bias, factor, config=config)


def quantize(x: Float[Array, "R C"], *, backend: str = "auto") -> Quantized:
    """Rows to FP8, one scale per row and 128 columns.

    With `amax` the largest magnitude of the 128 values::

        scale = max(amax, 448 * 2**-126) / 448        (its floor is 2**-126)
        value = e4m3(clip(x / scale, -448, 448))      (round to nearest even)

    Magnitudes below 2^-126, f32 denormals, count as +0, so a group of zeros gives zeros; e4m3
    denormals are exact. A group with a NaN dequantizes to NaN, one with an infinity likewise; its
    neighbours do not notice. All backends give the same bits.

    Args:
        x: bf16, f16 or f32[R,C], C a multiple of 128.
        backend: As in `jax_moe.apply`.

    Returns:
        `Quantized` of `values` e4m3[R,C] and `scales` f32[C/128,R].

    Raises:
        TypeError: `x` is no array, or of another dtype.
        ValueError: `x` has another rank, or C is no positive multiple of 128.
        NotImplementedError: The backend does not run on this device.
    """
    sizes: validate.Sizes = {}
    validate.array("x", x, "R C", validate.UNQUANTIZED, sizes)
    validate.blocked("C", sizes)
    return _run("quantize", backend, x)


def plan_groups(
    topk_ids: Int32[Array, "T k"],
    local_expert_offset: int | Int32[Array, ""],
    *,
    num_local_experts: int,
    num_experts: int,
    expected_rows: float | None = None,
    backend: str = "auto",
) -> GroupPlan:
    """Sorts the local (token, expert) pairs by expert, each expert padded to whole tiles.

    Args:
        topk_ids: i32[T,k], global expert ids. Ids outside of 0..num_experts-1 mean "no expert" and
            are skipped, as are those that are not local. A token has one row per expert, also where
            it names that expert twice.
        local_expert_offset: Global id of the first local expert, may be traced.
        num_local_experts: E_local, static.
        num_experts: E, static.
        expected_rows: As in `jax_moe.apply`.
        backend: As in `jax_moe.apply`.

    Returns:
        The plan; its sizes depend on T, k and the static arguments only.

    Raises:
        TypeError: `topk_ids` is no int32 array, or a count no integer.
        ValueError: A shape, a count or a known offset is out of range.
        NotImplementedError: The backend does not run on this device.
    """
    sizes: validate.Sizes = {}
    validate.array("topk_ids", topk_ids, "T k", validate.I32, sizes)
    num_tokens, top_k = topk_ids.shape
    num_experts = validate.num_experts(num_experts)
    num_local_experts = validate.static_integer(
        "num_local_experts", num_local_experts, 1, num_experts
    )
    validate.pair_count("topk_ids", num_tokens, top_k)
    offset = validate.integer(
        "local_expert_offset", local_expert_offset, 0, num_experts - num_local_experts
    )
    rows = validate.expected_rows(expected_rows)
    static = {
        "num_local_experts": num_local_experts,
        "num_experts": num_experts,
        "expected_rows": even_rows(num_tokens, top_k, num_experts) if rows is None else rows,
    }
    return _run("plan_groups", backend, topk_ids, offset, **static)


def up_project(
    hidden_states: Float8e4m3fn[Array, "T H"],
    hidden_states_scale: Float32[Array, "H//128 T"],
    gemm1_weights: Float8e4m3fn[Array, "E_local 2*I H"],
    gemm1_weights_scale: Float32[Array, "E_local 2*I//128 H//128"],
    plan: GroupPlan,
    *,
    backend: str = "auto",
) -> Quantized:
    """The first grouped matmul: gathers the rows, `silu(gate) * up`, and requantizes.

    Row r of expert e computes `G = x[row_token[r]] @ W13[e].T` and
    `quantize(G[:I] * silu(G[I:]))`: the gate is the second half.

    Args:
        hidden_states: e4m3[T,H].
        hidden_states_scale: f32[H/128,T].
        gemm1_weights: e4m3[E_local,2*I,H].
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        plan: From `plan_groups` with the same backend.
        backend: As in `jax_moe.apply`.

    Returns:
        `Quantized` of `values` e4m3[M,I] and `scales` f32[I/128,M]; padding rows hold anything.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape does not fit.
        NotImplementedError: The backend does not run on this device.
    """
    sizes: validate.Sizes = {}
    validate.array("hidden_states", hidden_states, "T H", validate.E4M3, sizes)
    validate.hidden(hidden_states, hidden_states_scale, sizes)
    validate.gemm1(gemm1_weights, gemm1_weights_scale, sizes)
    validate.plan(plan, sizes)
    debug.check_plan(plan)
    arrays = (hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale)
    return _run("up_project", backend, *arrays, plan)


def down_project(
    activations: Quantized,
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    plan: GroupPlan,
    *,
    backend: str = "auto",
) -> BFloat16[Array, "M H"]:
    """The second grouped matmul: `activations[r] @ W2[e].T` for each row r of each expert e.

    Args:
        activations: `Quantized` of e4m3[M,I] and f32[I/128,M], from `up_project`.
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        plan: The plan that `up_project` had.
        backend: As in `jax_moe.apply`.

    Returns:
        bf16[M,H]; padding rows hold anything.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape does not fit.
        NotImplementedError: The backend does not run on this device.
    """
    sizes: validate.Sizes = {}
    validate.plan(plan, sizes)
    validate.quantized("activations", activations, "M I", sizes)
    validate.gemm2(gemm2_weights, gemm2_weights_scale, sizes)
    debug.check_plan(plan)
    return _run("down_project", backend, activations, gemm2_weights, gemm2_weights_scale, plan)


def unpermute(
    expert_outputs: BFloat16[Array, "M H"],
    topk_weights: Float32[Array, "T k"],
    plan: GroupPlan,
    *,
    backend: str = "auto",
) -> BFloat16[Array, "T H"]:
    """Adds each token's local rows, weighted, in float32, and casts once.

    Rows that are not local are skipped, not multiplied by zero: a NaN there has no effect.

    Args:
        expert_outputs: bf16[M,H], from `down_project` with the same backend.
        topk_weights: f32[T,k], from `route`.
        plan: The plan that the matmuls had.
        backend: As in `jax_moe.apply`.

    Returns:
        bf16[T,H], exact zeros for tokens without a local expert.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape does not fit.
        NotImplementedError: The backend does not run on this device.
    """
    sizes: validate.Sizes = {}
    validate.array("topk_weights", topk_weights, "T k", validate.F32, sizes)
    validate.plan(plan, sizes)
    validate.array("expert_outputs", expert_outputs, "M H", validate.BF16, sizes)
    validate.blocked("H", sizes)
    debug.check_plan(plan)
    return _run("unpermute", backend, expert_outputs, topk_weights, plan)


def _run(stage: str, backend: str, *arrays: Any, **static: Any) -> Any:
    chosen = backends.select(backend, device_of(arrays))
    arrays = transfers.upload_numbers(arrays)
    return _jitted(*arrays, stage=stage, backend=chosen, static=tuple(static.items()))


@functools.partial(jax.jit, static_argnames=("stage", "backend", "static"))
def _jitted(*arrays: Any, stage: str, backend: str, static: tuple[tuple[str, Any], ...]) -> Any:
    function = getattr(backends.load(backend), stage)
    return forward_only(functools.partial(function, **dict(static)))(*arrays)
