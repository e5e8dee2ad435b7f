"""The layer over several ranks: `apply_expert_parallel` and its twin for a router of one's own.

The maths is that of `jax_moe.apply`, which is one rank's; the layer is the sum over the ranks.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import BFloat16, Float, Float8e4m3fn, Float32, Int32

from jax_moe import backends, validate
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
from jax_moe.parallel import exchange as exchanges
from jax_moe.parallel import layer, placement, ranks, workspace
from jax_moe.parallel.ranks import AxisName
from jax_moe.types import ExpertWeights, LayerInputs, RoutedInputs, Routing


def apply_expert_parallel(
    routing_logits: Float[Array, "T E"],
    routing_bias: Float[Array, " E"] | None,
    hidden_states: Float[Array, "T H"],
    hidden_states_scale: Float32[Array, "H//128 T"] | None,
    gemm1_weights: Float8e4m3fn[Array, "E_local 2*I H"],
    gemm1_weights_scale: Float32[Array, "E_local 2*I//128 H//128"],
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    routed_scaling_factor: float | Float32[Array, ""],
    *,
    axis_name: AxisName,
    config: MoEConfig = DEEPSEEK_V3,
    backend: str = "auto",
    exchange: str = "auto",
    num_tokens: int | Int32[Array, ""] | None = None,
    placement: Int32[Array, " E_physical"] | None = None,
    max_rows_at_once: int | None = None,
    with_load: bool = False,
    expected_rows: float | None = None,
    scale_format: ScaleFormat | None = None,
    swiglu_limit: float | None = None,
    precision: Precision = "fast",
    batch_invariant: bool = False,
) -> BFloat16[Array, "T H"] | tuple[BFloat16[Array, "T H"], Int32[Array, " E"]]:
    """A DeepSeek-V3 mixture of experts over the ranks of a mesh axis, inside of `jax.shard_map`.

    Each rank brings T tokens of its own and holds E_local experts, rank r those from r*E_local on.
    It gets the finished outputs of its own tokens: the sum over all their experts, wherever those
    are. Dispatch sends FP8 rows, scales, expert ids and weights to the ranks; combine sends the
    ranks' partial sums home in bf16, where they are added in float32, in the order of the ranks,
    and cast once. With `precision="high"` rows that are not e4m3 travel in f16, and partial sums in
    float32.

    There is no capacity: every token reaches all its experts, also if all tokens want the same one.
    No shape depends on the routing and the host is not asked. The same inputs give the same bits,
    whatever the timing of the ranks. With `exchange="collectives"` they are the bits of
    `jax_moe.apply_routed` on the tokens of all ranks, added up over the ranks as said above.

    Every rank must make the same call with arrays of the same shapes, with `num_tokens` for ranks
    that have fewer tokens. Forward only, as `apply`.

    Examples:
        >>> in_specs, out_specs = jax_moe.partition_specs("expert")
        >>> layer = jax.shard_map(
        ...     functools.partial(jax_moe.apply_expert_parallel, axis_name="expert"),
        ...     mesh=mesh, in_specs=in_specs, out_specs=out_specs)

    Symbols as in `apply`; N ranks, E_physical = N * E_local experts that all ranks hold.

    Args:
        routing_logits: f32, bf16 or f16[T,E] of this rank's tokens, for all experts.
        routing_bias: bf16[E] or f32[E], or None.
        hidden_states: e4m3[T,H], or bf16, f16 or f32[T,H], which is then quantized before it is
            sent.
        hidden_states_scale: f32[H/128,T]; None exactly if `hidden_states` is not e4m3.
        gemm1_weights: e4m3[E_local,2*I,H] of this rank's experts, as all the weights; up first.
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        routed_scaling_factor: As in `apply`.
        axis_name: The mesh axis of the ranks, or (host axis, device axis), where rank r is device
            r mod G of host r div G, of G devices per host.
        config: How experts are picked.
        backend: As in `apply`.
        exchange: "collectives", "two_level", "nvlink", or "auto"; `jax_moe.describe_exchange` says
            what runs, which one "auto" takes from how many tokens on, and why not the others.
        num_tokens: How many of this rank's T rows are live, an integer scalar; may be traced and
            may differ between ranks. The others come out as zeros, whatever they hold.
        placement: i32[E_physical], the same on all ranks: which logical expert each physical slot
            holds, slot s being expert s mod E_local of rank s div E_local. Experts may have several
            copies: of those, token t (counted over all ranks) takes copy t mod copies. A new
            placement does not recompile; loading the weights to match is the caller's part. An
            expert without a slot is an error where the placement's values are known; where they are
            traced, tokens that pick it come out as NaN. None: slot s holds expert s.
        max_rows_at_once: Token slots of all ranks together, N per token, that are exchanged and
            computed in one piece. Smaller pieces take less memory and let the exchange of one run
            beside the matmuls of another, but each reads the weights again. None takes the largest
            that keeps `jax_moe.workspace_bytes` under 4 GB. Static.
        with_load: Whether to return the load as well. Static.
        expected_rows: As in `apply`, of the rows that all ranks send in one piece; None takes the
            even share of them.
        scale_format: As in `apply`.
        swiglu_limit: As in `apply`.
        precision: As in `apply`.
        batch_invariant: As in `apply`, for a number of ranks and an exchange: nothing depends on
            which rank a token comes from either. Not with a placement that has copies, of which a
            token's number chooses one.

    Returns:
        bf16[T,H] of this rank's tokens; with `with_load`, also i32[E]: the (token, expert) pairs of
        each logical expert over all ranks.

    Raises:
        TypeError: An argument is no array, or of the wrong dtype.
        ValueError: A shape, size, axis or known value does not fit, or the call is not inside of a
            `jax.shard_map` over `axis_name`; names the argument, what was expected and what came.
        NotImplementedError: The backend or the exchange does not run on these devices, or the call
            is differentiated.
    """
    group = ranks.surrounding(axis_name)
    sizes: validate.Sizes = {}
    validate.routing(routing_logits, routing_bias, config, sizes)
    factor: Any = validate.real("routed_scaling_factor", routed_scaling_factor)
    inputs = LayerInputs(
        routing_logits,
        routing_bias,
        hidden_states,
        hidden_states_scale,
        ExpertWeights(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale),
        local_expert_offset=0,
        routed_scaling_factor=factor,
    )
    sizes["k"] = (config.top_k, "config")
    scale_format, swiglu_limit = config.merged(scale_format, swiglu_limit)
    return _run(
        inputs,
        sizes,
        group,
        config=config,
        backend=backend,
        exchange=exchange,
        num_tokens=num_tokens,
        placed=placement,
        max_rows_at_once=max_rows_at_once,
        with_load=with_load,
        expected_rows=expected_rows,
        scale_format=scale_format,
        swiglu_limit=swiglu_limit,
        precision=precision,
        batch_invariant=batch_invariant,
    )


def apply_routed_expert_parallel(
    hidden_states: Float[Array, "T H"],
    hidden_states_scale: Float32[Array, "H//128 T"] | None,
    gemm1_weights: Float8e4m3fn[Array, "E_local 2*I H"],
    gemm1_weights_scale: Float32[Array, "E_local 2*I//128 H//128"],
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    topk_ids: Int32[Array, "T k"],
    topk_weights: Float32[Array, "T k"],
    *,
    num_experts: int,
    axis_name: AxisName,
    backend: str = "auto",
    exchange: str = "auto",
    num_tokens: int | Int32[Array, ""] | None = None,
    placement: Int32[Array, " E_physical"] | None = None,
    max_rows_at_once: int | None = None,
    with_load: bool = False,
    expected_rows: float | None = None,
    scale_format: ScaleFormat = "f32",
    swiglu_limit: float | None = None,
    precision: Precision = "fast",
    batch_invariant: bool = False,
) -> BFloat16[Array, "T H"] | tuple[BFloat16[Array, "T H"], Int32[Array, " E"]]:
    """`apply_expert_parallel` without its router: the caller says where each token goes.

    Args:
        hidden_states: As in `apply_expert_parallel`, and so are all that follow but these three.
        hidden_states_scale: f32[H/128,T], or None.
        gemm1_weights: e4m3[E_local,2*I,H].
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        topk_ids: i32[T,k], logical expert ids of this rank's tokens; -1, as every id outside of
            0..E-1, means "no expert".
        topk_weights: f32[T,k], every factor included.
        num_experts: E, static.
        axis_name: The axis or axes of the ranks.
        backend: As in `apply`.
        exchange: Between the ranks.
        num_tokens: Live tokens of this rank.
        placement: i32[E_physical].
        max_rows_at_once: Slots per piece.
        with_load: Whether to return the load as well.
        expected_rows: Rows per expert.
        scale_format: As in `apply_routed`.
        swiglu_limit: As in `apply_routed`.
        precision: As in `apply`.
        batch_invariant: As in `apply_expert_parallel`.

    Returns:
        As `apply_expert_parallel`.

    Raises:
        TypeError: As `apply_expert_parallel`.
        ValueError: As `apply_expert_parallel`.
        NotImplementedError: As `apply_expert_parallel`.
    """
    inputs = RoutedInputs(
        hidden_states,
        hidden_states_scale,
        ExpertWeights(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale),
        Routing(topk_ids, topk_weights),
        local_expert_offset=0,
    )
    return run_routed(
        inputs,
        num_experts=num_experts,
        axis_name=axis_name,
        backend=backend,
        exchange=exchange,
        num_tokens=num_tokens,
        placement=placement,
        max_rows_at_once=max_rows_at_once,
        with_load=with_load,
        expected_rows=expected_rows,
        scale_format=scale_format,
        swiglu_limit=swiglu_limit,
        precision=precision,
        batch_invariant=batch_invariant,
    )


def run_routed(
    inputs: RoutedInputs,
    *,
    num_experts: int,
    axis_name: AxisName,
    placement: Int32[Array, " E_physical"] | None = None,
    **options: Any,
) -> Any:
    """`apply_routed_expert_parallel` of unchecked inputs, with the options of `_run`."""
    group = ranks.surrounding(axis_name)
    sizes: validate.Sizes = {"E": (validate.num_experts(num_experts), "num_experts")}
    validate.topk(*inputs.routing, sizes)
    return _run(inputs, sizes, group, config=None, placed=placement, **options)


def _run(
    inputs: Any,
    sizes: validate.Sizes,
    group: ranks.Ranks,
    *,
    config: MoEConfig | None,
    placed: Any,
    backend: str = "auto",
    exchange: str = "auto",
    num_tokens: Any = None,
    max_rows_at_once: int | None = None,
    with_load: bool = False,
    expected_rows: float | None = None,
    scale_format: ScaleFormat = "f32",
    swiglu_limit: float | None = None,
    precision: Precision = "fast",
    batch_invariant: bool = False,
    result_dtype: str = "bfloat16",
) -> Any:
    """The checks that all entries share, then the layer.

    `sizes` knows T, E and k; `placed` is the placement; the result is of `result_dtype`, f32 where
    others are added to it. All else is as in `apply_expert_parallel`.
    """
    scale_format = checked_scale_format(scale_format)
    swiglu_limit = checked_swiglu_limit(swiglu_limit)
    precision = checked_precision(precision)
    batch_invariant = checked_batch_invariant(batch_invariant)
    with_load = validate.boolean("with_load", with_load)
    expected_rows = validate.expected_rows(expected_rows)
    validate.hidden(inputs.hidden_states, inputs.hidden_states_scale, sizes)
    validate.weights(inputs.weights, sizes)
    num_experts, tokens = sizes["E"][0], sizes["T"][0]
    num_slots = check_experts(inputs.weights.num_local_experts, num_experts, group.count, placed)
    if batch_invariant and num_slots != num_experts:
        raise ValueError(
            f"placement: expected one slot for each of {num_experts} experts with "
            f"batch_invariant=True, as a token's number chooses between copies, got {num_slots}"
        )
    validate.pair_count("hidden_states of all ranks", group.count * tokens, sizes["k"][0])
    live: Any = (
        None if num_tokens is None else validate.integer("num_tokens", num_tokens, 0, tokens)
    )
    max_rows_at_once = workspace.rows_at_once(max_rows_at_once, group.count)
    chosen = backends.select(backend, ranks.device())
    kind = exchanges.select(exchange, exchanges.Place(group, chosen, precision), tokens)
    if tokens == 0:
        out = jnp.zeros(inputs.hidden_states.shape, result_dtype)
        load = lax.psum(jnp.zeros(num_experts, jnp.int32), group.axes)
        return (out, load) if with_load else out
    weights = inputs.weights
    local_bytes = functools.partial(
        _local_bytes, backends.load(chosen), sizes["k"][0], inputs.weights, precision
    )
    call = workspace.Sizes(tokens, group.count, sizes["k"][0], weights.hidden_size, precision)
    plan = layer.Plan(
        ranks=group,
        exchange=kind,
        backend=chosen,
        num_experts=num_experts,
        num_slots=num_slots,
        tokens_at_once=workspace.tokens_at_once(call, local_bytes, max_rows_at_once),
        config=config,
        with_load=with_load,
        scale_format=scale_format,
        swiglu_limit=swiglu_limit,
        precision=precision,
        batch_invariant=batch_invariant,
        expected_rows=expected_rows,
        result_dtype=result_dtype,
    )
    out, load = layer.run(inputs, live, placed, plan)
    return (out, load) if with_load else out


def _local_bytes(
    stages: backends.Backend, top_k: int, weights: ExpertWeights, precision: Precision, rows: int
) -> int:
    return stages.workspace_bytes(
        rows,
        top_k,
        weights.num_local_experts,
        weights.hidden_size,
        weights.intermediate_size,
        precision,
    )


def check_experts(num_local_experts: int, num_experts: int, num_ranks: int, placed: Any) -> int:
    """Checks that the ranks hold all experts.

    Args:
        num_local_experts: E_local.
        num_experts: E.
        num_ranks: N.
        placed: The placement or None.

    Returns:
        E_physical.

    Raises:
        TypeError: The placement is no int32 array.
        ValueError: The experts do not fit; names the argument.
    """
    num_slots = num_ranks * num_local_experts
    if placed is not None:
        placement.check(placed, num_experts, num_slots)
    elif num_experts % num_ranks:
        raise ValueError(
            f"axis_name: expected a number of ranks that divides E = {num_experts} (a placement "
            f"can add copies), got {num_ranks} ranks"
        )
    elif num_slots != num_experts:
        raise ValueError(
            f"gemm1_weights: expected E_local = E / N = {num_experts} / {num_ranks} = "
            f"{num_experts // num_ranks} (other numbers need a placement), got {num_local_experts}"
        )
    return num_slots
