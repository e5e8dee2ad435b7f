"""The choice of experts where registers do not hold them all: 128 at a time.

    for each group          its two best keys -> the group's key, a group per lane
    topk_group times        the best group    -> a bit per group
    for each 128 experts    keys of the kept groups; each lane inserts its four into the best
                            top_k it has seen
    top_k times             the best of all lanes' first keys, its lowest id

Code and registers depend on top_k, not on the number of experts.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import topk
from pallas_kernels.shapes import cdiv

_WIDTH = 32
_REGISTERS = 4  # of experts, read and inserted together


def choose(
    read, keys_of, lane, *, num_experts, n_group, topk_group, top_k, slots, value, group_key
):
    """Ids of the `top_k` best experts of the `topk_group` best groups, a choice per lane.

    Args:
        read: `(columns, shifts) -> loaded` of the experts `column + shift`, a register each.
        keys_of: `loaded -> keys`, a register each.
        lane: The register that holds each lane's number.
        num_experts: E.
        n_group: Groups of `E / n_group` neighbouring experts.
        topk_group: Groups to choose from.
        top_k: Experts per token.
        slots: Registers that say which choice a lane gets.
        value: `key -> f32`, what an expert of this key adds to its group.
        group_key: `(f32, f32) -> key` of a group, from the values of its two best experts.

    Returns:
        A register of ids for each of `slots`.
    """
    kept, group_size = None, num_experts // n_group
    if topk_group < n_group:
        keys = _group_keys(read, keys_of, lane, group_size, n_group, value, group_key)
        kept = _best_groups(keys, lane, topk_group)

    def mask(expert, key):
        if kept is None:
            return key
        group = lax.div(expert, jnp.int32(group_size))
        word = kept[0]
        for slot, later in enumerate(kept[1:], 1):
            word = jnp.where(group >= slot * _WIDTH, later, word)
        is_kept = lax.shift_right_logical(word, group & (_WIDTH - 1)) & 1
        return jnp.where(is_kept == 1, key, topk.TAKEN)

    best, negated = _scan(read, keys_of, lane, lane * 0, num_experts, top_k, mask)
    return topk.pop_to_lanes(best, negated, top_k, slots)


def _scan(read, keys_of, lane, first, num_experts, count, mask=lambda _, key: key):
    """The best `count` of each lane among `num_experts` experts from `first` on, a register."""
    registers = cdiv(num_experts, _WIDTH)
    at_once = min(registers, _REGISTERS)
    offsets = [lane + r * _WIDTH for r in range(at_once)]

    def load(step):
        last = jnp.int32(num_experts - 1)
        columns = [first + lax.min(o + step * (at_once * _WIDTH), last) for o in offsets]
        return read(columns, [0] * at_once)

    def add(step, carry):
        loaded, keys, negated = carry
        following = load(step + 1)  # on their way while these are inserted
        for offset, key in zip(offsets, keys_of(loaded), strict=True):
            inside = offset + step * (at_once * _WIDTH)
            key = mask(first + inside, jnp.where(inside < num_experts, key, topk.TAKEN))
            keys, negated = topk.insert(key, -(first + inside), keys, negated)
        return following, keys, negated

    start = (load(jnp.int32(0)), *topk.nothing(lane, min(count, registers)))
    return lax.fori_loop(0, cdiv(registers, at_once), add, start)[1:]


def _group_keys(read, keys_of, lane, group_size, n_group, value, group_key):
    """Keys of the groups, 32 to a register, a group per lane."""
    slots = [lane + start for start in range(0, n_group, _WIDTH)]

    def add(group, keys):
        start = lane * 0 + group * group_size
        best, negated = _scan(read, keys_of, lane, start, group_size, 2)
        first, second = (topk.across(key, lane.shape) for key, _ in topk.pop(best, negated, 2))
        key = group_key(value(first), value(second))
        return [jnp.where(s == group, key, k) for s, k in zip(slots, keys, strict=True)]

    return lax.fori_loop(0, n_group, add, topk.nothing(lane, len(slots))[0])


def _best_groups(keys, lane, topk_group):
    """A bit for each of the `topk_group` best groups: words of 32 groups, the same in all lanes."""
    negated = [-(lane + slot * _WIDTH) for slot in range(len(keys))]

    def keep(_, carry):
        keys, kept = carry
        best = topk.across(jnp.max(_largest(keys), axis=1), lane.shape)
        candidates = [
            jnp.where(key == best, n, topk.TAKEN) for key, n in zip(keys, negated, strict=True)
        ]
        first = topk.across(jnp.max(_largest(candidates), axis=1), lane.shape)
        won = [n == first for n in negated]
        keys = [jnp.where(w, topk.TAKEN, key) for w, key in zip(won, keys, strict=True)]
        return keys, [jnp.where(w, 1, k) for w, k in zip(won, kept, strict=True)]

    _, kept = lax.fori_loop(0, topk_group, keep, (keys, [lane * 0] * len(keys)))
    bits = [lax.shift_left(k, lane) for k in kept]
    return [topk.across(jnp.sum(b, axis=1), lane.shape) for b in bits]


def _largest(registers):
    largest = registers[0]
    for register in registers[1:]:
        largest = lax.max(largest, register)
    return largest
