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
from jax_moe.config import (
    DEEPSEEK_V3,
    MoEConfig,
    Precision,
    ScaleFormat,
    checked_batch_invariant,
    checked_precision,
    checked_scale_format,
    checked_swiglu_limit,
)
from jax_moe.transforms import forward_only
from jax_moe.types import GroupPlan, Quantized, Routing
from pallas_kernels.shapes import even_rows


def route(
    routing_logits: Float[Array, "T E"],
    routing_bias: Float[Array, " E"] | None,
    routed_scaling_factor: float | Float32[Array, ""],
    *,
    config: MoEConfig = DEEPSEEK_V3,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Routing:
    """Picks the experts of each token: group-limited top-k (arXiv:2412.19437, section 2.1.2).

    With `s` the scores of a token's logits `x`, in float32 (`config.scoring`)::

        sigmoid        s = 1 / (1 + exp(-x))                   DeepSeek-V3 and its likes
        softmax        s = exp(x - max(x)) / sum(exp(x - max(x))), over all E experts
        sqrtsoftplus   s = sqrt(log(1 + exp(x)))               DeepSeek-V4
        weight         w = s / (sum of the chosen s + 1e-20) * factor
        without config.renormalize:  w = s * factor

    What is compared is `s + bias`, rounded to float32. Without a bias it is the logit itself, which
    every score grows with: logits whose scores round to the same number are no tie then. A group's
    score is the sum of its two best `s + bias` (of its two best `s` without a bias); the best
    `topk_group` groups are kept, and the best `top_k` experts of those are chosen. The weights are
    made of the scores *without* bias.

    The scores are the formulas of `pallas_kernels.scores`, written out to the last bit, so that all
    backends choose the same ids; a product of this package may differ from an exact one by 1e-6.
    Scores and keys below 2^-126 in magnitude count as 0; a score is 0 where `exp` would be below
    `exp(-87)`, and a sigmoid 1 above 87.

    The ids are distinct and in 0..E-1 for every input. Ties, of experts and of groups, go to the
    lowest id. A key (or a group's sum) that is NaN ranks below every number, -inf included. Only
    a token that is left with a NaN logit among its chosen experts gets NaN weights (all of them if
    they are renormalized); other tokens are not affected, nor are its other experts: a NaN counts
    in neither the maximum nor the sum of a softmax. The largest logit of a softmax has `exp(0)`
    also where it is infinite. An infinite logit has an infinite `sqrtsoftplus`, and NaN weights if
    they are renormalized. A NaN or infinite bias changes the choice, never the weights.

    Args:
        routing_logits: f32, bf16 or f16[T,E]; used as float32.
        routing_bias: bf16[E] or f32[E], added to the scores for the selection only; None for none.
        routed_scaling_factor: Real scalar, may be traced.
        config: How experts are picked.
        batch_invariant: As in `jax_moe.apply`, of the weights; the ids are the same in any batch.
        backend: As in `jax_moe.apply`.

    Returns:
        `Routing` of `topk_ids` i32[T,k] and `topk_weights` f32[T,k].

    Raises:
        TypeError: An argument is no array, or of the wrong dtype.
        ValueError: A shape does not fit, or the groups do not fit the experts.
        NotImplementedError: The backend does not run on this device.
    """
    return route_with_shared(
        routing_logits,
        routing_bias,
        routed_scaling_factor,
        config=config,
        batch_invariant=batch_invariant,
        backend=backend,
    )


def route_with_shared(
    routing_logits: Float[Array, "T E"],
    routing_bias: Float[Array, " E"] | None,
    routed_scaling_factor: float | Float32[Array, ""],
    *,
    config: MoEConfig,
    num_shared_experts: int = 0,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Routing:
    """`route`, and s shared experts that every token takes with the weight 1.

    Args:
        routing_logits: As for `route`, all other arguments too.
        routing_bias: As there.
        routed_scaling_factor: As there.
        config: As there.
        num_shared_experts: s; their ids follow those of the E routed ones.
        batch_invariant: As there.
        backend: As there.

    Returns:
        `Routing` of i32[T,k+s] and f32[T,k+s], the shared ones last.
    """
    validate.routing(routing_logits, routing_bias, config, {})
    validate.whole(routing_logits=routing_logits, routing_bias=routing_bias)
    factor = validate.real("routed_scaling_factor", routed_scaling_factor)
    static = {
        "config": config,
        "batch_invariant": checked_batch_invariant(batch_invariant),
        "num_shared_experts": num_shared_experts,
    }
    return _run("route", backend, routing_logits, routing_bias, factor, **static)


def quantize(
    x: Float[Array, "R C"],
    *,
    scale_format: ScaleFormat = "f32",
    precision: Precision = "fast",
    backend: str = "auto",
) -> Quantized:
    """Rows to FP8, or to 16 bits, with one scale per row and 128 columns.

    With `amax` the largest magnitude of the 128 values::

        scale = max(amax, 448 * 2**-126) / 448        (its floor is 2**-126)
        scale = 2**ceil(log2(scale))                  (scale_format "ue8m0" only, exact)
        value = e4m3(clip(x / scale, -448, 448))      (round to nearest even)

    Magnitudes below 2^-126, f32 denormals, count as +0, so a group of zeros gives zeros; e4m3
    denormals are exact. A group with a NaN dequantizes to NaN, one with an infinity likewise; its
    neighbours do not notice. All backends give the same bits, but for `xla` on a GPU, where XLA
    divides to within 2 ulp: a scale may differ in its last bits, and a value by one e4m3 number.

    With `precision="high"` it is f16, whose 11 bits hold those of bf16 and f16, and all that
    matters of f32; the scale, always a power of two, gives it the range of f32::

        scale = max(2**(floor(log2(amax)) - 14), 2**-126)
        value = f16(x / scale), at most 2**15 - 16

    bf16 and f16 values are exact down to 2^-29 of amax. NaN and infinity stay in their places.

    Args:
        x: bf16, f16 or f32[R,C], C a multiple of 128.
        scale_format: "f32", or "ue8m0" for scales that are powers of two, rounded up; without
            effect with "high".
        precision: "fast", or "high" for 16 bits.
        backend: As in `jax_moe.apply`.

    Returns:
        `Quantized` of `values` e4m3[R,C], with "high" f16[R,C], and `scales` f32[C/128,R].

    Raises:
        TypeError: `x` is no array, or of another dtype.
        ValueError: `x` has another rank, C is no positive multiple of 128, or there is no such
            format or precision.
        NotImplementedError: The backend does not run on this device.
    """
    sizes: validate.Sizes = {}
    validate.array("x", x, "R C", validate.UNQUANTIZED, sizes)
    validate.blocked("C", sizes)
    validate.whole(x=x)
    form = checked_scale_format(scale_format)
    precision = checked_precision(precision)
    return _run("quantize", backend, x, scale_format=form, precision=precision)


def plan_groups(
    topk_ids: Int32[Array, "T k"],
    local_expert_offset: int | Int32[Array, ""],
    *,
    num_local_experts: int,
    num_experts: int,
    expected_rows: float | None = None,
    precision: Precision = "fast",
    batch_invariant: bool = False,
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
        precision: Of the matmuls that the plan is for: the tiles of "high" are smaller on some
            backends.
        batch_invariant: As in `jax_moe.apply`, of the matmuls that the plan is for, which take it
            too.
        backend: As in `jax_moe.apply`.

    Returns:
        The plan; its sizes depend on T, k and the static arguments only.

    Raises:
        TypeError: `topk_ids` is no int32 array, a count no integer, or an option no bool.
        ValueError: A shape, a count or a known offset is out of range.
        NotImplementedError: The backend does not run on this device.
    """
    sizes: validate.Sizes = {}
    validate.chosen(topk_ids, sizes)
    num_tokens, top_k = topk_ids.shape
    num_experts = validate.num_experts(num_experts)
    num_local_experts = validate.static_integer(
        "num_local_experts", num_local_experts, 1, num_experts
    )
    validate.whole(topk_ids=topk_ids)
    offset = validate.integer(
        "local_expert_offset", local_expert_offset, 0, num_experts - num_local_experts
    )
    rows = validate.expected_rows(expected_rows)
    static = {
        "num_local_experts": num_local_experts,
        "num_experts": num_experts,
        "expected_rows": even_rows(num_tokens, top_k, num_experts) if rows is None else rows,
        "precision": checked_precision(precision),
        "batch_invariant": checked_batch_invariant(batch_invariant),
    }
    return _run("plan_groups", backend, topk_ids, offset, **static)


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
    backend: str = "auto",
) -> Quantized:
    """The first grouped matmul: gathers the rows, `silu(gate) * up`, and requantizes.

    Row r of expert e computes `G = x[row_token[r]] @ W13[e].T` and
    `quantize(G[:I] * silu(G[I:]))`: the gate is the second half. With `swiglu_limit` L it is
    `quantize(clip(G[:I], -L, L) * silu(min(G[I:], L)))`; NaN stays NaN.

    Args:
        hidden_states: e4m3[T,H]; with "high" f16[T,H] as well, from `quantize`.
        hidden_states_scale: f32[H/128,T].
        gemm1_weights: e4m3[E_local,2*I,H].
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        plan: From `plan_groups` with the same backend.
        swiglu_limit: A positive number, or None for no clamp.
        scale_format: Of the result, as in `quantize`.
        precision: Of the result, as in `quantize`.
        batch_invariant: As in `jax_moe.apply`, and as the plan had it.
        backend: As in `jax_moe.apply`.

    Returns:
        `Quantized` of `values` e4m3[M,I], with "high" f16[M,I], and `scales` f32[I/128,M]; padding
        rows hold anything.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape does not fit, or an option is out of range.
        NotImplementedError: The backend does not run on this device.
    """
    sizes: validate.Sizes = {}
    precision = checked_precision(precision)
    validate.array("hidden_states", hidden_states, "T H", validate.ROWS[precision], sizes)
    validate.blocked("H", sizes)
    validate.argument("hidden_states_scale", hidden_states_scale, sizes)
    validate.gemm1(gemm1_weights, gemm1_weights_scale, sizes)
    validate.plan(plan, sizes)
    validate.whole(
        hidden_states=hidden_states,
        hidden_states_scale=hidden_states_scale,
        gemm1_weights=gemm1_weights,
        gemm1_weights_scale=gemm1_weights_scale,
        plan=plan,
    )
    debug.check_plan(plan)
    arrays = (hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale)
    epilogue = {
        "swiglu_limit": checked_swiglu_limit(swiglu_limit),
        "scale_format": checked_scale_format(scale_format),
        "precision": precision,
        "batch_invariant": checked_batch_invariant(batch_invariant),
    }
    return _run("up_project", backend, *arrays, plan, **epilogue)


def down_project(
    activations: Quantized,
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    plan: GroupPlan,
    *,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Float[Array, "M H"]:
    """The second grouped matmul: `activations[r] @ W2[e].T` for each row r of each expert e.

    Its precision is that of the activations.

    Args:
        activations: `Quantized` of e4m3[M,I] or f16[M,I] and f32[I/128,M], from `up_project`.
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        plan: The plan that `up_project` had.
        batch_invariant: As `up_project` had it.
        backend: As in `jax_moe.apply`.

    Returns:
        bf16[M,H], of f16 activations f32[M,H]; padding rows hold anything.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape does not fit.
        NotImplementedError: The backend does not run on this device.
    """
    sizes: validate.Sizes = {}
    validate.plan(plan, sizes)
    validate.quantized("activations", activations, "M I", sizes)
    validate.gemm2(gemm2_weights, gemm2_weights_scale, sizes)
    validate.whole(
        activations=activations,
        gemm2_weights=gemm2_weights,
        gemm2_weights_scale=gemm2_weights_scale,
        plan=plan,
    )
    debug.check_plan(plan)
    arrays = (activations, gemm2_weights, gemm2_weights_scale, plan)
    is_invariant = checked_batch_invariant(batch_invariant)
    return _run("down_project", backend, *arrays, batch_invariant=is_invariant)


def unpermute(
    expert_outputs: Float[Array, "M H"],
    topk_weights: Float32[Array, "T k"],
    plan: GroupPlan,
    *,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> BFloat16[Array, "T H"]:
    """Adds each token's local rows, weighted, in float32, and casts once.

    Rows that are not local are skipped, not multiplied by zero: a NaN there has no effect.

    Args:
        expert_outputs: bf16[M,H] or f32[M,H], from `down_project` with the same backend.
        topk_weights: f32[T,k], from `route`.
        plan: The plan that the matmuls had.
        batch_invariant: As the matmuls had it.
        backend: As in `jax_moe.apply`.

    Returns:
        bf16[T,H], exact zeros for tokens without a local expert.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape does not fit.
        NotImplementedError: The backend does not run on this device.
    """
    sizes: validate.Sizes = {}
    validate.argument("topk_weights", topk_weights, sizes)
    validate.plan(plan, sizes)
    validate.array("expert_outputs", expert_outputs, "M H", validate.EXPERT_OUTPUTS, sizes)
    validate.blocked("H", sizes)
    validate.whole(expert_outputs=expert_outputs, topk_weights=topk_weights, plan=plan)
    debug.check_plan(plan)
    is_invariant = checked_batch_invariant(batch_invariant)
    arrays = (expert_outputs, topk_weights, plan)
    return _run("unpermute", backend, *arrays, batch_invariant=is_invariant)


def _run(stage: str, backend: str, *arrays: Any, **static: Any) -> Any:
    chosen = backends.select_for_call(backend, arrays)
    arrays = transfers.upload_numbers(arrays)
    return _jitted(*arrays, stage=stage, backend=chosen, static=tuple(static.items()))


@functools.partial(jax.jit, static_argnames=("stage", "backend", "static"))
def _jitted(*arrays: Any, stage: str, backend: str, static: tuple[tuple[str, Any], ...]) -> Any:
    function = getattr(backends.load(backend), stage)
    return forward_only(functools.partial(function, **dict(static)))(*arrays)
