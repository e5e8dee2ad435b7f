"""Group-limited sigmoid top-k routing (DeepSeek-V3), one warp a token.

    CTA (one warpgroup)     warp 0: token 4 c      warp 1: token 4 c + 1      ...
    each warp               logits row, E / 32 experts a lane
                            score = sigmoid + bias -> order-preserving i32 key
                            per group: two best keys (redux)  -> keep topk_group groups
                            every lane sorts its keys of the kept groups
                            top_k times: best first key, its lowest id (redux), pop it
                            weights = s / (sum + 1e-20) * factor, a choice a lane

Source of the maths: DeepSeek-V3 technical report, section 2.1.2 ("noaux_tc" gating).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic import launch, layouts
from pallas_kernels.mosaic.indexed_memory import load_at, store_at
from pallas_kernels.mosaic.rounding import reciprocals
from pallas_kernels.shapes import cdiv

# Keys below those of all numbers, -inf included, lowest first.
_TAKEN = -(2**31)
_NOT_A_NUMBER = _TAKEN + 1
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
    shape = (layouts.ROWS_PER_WARPGROUP, _WIDTH)
    layout = layouts.row_per_warp(_WIDTH)
    lane = layouts.iota(shape, 1, layout)
    token = layouts.iota(shape, 0, layout) + lax.axis_index("block") * shape[0]
    row = lax.min(token, jnp.int32(num_tokens - 1)) * num_experts
    load = functools.partial(load_at, layout=layout, interpret=interpret)
    store = functools.partial(store_at, layout=layout, interpret=interpret)

    def sigmoid(registers):
        decays = [1.0 + jnp.exp(-x) for x in registers]
        return reciprocals(decays, layout=layout, interpret=interpret)

    starts = range(0, num_experts, _WIDTH)
    columns = [lane] * len(starts)
    ragged = num_experts % _WIDTH
    if ragged:
        columns[-1] = lax.min(lane, jnp.int32(ragged - 1))
    places = list(zip(columns, starts, strict=True))
    bias = [load(bias_gmem, column, shift=start) for column, start in places]
    scores = sigmoid([load(logits_gmem, row + column, shift=start) for column, start in places])
    keys = [_to_key(s + b.astype(jnp.float32)) for s, b in zip(scores, bias, strict=True)]
    if ragged:
        keys[-1] = jnp.where(lane < ragged, keys[-1], _TAKEN)
    negated = [-(lane + start) for start in starts]
    if topk_group < n_group:
        group_size = num_experts // n_group
        groups = _best_groups(keys, negated, lane, group_size, n_group, topk_group)
        keys, negated = _keep(groups, keys, negated, lane, group_size, n_group)
    chosen = [negated_id for _, negated_id in _top(keys, negated, top_k)]

    # The choices go to a lane each; their scores are computed again, which is less work than to
    # carry all scores along.
    slots = [lane + start for start in range(0, top_k, _WIDTH)]
    ids = [-_to_lanes(chosen, slot, 0) for slot in slots]
    scores = sigmoid([load(logits_gmem, row + i) for i in ids])
    chosen_scores = []
    for k in range(top_k):
        bits = lax.bitcast_convert_type(scores[k // _WIDTH], jnp.int32)
        bits = jnp.max(jnp.where(lane == k % _WIDTH, bits, _TAKEN), axis=1)
        chosen_scores.append(lax.bitcast_convert_type(bits, jnp.float32))
    total = sum(chosen_scores[1:], chosen_scores[0])  # in their order: the last bit depends on it
    scale = _across(factor_gmem[0] / (total + 1e-20), shape)
    for slot, expert, score in zip(slots, ids, scores, strict=True):
        live = (slot < top_k) & (token < num_tokens)
        store(ids_gmem, token * top_k + slot, expert, live)
        store(weights_gmem, token * top_k + slot, score * scale, live)


def _best_groups(keys, negated, lane, group_size, n_group, topk_group):
    """The `topk_group` groups with the largest sums of their two best, `[4]` each, ascending."""
    best, second = [], []
    for g in range(n_group):
        registers = range(g * group_size // _WIDTH, cdiv((g + 1) * group_size, _WIDTH))
        members = [keys[r] for r in registers]
        ids = [negated[r] for r in registers]
        if group_size % _WIDTH:
            inside = [(i <= -g * group_size) & (i > -(g + 1) * group_size) for i in ids]
            members = [jnp.where(i, m, _TAKEN) for i, m in zip(inside, members, strict=True)]
        (first_key, _), (second_key, _) = _top(members, ids, 2)
        best.append(first_key)
        second.append(second_key)
    # A group to a lane: the sums and the choice among them take one register.
    group_keys, groups = [], []
    for start in range(0, n_group, _WIDTH):
        group = lane + start
        pair = [_from_key(_to_lanes(values, group, _TAKEN)) for values in (best, second)]
        group_keys.append(jnp.where(group < n_group, _to_key(pair[0] + pair[1]), _TAKEN))
        groups.append(-group)
    kept = [-negated_id for _, negated_id in _top(group_keys, groups, topk_group)]
    for end in range(topk_group - 1, 0, -1):
        for i in range(end):
            low, high = lax.min(kept[i], kept[i + 1]), lax.max(kept[i], kept[i + 1])
            kept[i], kept[i + 1] = low, high
    return kept


def _keep(groups, keys, negated, lane, group_size, n_group):
    """The keys and negated ids of the experts of `groups` (ascending) only."""
    groups = [_across(group, lane.shape) for group in groups]
    if group_size % _WIDTH:
        for r, key in enumerate(keys):
            group = lax.div(-negated[r], jnp.int32(group_size))
            kept = functools.reduce(lax.bitwise_or, [group == g for g in groups])
            keys[r] = jnp.where(kept, key, _TAKEN)
        return keys, negated
    per_group = group_size // _WIDTH
    kept_keys, kept_negated = [], []
    for slot, group in enumerate(groups):
        later = [(g, group == g) for g in range(slot + 1, slot + n_group - len(groups) + 1)]
        for r in range(per_group):
            key = keys[slot * per_group + r]
            for g, here in later:
                key = jnp.where(here, keys[g * per_group + r], key)
            kept_keys.append(key)
            kept_negated.append(-(group * group_size + lane + r * _WIDTH))
    return kept_keys, kept_negated


def _top(keys, negated, count):
    """The `count` best keys of each row and their negated ids, `[4]` each, best first.

    Ties go to the lowest id. Ids are negated because a warp finds a maximum in one instruction
    and Mosaic GPU does not know the one for a minimum.

    Args:
        keys: Registers `i32[4, 32]`.
        negated: Registers `i32[4, 32]`, distinct in a row and descending in a lane.
        count: How many; at least so many keys of a row are above `_TAKEN`.
    """
    keys, negated = _sort_lanes(keys, negated, count)
    found = []
    for remaining in range(count - 1, -1, -1):
        best = jnp.max(keys[0], axis=1)
        holds = keys[0] == _across(best, keys[0].shape)
        candidates = jnp.where(holds, negated[0], _TAKEN)
        first = jnp.max(candidates, axis=1)
        found.append((best, first))
        won = candidates == _across(first, keys[0].shape)
        keys = [jnp.where(won, b, a) for a, b in zip(keys, [*keys[1:], _TAKEN], strict=True)]
        negated = [jnp.where(won, b, a) for a, b in zip(negated, [*negated[1:], 0], strict=True)]
        keys, negated = keys[:remaining], negated[:remaining]
    return found


def _sort_lanes(keys, negated, count):
    """The `count` best of each lane, best first, by insertion: equal keys stay in their order."""
    keys, negated = list(keys), list(negated)
    for end in range(1, len(keys)):
        for i in range(end - 1, -1, -1):
            swap = keys[i + 1] > keys[i]
            for values in (keys, negated):
                a, b = values[i], values[i + 1]
                values[i], values[i + 1] = jnp.where(swap, b, a), jnp.where(swap, a, b)
    return keys[:count], negated[:count]


def _to_lanes(per_row, slot, otherwise):
    """`[4, 32]` with `per_row[i]` where `slot` is i."""
    packed = jnp.full_like(slot, otherwise)
    for i, value in enumerate(per_row):
        packed = jnp.where(slot == i, _across(value, slot.shape), packed)
    return packed


def _across(per_row, shape):
    return lax.broadcast_in_dim(per_row, shape, [0])


def _to_key(value):
    """Maps f32, which is not -0, to i32 that compare as the floats do; NaN comes below all."""
    key = _flip_negative(lax.bitcast_convert_type(value, jnp.int32))
    return jnp.where(value != value, _NOT_A_NUMBER, key)


def _from_key(key):
    """The float of a key; -inf for what is not a number."""
    value = lax.bitcast_convert_type(_flip_negative(key), jnp.float32)
    return jnp.where(key <= _NOT_A_NUMBER, -jnp.inf, value)


def _flip_negative(bits):
    """Turns the order of the negative numbers around; its own inverse."""
    return bits ^ (lax.shift_right_arithmetic(bits, jnp.int32(31)) & 0x7FFFFFFF)
