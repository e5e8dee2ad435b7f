"""Which rank holds which expert: copies of busy experts, chosen without a recompilation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32

from jax_moe import validate
from jax_moe.types import Routing


def check(placement: Any, num_experts: int, num_slots: int) -> None:
    """Checks a placement; its values only where they are known.

    Args:
        placement: i32[E_physical], the logical expert in each physical slot.
        num_experts: E.
        num_slots: E_physical, the experts that all ranks hold together.

    Raises:
        TypeError: No int32 array.
        ValueError: Of another length; an id out of range; an expert that is in no slot.
    """
    sizes: validate.Sizes = {"E_physical": (num_slots, "gemm1_weights of all ranks")}
    validate.array("placement", placement, "E_physical", validate.I32, sizes)
    if not is_known(placement):
        return
    held = jax.device_get(placement)
    wrong = held[(held < 0) | (held >= num_experts)]
    if wrong.size:
        raise ValueError(
            f"placement: expected expert ids in 0..{num_experts - 1}, got {int(wrong[0])}"
        )
    missing = np.setdiff1d(np.arange(num_experts), held)
    if missing.size:
        raise ValueError(
            f"placement: expected every expert of 0..{num_experts - 1} in a slot, got none for "
            f"expert {int(missing[0])} ({missing.size} missing)"
        )


def is_known(array: Any) -> bool:
    """Whether this process can read an array's values."""
    if not isinstance(array, jax.Array):
        return True
    if isinstance(array, jax.core.Tracer):
        return False
    return array.is_fully_addressable or array.is_fully_replicated


def to_slots(
    routing: Routing,
    placement: Int32[Array, " E_physical"],
    first_token: Int32[Array, ""],
    num_experts: int,
) -> Routing:
    """Logical to physical expert ids; a token takes copy `token mod copies` of each expert.

    Args:
        routing: Logical ids; those outside 0..E-1 mean "no expert" and become -1.
        placement: i32[E_physical], the logical expert in each physical slot.
        first_token: Number of the first token among those of all ranks.
        num_experts: E.

    Returns:
        Physical ids. A pair whose expert has no slot gets slot 0 and a NaN for a weight, so that
        its token becomes NaN rather than a little wrong.
    """
    num_slots = placement.shape[0]
    slots = jnp.arange(num_slots, dtype=jnp.int32)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    holds = placement[None] == experts[:, None]  # [E, E_physical]
    copies = holds.sum(axis=1, dtype=jnp.int32)
    first = jnp.cumsum(copies, dtype=jnp.int32) - copies
    earlier = (placement[None] == placement[:, None]) & (slots[None] < slots[:, None])
    which_copy = earlier.sum(axis=1, dtype=jnp.int32)
    is_expert = (placement >= 0) & (placement < num_experts)
    position = jnp.where(is_expert, first[placement] + which_copy, num_slots)
    slot_of = jnp.zeros_like(slots).at[position].set(slots, mode="drop")  # grouped by expert

    topk_ids, topk_weights = routing
    is_chosen = (topk_ids >= 0) & (topk_ids < num_experts)
    ids = jnp.where(is_chosen, topk_ids, 0)
    token = first_token + jnp.arange(ids.shape[0], dtype=jnp.int32)
    found = slot_of[first[ids] + token[:, None] % jnp.maximum(copies[ids], 1)]
    is_held = copies[ids] > 0
    return Routing(
        jnp.where(is_chosen, jnp.where(is_held, found, 0), -1),
        jnp.where(is_chosen & ~is_held, jnp.float32(jnp.nan), topk_weights),
    )


def load(topk_ids: Int32[Array, "T k"], num_experts: int) -> Int32[Array, " E"]:
    """Pairs of each logical expert among these tokens."""
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    return (topk_ids[:, :, None] == experts[None, None]).sum(axis=(0, 1), dtype=jnp.int32)
