"""Group-limited sigmoid top-k routing (DeepSeek-V3), one warp a token.

    CTA (one warpgroup)     warp 0: token 4 c      warp 1: token 4 c + 1      ...
    each warp               logits row, E / 32 experts a lane
                            score = sigmoid + bias -> order-preserving i32 key
                            per group: two best keys (redux)  -> keep topk_group groups
                            top_k times: best key, its lowest id (redux), strike it out
                            weights = s / (sum + 1e-20) * factor

Source of the maths: DeepSeek-V3 technical report, section 2.1.2 ("noaux_tc" gating).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch, layouts
from pallas_kernels.indexed_memory import load_at, store_at
from pallas_kernels.rounding import divide
from pallas_kernels.shapes import cdiv, round_up

# Keys below those of all numbers, -inf included, lowest first.
_TAKEN = -(2**31)
_DROPPED = _TAKEN + 1
_NOT_A_NUMBER = _TAKEN + 2
_WIDTH = 32  # an expert a lane, so a group of 32 is one register


def route(
    routing_logits: Float[Array, "T E"],
    routing_bias: Float[Array, "E"],
    routed_scaling_factor: Float[Array, ""],
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    interpret=None,
) -> tuple[Int32[Array, "T k"], Float[Array, "T k"]]:
    """Chooses `top_k` experts a token from its `topk_group` best groups.

    A group's score is the sum of its two best `sigmoid(logit) + bias`; the bias takes part in
    selection only. Ties go to the lowest id, a NaN score ranks below every number, ids are
    always distinct and in range.

    Args:
        routing_logits: `f32[T, E]`.
        routing_bias: `[E]`, any float dtype.
        routed_scaling_factor: `f32[]`.
        top_k: Experts a token.
        n_group: Groups of `E / n_group` neighbouring experts.
        topk_group: Groups that may be chosen from.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `topk_ids i32[T, k]`, best first, and `topk_weights f32[T, k]`, factor included.
    """
    num_tokens = routing_logits.shape[0]
    kernel = launch.kernel(
        functools.partial(
            _kernel, n_group=n_group, topk_group=topk_group, top_k=top_k, interpret=interpret
        ),
        out_type=(
            jax.ShapeDtypeStruct((num_tokens, top_k), jnp.int32),
            jax.ShapeDtypeStruct((num_tokens, top_k), jnp.float32),
        ),
        grid=(cdiv(num_tokens, layouts.ROWS_PER_WARPGROUP),),
        grid_names=("block",),
        kernel_name="moe_routing",
        interpret=interpret,
    )
    return kernel(
        routing_logits,
        routing_bias,
        jnp.reshape(routed_scaling_factor, (1,)).astype(jnp.float32),
    )


def _kernel(
    logits_gmem, bias_gmem, factor_gmem, ids_gmem, weights_gmem,
    *, n_group, topk_group, top_k, interpret,
):  # fmt: skip
    num_tokens, num_experts = logits_gmem.shape
    shape = (layouts.ROWS_PER_WARPGROUP, round_up(num_experts, _WIDTH))
    layout = layouts.row_per_warp(_WIDTH)
    row_layout = layout.reduce(1)
    first = lax.axis_index("block") * layouts.ROWS_PER_WARPGROUP

    expert = layouts.iota(shape, 1, layout)
    in_range = expert < num_experts
    column = lax.min(expert, jnp.int32(num_experts - 1))
    row = lax.min(layouts.iota(shape, 0, layout) + first, jnp.int32(num_tokens - 1))
    load = functools.partial(load_at, layout=layout, interpret=interpret)
    decay = jnp.exp(-load(logits_gmem, row * num_experts + column))
    one = plgpu.layout_cast(jnp.ones(shape, jnp.float32), layout)
    scores = divide(one, one + decay, layout=layout, interpret=interpret)
    keys = _to_key(scores + load(bias_gmem, column).astype(jnp.float32))
    keys = jnp.where(in_range, keys, _TAKEN)

    keys = _drop_groups(keys, expert, num_experts // n_group, n_group, topk_group)
    ids, chosen_scores = [], []
    for _ in range(top_k):
        _, chosen = _best(keys, expert)
        hit = expert == _across(chosen, shape)
        chosen_scores.append(jnp.sum(jnp.where(hit, scores, 0.0), axis=1))
        keys = jnp.where(hit, _TAKEN, keys)
        ids.append(chosen)

    scale = factor_gmem[0] / (sum(chosen_scores[1:], chosen_scores[0]) + 1e-20)
    token = layouts.iota(shape[:1], 0, row_layout) + first
    store = functools.partial(
        store_at, mask=token < num_tokens, layout=row_layout, interpret=interpret
    )
    for k in range(top_k):
        store(ids_gmem, token * top_k + k, ids[k])
        store(weights_gmem, token * top_k + k, chosen_scores[k] * scale)


def _drop_groups(keys, expert, group_size, n_group, topk_group):
    """Lowers the keys of all but the `topk_group` best groups below all others."""
    if topk_group == n_group:
        return keys
    group = lax.div(expert, jnp.int32(group_size))
    group_keys = []
    for g in range(n_group):
        if group_size % _WIDTH == 0:
            columns = slice(g * group_size, (g + 1) * group_size)
            members, ids = keys[:, columns], expert[:, columns]
        else:
            members, ids = jnp.where(group == g, keys, _TAKEN), expert
        best, where = _best(members, ids)
        others = jnp.where(ids == _across(where, ids.shape), _TAKEN, members)
        second = jnp.max(others, axis=1)
        group_keys.append(_to_key(_from_key(best) + _from_key(second)))
    for g in range(n_group):
        better = [
            layouts.as_int(other >= group_keys[g] if h < g else other > group_keys[g])
            for h, other in enumerate(group_keys)
            if h != g
        ]
        dropped = _across(sum(better[1:], better[0]), keys.shape) >= topk_group
        keys = jnp.where((group == g) & dropped, jnp.where(keys == _TAKEN, keys, _DROPPED), keys)
    return keys


def _best(keys, expert):
    """The largest key of each row and the lowest expert that holds it."""
    best = jnp.max(keys, axis=1)
    holds = keys == _across(best, keys.shape)
    return best, jnp.min(jnp.where(holds, expert, 2**30), axis=1)


def _across(per_row, shape):
    return lax.broadcast_in_dim(per_row, shape, [0])


def _to_key(value):
    """Maps f32 to i32 so that integers compare as the floats do; NaN comes below all numbers."""
    bits = lax.bitcast_convert_type(value + 0.0, jnp.int32)  # + 0.0 makes -0 equal to 0
    key = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return jnp.where(value != value, _NOT_A_NUMBER, key)


def _from_key(key):
    bits = jnp.where(key < 0, key ^ 0x7FFFFFFF, key)
    value = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(key <= _NOT_A_NUMBER, -jnp.inf, value)
