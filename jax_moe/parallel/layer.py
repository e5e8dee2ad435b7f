"""What a rank does: route and quantize at home, the local layer on what arrives, in pieces."""

import dataclasses
import functools
from typing import Any

import jax
from jax import Array, lax
from jaxtyping import Float, Int32

from jax_moe import backends, entry, lowering_cache
from jax_moe.config import MoEConfig, Precision, ScaleFormat
from jax_moe.entry import Options
from jax_moe.parallel import exchange, pieces, placement
from jax_moe.parallel.ranks import Ranks
from jax_moe.parallel.tokens import Tokens
from jax_moe.transforms import forward_only
from jax_moe.types import LayerInputs, RoutedInputs, Routing


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a call over several ranks.

    Attributes:
        ranks: Those of the mesh.
        exchange: A name other than "auto".
        backend: A name other than "auto".
        num_experts: E, logical.
        num_slots: E_physical.
        tokens_at_once: Tokens of one rank per piece.
        config: How experts are picked; None where the caller has picked them.
        with_load: Whether the pairs of each expert are counted.
        scale_format: Of the activations that are quantized here.
        swiglu_limit: Clamp before the activation.
        precision: Of the activations; with "high" partial sums travel in float32.
        batch_invariant: Whether a token's bits are the same in any batch.
        expected_rows: Rows an expert is likely to get from all ranks; None takes the even share.
        result_dtype: Of what a token's partial sums add up to.
    """

    ranks: Ranks
    exchange: str
    backend: str
    num_experts: int
    num_slots: int
    tokens_at_once: int
    config: MoEConfig | None
    with_load: bool
    scale_format: ScaleFormat
    swiglu_limit: float | None
    precision: Precision
    batch_invariant: bool
    expected_rows: float | None
    result_dtype: str

    @property
    def output_dtype(self) -> str:
        """Of the partial sums."""
        return "float32" if self.precision == "high" else "bfloat16"


def run(
    inputs: LayerInputs | RoutedInputs,
    num_tokens: Int32[Array, ""] | None,
    placed: Int32[Array, " E_physical"] | None,
    plan: Plan,
) -> tuple[Float[Array, "T H"], Int32[Array, " E"] | None]:
    """One call on checked inputs, inside of `jax.shard_map`.

    Args:
        inputs: This rank's tokens and weights; `local_expert_offset` is not looked at.
        num_tokens: Live tokens of this rank.
        placed: The placement.
        plan: What is static.

    Returns:
        The outputs of this rank's tokens, and the load if it was asked for.
    """
    nothing: Any = None
    home = inputs._replace(weights=nothing, local_expert_offset=nothing)
    tokens = _at_home(home, num_tokens, plan=plan)
    load = None
    if plan.with_load:
        counts = placement.load(tokens.routing.topk_ids, plan.num_experts)
        load = lax.psum(counts, plan.ranks.axes)
    rank = plan.ranks.index()
    if placed is not None:
        first = rank * tokens.hidden_states.shape[0]
        slots = placement.to_slots(tokens.routing, placed, first, plan.num_experts)
        tokens = tokens._replace(routing=slots)
    offset = rank * inputs.weights.num_local_experts
    between = exchange.make(plan.exchange, plan.ranks, inputs.weights.num_local_experts)

    def local_layer(received: Tokens) -> Array:
        return _local_layer(
            RoutedInputs(*received[:2], inputs.weights, received[2], offset), plan=plan
        )

    out = pieces.run(tokens, plan.tokens_at_once, between, local_layer)
    return out.astype(plan.result_dtype), load


@functools.partial(jax.jit, static_argnames="plan")
def _at_home(inputs: Any, num_tokens: Any, *, plan: Plan) -> Tokens:
    """Quantizes and routes this rank's tokens; the dead ones get no expert."""
    stages = backends.load(plan.backend)
    config: Any = plan.config  # None only where the inputs are routed

    def body(inputs: Any, num_tokens: Array | None) -> tuple[Array, ...]:
        rows = inputs.hidden_states, inputs.hidden_states_scale
        if inputs.hidden_states_scale is None:
            rows = stages.quantize(
                inputs.hidden_states, scale_format=plan.scale_format, precision=plan.precision
            )
        if isinstance(inputs, RoutedInputs):
            routing = inputs.routing
        else:
            routing = stages.route(
                inputs.routing_logits,
                inputs.routing_bias,
                inputs.routed_scaling_factor,
                config=config,
                batch_invariant=plan.batch_invariant,
            )
        topk_ids = backends.of_live_tokens(routing.topk_ids, num_tokens)
        return *rows, topk_ids, routing.topk_weights  # `jax.export` knows no types of ours

    static = ("at home", plan.config, plan.scale_format, plan.precision, plan.batch_invariant)
    values, scales, topk_ids, topk_weights = _lowered(body, stages, *static)(inputs, num_tokens)
    return Tokens(values, scales, Routing(topk_ids, topk_weights))


@functools.partial(jax.jit, static_argnames="plan")
def _local_layer(inputs: RoutedInputs, *, plan: Plan) -> Array:
    """Partial sums, by slot, of the experts that this rank holds."""
    stages = backends.load(plan.backend)
    options = Options(
        num_experts=plan.num_slots,
        top_k=inputs.routing.topk_ids.shape[1],
        expected_rows=plan.expected_rows,
        scale_format=plan.scale_format,
        swiglu_limit=plan.swiglu_limit,
        precision=plan.precision,
        batch_invariant=plan.batch_invariant,
        output_dtype=plan.output_dtype,
    )
    body = functools.partial(entry.layer, num_tokens=None, options=options, stages=stages)
    table = entry.tiling_table(inputs.weights, stages)
    return _lowered(body, stages, "local layer", options, table)(inputs)


def _lowered(body: Any, stages: backends.Backend, *static: Any) -> Any:
    if stages.KEEPS_LOWERED:
        body = lowering_cache.cached_lowering(body, stages.NAME, *static)
    return forward_only(body)
