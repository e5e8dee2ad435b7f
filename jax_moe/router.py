"""The router in `jax.numpy`: what the oracle and the plain backend share, and kernels match.

What is compared is either a logit itself or one of the formulas of `pallas_kernels.scores`, so the
ids are the same on every backend, bit for bit. One router is the exception: of a sigmoid with a
bias the kernels take the GPU's own exponential, and experts whose keys lie within 2 ulp may trade
places.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32

from jax_moe.config import MoEConfig
from jax_moe.types import Routing
from pallas_kernels import scores

_LOWEST = np.int32(np.iinfo(np.int32).min)

_SCORES = {
    "sigmoid": scores.sigmoid,
    "softmax": scores.softmax,
    "sqrtsoftplus": scores.sqrtsoftplus,
}


def route(
    routing_logits: Float[Array, "T E"],
    routing_bias: Float[Array, " E"] | None,
    routed_scaling_factor: Float32[Array, ""],
    *,
    config: MoEConfig,
    batch_invariant: bool = False,
    num_shared_experts: int = 0,
) -> Routing:
    """Group-limited top-k; see `jax_moe.route` for the scores and the rules on ties and NaN."""
    logits = routing_logits.astype(jnp.float32)
    scored = _SCORES[config.scoring](logits)
    if routing_bias is None:
        selection_scores, ranks = scored, _rank(logits)
    else:
        selection_scores = scored + routing_bias.astype(jnp.float32)[None]
        ranks = _rank(selection_scores)
    if config.topk_group < config.n_group:
        ranks = _of_best_groups(selection_scores, ranks, config)
    topk_ids = _best(ranks, config.top_k)
    topk_weights = jnp.take_along_axis(scored, topk_ids, axis=1)
    if config.renormalize:
        total = (_sum_in_order if batch_invariant else _sum)(topk_weights)
        topk_weights = topk_weights / (total + 1e-20)
    chosen = Routing(topk_ids, topk_weights * routed_scaling_factor)
    return with_shared(chosen, logits.shape[1], num_shared_experts)


def with_shared(
    routing: Routing,
    num_experts: int,
    num_shared_experts: int,
    weight: Float32[Array, "T 1"] | float = 1.0,
) -> Routing:
    """The routing, and shared experts for every token; their ids follow the routed ones'.

    Args:
        routing: Of the routed experts.
        num_experts: E, the routed ones.
        num_shared_experts: How many there are.
        weight: Of the shared ones.
    """
    if num_shared_experts == 0:
        return routing
    shape = (len(routing.topk_ids), num_shared_experts)
    ids = num_experts + lax.broadcasted_iota(jnp.int32, shape, 1)
    weights = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), shape)
    return Routing(
        jnp.concatenate([routing.topk_ids, ids], axis=1),
        jnp.concatenate([routing.topk_weights, weights], axis=1),
    )


def _sum(weights: Float32[Array, "T k"]) -> Float32[Array, "T 1"]:
    """In an order that XLA picks by T."""
    return weights.sum(axis=1, keepdims=True)


def _sum_in_order(weights: Float32[Array, "T k"]) -> Float32[Array, "T 1"]:
    """In the order of the choices."""
    columns = jnp.split(weights, weights.shape[1], axis=1)
    return sum(columns[1:], columns[0])


def _of_best_groups(selection_scores: Array, ranks: Array, config: MoEConfig) -> Array:
    """The ranks, `_LOWEST` outside of the groups with the largest sums of their two best."""
    grouped = (-1, config.n_group, ranks.shape[1] // config.n_group)
    in_groups = ranks.reshape(grouped)
    best_two = jnp.take_along_axis(selection_scores.reshape(grouped), _best(in_groups, 2), axis=2)
    kept = _best(_rank(best_two[..., 0] + best_two[..., 1]), config.topk_group)
    groups = jnp.arange(config.n_group, dtype=jnp.int32)[None, :, None]
    is_kept = (kept[:, None, :] == groups).any(axis=2)
    return jnp.where(is_kept[:, :, None], in_groups, _LOWEST).reshape(ranks.shape)


def _rank(values: Array) -> Array:
    """Integers in the order of the values, NaN below -inf, nothing as low as `_LOWEST`.

    Magnitudes below 2^-126 are all 0, so that a device that flushes denormals sees the same ties.
    """
    values = scores.without_denormals(values)
    bits = lax.bitcast_convert_type(values, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    return jnp.where(jnp.isnan(values), _LOWEST + 1, ordered)


def _best(ranks: Array, count: int) -> Array:
    """Indices of the `count` largest along the last axis, best first, ties to the lowest index."""
    columns = lax.broadcasted_iota(jnp.int32, ranks.shape, ranks.ndim - 1)

    def take(ranks: Array, _: None) -> tuple[Array, Array]:
        best = lax.argmax(ranks, ranks.ndim - 1, jnp.int32)
        return jnp.where(columns == best[..., None], _LOWEST, ranks), best

    return jnp.moveaxis(lax.scan(take, ranks, length=count, unroll=8)[1], 0, -1)
