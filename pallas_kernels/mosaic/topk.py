"""The best of a row: one row per warp, a lane and register for each of its elements.

Elements are compared by i32 keys, and equal keys by their ids, of which the lowest wins. Ids are
held negated, because a warp finds a maximum in one instruction and Mosaic GPU does not know the one
for a minimum. Registers are `i32[4, 32]`, in `layouts.row_per_warp(32)`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

# Keys below those of all numbers, -inf included, lowest first.
TAKEN = -(2**31)
NOT_A_NUMBER = TAKEN + 1


def to_key(value, source=None):
    """Maps f32, which is not -0, to i32 that compare as the floats do; NaN comes below all.

    Args:
        value: A register.
        source: One whose NaNs count too.
    """
    key = _flip_negative(lax.bitcast_convert_type(value, jnp.int32))
    is_nan = value != value
    if source is not None:
        is_nan |= source != source  # a GPU tests two numbers at once
    return jnp.where(is_nan, NOT_A_NUMBER, key)


def from_key(key):
    """The float of a key; -inf for what is not a number."""
    value = lax.bitcast_convert_type(_flip_negative(key), jnp.float32)
    return jnp.where(key <= NOT_A_NUMBER, -jnp.inf, value)


def top(keys, negated, count):
    """The `count` best keys of each row and their negated ids, `[4]` each, best first.

    The code grows with the square of the registers; `insert` and `pop_to_lanes` have the same
    meaning and suit a loop.

    Args:
        keys: Registers.
        negated: Registers, distinct in a row and descending in a lane.
        count: How many; at least so many keys of a row are above `TAKEN`.
    """
    keys, negated = _sort_lanes(keys, negated, count)
    return pop(keys, negated, count)


def pop(keys, negated, count):
    """`top` of lanes that are sorted, best first."""
    found = []
    for remaining in range(count - 1, -1, -1):
        best = jnp.max(keys[0], axis=1)
        holds = keys[0] == across(best, keys[0].shape)
        candidates = jnp.where(holds, negated[0], TAKEN)
        first = jnp.max(candidates, axis=1)
        found.append((best, first))
        won = candidates == across(first, keys[0].shape)
        keys = [jnp.where(won, b, a) for a, b in zip(keys, [*keys[1:], TAKEN], strict=True)]
        negated = [jnp.where(won, b, a) for a, b in zip(negated, [*negated[1:], 0], strict=True)]
        keys, negated = keys[:remaining], negated[:remaining]
    return found


def nothing(like, length):
    """Keys and negated ids of sorted lanes that hold nothing yet."""
    return [jnp.full_like(like, TAKEN)] * length, [jnp.zeros_like(like)] * length


def insert(key, negated_id, keys, negated):
    """Sorted lanes with one more element each, which is behind those of the same key.

    Args:
        key: A register.
        negated_id: A register.
        keys: Registers, best first; the last falls out.
        negated: Registers.
    """
    above = [key > old for old in keys]
    inserted = []
    for new, olds in ((key, keys), (negated_id, negated)):
        moved = [new, *(jnp.where(a, old, new) for a, old in zip(above, olds, strict=True))]
        inserted.append([jnp.where(a, m, o) for a, m, o in zip(above, moved, olds, strict=False)])
    return tuple(inserted)


def pop_to_lanes(keys, negated, count, slots):
    """Ids of the `count` best of sorted lanes; `slots` says which lanes get the first, second, ...

    Args:
        keys: Registers, best first.
        negated: Registers.
        count: How many; at least so many keys of a row are above `TAKEN`.
        slots: Registers.

    Returns:
        A register of ids for each of `slots`, 0 where it is not below `count`.
    """
    shape = slots[0].shape

    def step(i, carry):
        keys, negated, ids = carry
        holds = keys[0] == across(jnp.max(keys[0], axis=1), shape)
        candidates = jnp.where(holds, negated[0], TAKEN)
        first = across(jnp.max(candidates, axis=1), shape)
        won = candidates == first
        keys = [jnp.where(won, b, a) for a, b in zip(keys, [*keys[1:], TAKEN], strict=True)]
        negated = [jnp.where(won, b, a) for a, b in zip(negated, [*negated[1:], 0], strict=True)]
        return (
            keys,
            negated,
            [jnp.where(s == i, -first, d) for s, d in zip(slots, ids, strict=True)],
        )

    ids = [jnp.zeros_like(slot) for slot in slots]
    return lax.fori_loop(0, count, step, (keys, negated, ids))[2]


def to_lanes(per_row, slot, otherwise):
    """`[4, 32]` with `per_row[i]` where `slot` is i."""
    packed = jnp.full_like(slot, otherwise)
    for i, value in enumerate(per_row):
        packed = jnp.where(slot == i, across(value, slot.shape), packed)
    return packed


def across(per_row, shape):
    """`[4]` to `[4, 32]`."""
    return lax.broadcast_in_dim(per_row, shape, [0])


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


def _flip_negative(bits):
    """Turns the order of the negative numbers around; its own inverse."""
    return bits ^ (lax.shift_right_arithmetic(bits, jnp.int32(31)) & 0x7FFFFFFF)
