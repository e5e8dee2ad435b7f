"""Checks of values, for debugging: they cost nothing unless asked for.

Shapes are always checked (`jax_moe.validate`); what a plan holds only under `checkify`:

    >>> from jax.experimental import checkify
    >>> checked = checkify.checkify(jax.jit(step))     # step calls jax_moe.up_project, ...
    >>> error, out = checked(*arguments)
    >>> error.throw()
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify

from jax_moe.types import GroupPlan


def check_plan(plan: GroupPlan) -> None:
    """Notes for `checkify` what a group plan violates; does nothing outside of it.

    A plan of `jax_moe.plan_groups` passes. Kernels trust theirs: with one that does not, they may
    read or write outside of their arrays.

    Args:
        plan: Of the right shapes.
    """
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in plan):
        return
    rows, tiles = plan.row_token.shape[0], plan.tile_expert.shape[0]
    num_tokens, num_local_experts = plan.pair_row.shape[0], plan.group_sizes.shape[0]
    block_m = max(plan.block_m, 1)
    live_tiles = (plan.group_sizes + (block_m - 1)) // block_m
    ends = plan.group_offsets + live_tiles * block_m
    live = jnp.arange(tiles, dtype=jnp.int32) < plan.num_tiles[0]
    live_rows = jnp.repeat(live, block_m, total_repeat_length=rows)
    checks = {
        "group_sizes: negative": plan.group_sizes >= 0,
        "group_offsets: not a multiple of block_m": plan.group_offsets % block_m == 0,
        "group_offsets: not ascending, or groups overlap": plan.group_offsets[1:] >= ends[:-1],
        "group_sizes: more rows than there are": (plan.group_offsets >= 0) & (ends <= rows),
        "num_tiles: not that of group_sizes": plan.num_tiles[0] == live_tiles.sum(),
        "tile_expert: out of range": _within(plan.tile_expert, 0, num_local_experts),
        "row_token: out of range": _within(plan.row_token, -1, num_tokens) | ~live_rows,
        "pair_row: out of range": _within(plan.pair_row, -1, rows),
    }
    for message, holds in checks.items():
        checkify.debug_check(jnp.all(holds), f"plan.{message}")


def _within(values: Array, low: int, end: int) -> Array:
    return (values >= low) & (values < end)
