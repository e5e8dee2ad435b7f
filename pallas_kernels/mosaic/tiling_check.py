"""Whether the matmuls can be built with a configuration, found out without compiling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic.hopper.down_projection import down_projection
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig
from pallas_kernels.mosaic.hopper.up_projection import up_projection
from pallas_kernels.shapes import QUANT_BLOCK, round_up
from pallas_kernels.tuning.table_format import Sizes
from pallas_kernels.types import GroupPlan, Quantized

MAX_BLOCK_M = 128
"""Tokens of the largest tile."""


def gathers(block_m: int) -> bool:
    """Whether the up-projection picks its rows itself, instead of a kernel before it.

    Not where tiles are full: threads that copy 128 rows hold up the tensor cores for longer than
    that kernel takes.
    """
    return block_m < MAX_BLOCK_M


def projection(role: str, config: MatmulConfig, interpret: Any = None) -> Callable[..., Any]:
    """A matmul as a function of rows (tokens, if it gathers), their plan, weights and scales.

    Args:
        role: "up_projection" or "down_projection".
        config: Tile and pipeline.
        interpret: Interpreter parameters, or None for the GPU.
    """
    if role == "down_projection":
        return functools.partial(down_projection, config=config, interpret=interpret)

    up = functools.partial(
        up_projection, config=config, gather_rows=gathers(config.block_m), interpret=interpret
    )
    return lambda *arrays: up(*arrays)[0]


def check(role: str, config: MatmulConfig, sizes: Sizes) -> None:
    """Raises what building the kernel would raise, such as ValueError for too many stages.

    Args:
        role: "up_projection" or "down_projection".
        config: Tile and pipeline.
        sizes: Of a rank.
    """
    hidden, intermediate, experts = sizes
    rows = round_up(config.block_m, 32)
    shape: Any = jax.ShapeDtypeStruct
    n, k = {
        "up_projection": (2 * intermediate, hidden),
        "down_projection": (hidden, intermediate),
    }[role]
    plan = GroupPlan(
        group_sizes=shape((experts,), jnp.int32),
        group_offsets=shape((experts,), jnp.int32),
        row_token=shape((rows,), jnp.int32),
        pair_row=shape((1, 1), jnp.int32),
        tile_expert=shape((rows // config.block_m,), jnp.int32),
        num_tiles=shape((1,), jnp.int32),
    )
    arrays = (
        Quantized(
            shape((rows, k), jnp.float8_e4m3fn), shape((k // QUANT_BLOCK, rows), jnp.float32)
        ),
        plan,
        shape((experts, n, k), jnp.float8_e4m3fn),
        shape((experts, n // QUANT_BLOCK, k // QUANT_BLOCK), jnp.float32),
    )
    jax.eval_shape(projection(role, config), *arrays)
