"""Group-limited top-k routing (DeepSeek-V3), one warp per token.

    CTA (one warpgroup)     warp 0: token 4 c      warp 1: token 4 c + 1      ...
    each warp               score = sigmoid(logit), an expert per lane and register
                            score + bias, or the logit -> order-preserving i32 key
                            keys of the kept groups -> ids of the top_k, one per lane
                            weights = s / (sum + 1e-20) * factor

Up to 256 experts are held in registers at once (`_choose_unrolled`). Of more, or for many groups or
choices, 128 at a time are merged into what each lane has found best (`routing_loop`), so that code
and registers stay bounded; only a softmax's total is written out for all experts.

Other scores are those of `pallas_kernels.scores`, to the last bit. Without a bias every score rises
with its logit, which is then the key itself; only the sums of groups need scores. A softmax's total
over all experts is computed only where ids or weights depend on it.

Source of the maths: DeepSeek-V3 technical report, section 2.1.2 ("noaux_tc" gating).
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.mosaic import launch, layouts, routing_loop
from pallas_kernels.mosaic import scores as formulas
from pallas_kernels.mosaic.indexed_memory import load_at, store_at
from pallas_kernels.mosaic.rounding import map_registers, reciprocals
from pallas_kernels.mosaic.topk import NOT_A_NUMBER, TAKEN, across, from_key, to_key, to_lanes, top
from pallas_kernels.shapes import cdiv
from pallas_kernels.types import Routing

KERNEL_NAME = "moe_routing"
_WIDTH = 32  # an expert per lane, so a group of 32 is one register
# Of `$1` in the lane of the lowest 5 bits of `$2`.
_FROM_LANE = "{ .reg .b32 i; mov.b32 i, $2; shfl.sync.idx.b32 $0, $1, i, 31, -1; }"
_MAX_UNROLLED = {"num_experts": 256, "n_group": 16, "top_k": 16}


def route(
    routing_logits: Float[Array, "T E"],
    routing_bias: Float[Array, "E"] | None,
    routed_scaling_factor: Float[Array, ""],
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    scoring: str = "sigmoid",
    renormalize: bool = True,
    num_shared_experts: int = 0,
    interpret=None,
) -> Routing:
    """Chooses `top_k` experts per token from its `topk_group` best groups.

    A group's score is the sum of its two best `score(logit) + bias`; the bias takes part in
    selection only. Ties go to the lowest id, a NaN score ranks below every number, ids are
    always distinct and in range.

    Args:
        routing_logits: `f32[T, E]`.
        routing_bias: `[E]`, any float dtype; or None.
        routed_scaling_factor: `f32[]`.
        top_k: Experts per token.
        n_group: Groups of `E / n_group` neighbouring experts.
        topk_group: Groups that may be chosen from.
        scoring: "sigmoid", "softmax" or "sqrtsoftplus".
        renormalize: Whether the weights of a token are divided by their sum.
        num_shared_experts: s, of those that every token takes besides, with the ids from E on and
            the weight 1.
        interpret: Interpreter parameters, or None for the GPU.

    Returns:
        `topk_ids i32[T, k + s]`, best first, and `topk_weights f32[T, k + s]`, factor included.
    """
    (routing,) = launch.side_by_side(
        blocks(
            routing_logits,
            routing_bias,
            routed_scaling_factor,
            top_k=top_k,
            n_group=n_group,
            topk_group=topk_group,
            scoring=scoring,
            renormalize=renormalize,
            num_shared_experts=num_shared_experts,
            interpret=interpret,
        ),
        kernel_name=KERNEL_NAME,
        interpret=interpret,
    )
    return Routing(*routing)


def blocks(
    routing_logits: Float[Array, "T E"],
    routing_bias: Float[Array, "E"] | None,
    routed_scaling_factor: Float[Array, ""],
    *,
    top_k: int,
    scoring: str = "sigmoid",
    renormalize: bool = True,
    num_shared_experts: int = 0,
    interpret=None,
    **groups: int,
) -> launch.Blocks:
    """The blocks of `route`, whose arguments these are; they give the fields of `Routing`."""
    num_tokens, columns = routing_logits.shape[0], top_k + num_shared_experts
    bias = () if routing_bias is None else (routing_bias,)
    factor = jnp.reshape(routed_scaling_factor, (1,)).astype(jnp.float32)
    return launch.Blocks(
        num_blocks=cdiv(num_tokens, layouts.ROWS_PER_WARPGROUP),
        inputs=(routing_logits, *bias, factor),
        out_type=(
            jax.ShapeDtypeStruct((num_tokens, columns), jnp.int32),
            jax.ShapeDtypeStruct((num_tokens, columns), jnp.float32),
        ),
        body=functools.partial(
            _kernel,
            top_k=top_k,
            scoring=scoring,
            renormalize=renormalize,
            interpret=interpret,
            **groups,
        ),
    )


def _sigmoid(logits, *, layout, interpret):
    """Scores of registers of logits, rounded as `1 / (1 + exp(-x))` is."""
    decays = [1.0 + jnp.exp(-x) for x in logits]
    return reciprocals(decays, layout=layout, interpret=interpret)


def _biased_keys(scores, bias):
    """What experts are chosen by."""
    return [to_key(s + b.astype(jnp.float32)) for s, b in zip(scores, bias, strict=True)]


def _kernel(block, *refs, n_group, topk_group, top_k, scoring, renormalize, interpret):
    logits_gmem, *bias_gmem, factor_gmem, ids_gmem, weights_gmem = refs
    num_tokens, num_experts = logits_gmem.shape
    shape = (layouts.ROWS_PER_WARPGROUP, _WIDTH)
    layout = layouts.row_per_warp(_WIDTH)
    lane = layouts.iota(shape, 1, layout)
    token = layouts.iota(shape, 0, layout) + block * shape[0]
    row = lax.min(token, jnp.int32(num_tokens - 1)) * num_experts
    load = functools.partial(load_at, layout=layout, interpret=interpret)
    store = functools.partial(store_at, layout=layout, interpret=interpret)
    sizes = {"num_experts": num_experts, "n_group": n_group, "top_k": top_k}
    is_unrolled = all(size <= _MAX_UNROLLED[name] for name, size in sizes.items())

    def read(columns, starts):
        """Bias and logits of the experts `column + start`, a register each."""
        places = list(zip(columns, starts, strict=True))
        bias = [load(ref, column, shift=start) for ref in bias_gmem for column, start in places]
        return bias, [load(logits_gmem, row + column, shift=start) for column, start in places]

    loaded = read(*_columns(num_experts, lane)) if is_unrolled else None

    def logits_from(start):
        if loaded is not None:
            return loaded[1][start // _WIDTH]
        column = lax.min(lane, jnp.int32(num_experts - 1 - start))
        return load(logits_gmem, row + column, shift=start)

    is_quick, all_scores = scoring == "sigmoid" and bool(bias_gmem), None
    # It is one factor of all weights, and logits or quotients of weights do not depend on it.
    needs_total = bool(bias_gmem) or topk_group < n_group or not renormalize
    if is_quick:
        score = functools.partial(_sigmoid, layout=layout, interpret=interpret)
    elif scoring != "softmax" or needs_total:
        score, score_all = _formula(scoring, logits_from, num_experts, lane, interpret)
        if loaded is not None and bias_gmem:
            all_scores = score_all(loaded[1])

    def keys_of(loaded):
        bias, logits = loaded
        if is_quick:
            return _biased_keys(score(logits), bias)
        if bias:
            biased = zip(all_scores or score(logits), bias, strict=True)
            values = [formulas.add(s, b.astype(jnp.float32), interpret) for s, b in biased]
        else:
            values = [formulas.without_denormals(x, interpret) for x in logits]
        return [to_key(*each) for each in zip(values, logits, strict=True)]

    def value(key):
        """What an expert of this key adds to its group."""
        if is_quick:
            return from_key(key)
        value = jnp.where(key <= NOT_A_NUMBER, jnp.nan, from_key(key))
        return value if bias_gmem else score([value])[0]  # without a bias it is a logit

    def group_key(first, second):
        total = first + second
        return to_key(total if is_quick else formulas.without_denormals(total, interpret))

    groups = {"topk_group": topk_group, "value": value, "group_key": group_key}
    columns = ids_gmem.shape[1]
    slots = [lane + start for start in range(0, columns, _WIDTH)]
    if is_unrolled:
        chosen = _choose_unrolled(keys_of(loaded), lane, **sizes, **groups)
        ids = [-to_lanes(chosen, slot, 0) for slot in slots]
    else:
        ids = routing_loop.choose(read, keys_of, lane, **sizes, **groups, slots=slots)

    # The choices have a lane each. But for square roots it is less work to compute the scores
    # again than to fetch them.
    if all_scores is not None and scoring == "sqrtsoftplus":
        scores = [_pick(all_scores, i, layout, interpret) for i in ids]
    else:
        chosen = [load(logits_gmem, row + i) for i in ids]
        if scoring == "softmax" and not needs_total:
            largest = _of_choice(chosen, 0, layout, interpret)
            scores = formulas.softmax_of_best(chosen, largest, interpret)
        else:
            scores = score(chosen)
    if renormalize:
        total = _total(scores, top_k, layout, interpret)
        scale = factor_gmem[0] / (total + 1e-20)
    else:
        scale = factor_gmem[0]
    for slot, expert, weight in zip(slots, ids, scores, strict=True):
        live = (slot < columns) & (token < num_tokens)
        weight *= scale
        if columns > top_k:  # shared experts follow
            expert = jnp.where(slot < top_k, expert, slot + (num_experts - top_k))
            weight = jnp.where(slot < top_k, weight, 1.0)
        store(ids_gmem, token * columns + slot, expert, live)
        store(weights_gmem, token * columns + slot, weight, live)


def _formula(scoring, read, num_experts, lane, interpret):
    """Scores as `pallas_kernels.scores` rounds them: functions of registers of logits.

    The second takes those of all experts, and may give numbers for what is NaN.
    """
    if scoring == "softmax":
        return formulas.softmax(read, num_experts, lane, interpret)
    formula = {"sigmoid": formulas.sigmoid, "sqrtsoftplus": formulas.sqrtsoftplus}[scoring]
    score = functools.partial(formula, interpret=interpret)
    return score, score


def _pick(registers, ids, layout, interpret):
    """What lane `id % 32` of register `id // 32` holds."""
    if interpret:
        return jnp.take_along_axis(jnp.concatenate(registers, axis=1), ids, axis=1)
    bits = lax.bitcast_convert_type(ids, jnp.float32)
    moved = [map_registers(_FROM_LANE, register, bits, layout=layout) for register in registers]
    picked = moved[0]
    for number, register in enumerate(moved[1:], 1):
        picked = jnp.where(ids >= number * _WIDTH, register, picked)
    return picked


def _total(scores, top_k, layout, interpret):
    """The sum of the chosen scores in every lane, in their order: the last bit depends on it."""
    choices = [_of_choice(scores, k, layout, interpret) for k in range(top_k)]
    return functools.reduce(operator.add, choices)


def _of_choice(registers, choice, layout, interpret):
    """In every lane what the lane of a choice holds."""
    register, lane = registers[choice // _WIDTH], choice % _WIDTH
    if interpret:
        return jnp.broadcast_to(register[:, lane : lane + 1], register.shape)
    return map_registers(f"shfl.sync.idx.b32 $0, $1, {lane}, 31, -1;", register, layout=layout)


def _columns(num_experts, lane):
    """What `read` takes for all experts; lanes past the last one read that again."""
    starts = range(0, num_experts, _WIDTH)
    columns = [lane] * len(starts)
    if num_experts % _WIDTH:
        columns[-1] = lax.min(lane, jnp.int32(num_experts % _WIDTH - 1))
    return columns, starts


def _choose_unrolled(keys, lane, *, num_experts, n_group, topk_group, top_k, value, group_key):
    """The negated ids of the `top_k` best experts, `[4]` each, best first."""
    ragged = num_experts % _WIDTH
    if ragged:
        keys[-1] = jnp.where(lane < ragged, keys[-1], TAKEN)
    negated = [-(lane + start) for start in range(0, num_experts, _WIDTH)]
    if topk_group < n_group:
        group_size = num_experts // n_group
        groups = _best_groups(
            keys, negated, lane, group_size, n_group, topk_group, value, group_key
        )
        keys, negated = _keep(groups, keys, negated, lane, group_size, n_group)
    return [negated_id for _, negated_id in top(keys, negated, top_k)]


def _best_groups(keys, negated, lane, group_size, n_group, topk_group, value, group_key):
    """The `topk_group` groups with the largest sums of their two best, `[4]` each, ascending."""
    best, second = [], []
    for g in range(n_group):
        registers = range(g * group_size // _WIDTH, cdiv((g + 1) * group_size, _WIDTH))
        members = [keys[r] for r in registers]
        ids = [negated[r] for r in registers]
        if group_size % _WIDTH:
            inside = [(i <= -g * group_size) & (i > -(g + 1) * group_size) for i in ids]
            members = [jnp.where(i, m, TAKEN) for i, m in zip(inside, members, strict=True)]
        (first_key, _), (second_key, _) = top(members, ids, 2)
        best.append(first_key)
        second.append(second_key)
    # A group to a lane: the sums and the choice among them take one register.
    pair = [value(to_lanes(values, lane, TAKEN)) for values in (best, second)]
    keys_of_groups = jnp.where(lane < n_group, group_key(*pair), TAKEN)
    kept = [-negated_id for _, negated_id in top([keys_of_groups], [-lane], topk_group)]
    for end in range(topk_group - 1, 0, -1):
        for i in range(end):
            low, high = lax.min(kept[i], kept[i + 1]), lax.max(kept[i], kept[i + 1])
            kept[i], kept[i + 1] = low, high
    return kept


def _keep(groups, keys, negated, lane, group_size, n_group):
    """The keys and negated ids of the experts of `groups` (ascending) only."""
    groups = [across(group, lane.shape) for group in groups]
    if group_size % _WIDTH:
        for r, key in enumerate(keys):
            group = lax.div(-negated[r], jnp.int32(group_size))
            kept = functools.reduce(lax.bitwise_or, [group == g for g in groups])
            keys[r] = jnp.where(kept, key, TAKEN)
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
