"""What Pallas lacks in code of a single warp: loads and stores of a number, `while_loop`.

See `plgpu.warp_map`. Only numbers and references exist there; jax 0.11.2 lowers neither `ref[i]`
nor `lax.while_loop`, and knows no `pl.multiple_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, memref
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

_BLOCK = 32
_WARP = mgpu.utils.ThreadSubset.WARP


def load(ref, index) -> Int32[Array, ""]:
    """`ref[index]` of an int32 reference; a tuple of numbers where it has several dimensions."""
    index = _tuple(index)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * len(index)),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
    )
    def loaded(_, ref, *index):
        value = memref.load(ref, _places(index))
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return loaded(ref, *index)


def store(ref, index, value) -> None:
    """`ref[index] = value`, index as for `load`; seen after a wait for its next arrival."""
    index = _tuple(index)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * (len(index) + 1)),
    )
    def stored(_, ref, value, *index):
        with mgpu.utils.when(is_elected_lane()):
            memref.store(value.registers.flat[0], ref, _places(index))

    stored(ref, value, *index)


def while_loop(
    max_steps, alive: Callable[[Any], Any], step: Callable[[Any], Any], carry: Any
) -> Any:
    """`lax.while_loop(alive, step, carry)` of at most `max_steps` steps: loops of known length.

    Each skips what is left once `carry` is not alive, so that the end costs little.
    """

    def guarded(body, carry):
        return lax.cond(alive(carry), lambda: body(carry), lambda: carry)

    def block(carry):
        return lax.fori_loop(0, _BLOCK, lambda _, carry: guarded(step, carry), carry)

    blocks = lax.div(max_steps + (_BLOCK - 1), jnp.int32(_BLOCK))
    return lax.fori_loop(0, blocks, lambda _, carry: guarded(block, carry), carry)


def run(*warps: Callable[[], None]) -> None:
    """Each function by one warp of the warpgroup, all at once."""

    @plgpu.warp_map
    def _each(index):
        for i, warp in enumerate(warps):
            pl.when(index == i)(warp)


def is_elected_lane():
    """Whether this lane is the one elected to act for its warp; all lanes of the warp must ask."""
    return mgpu.utils.single_thread_predicate(scope=_WARP)


def _tuple(index) -> tuple[Any, ...]:
    return tuple(map(jnp.int32, index if isinstance(index, tuple) else (index,)))


def _places(index):
    return [arith.index_cast(ir.IndexType.get(), i.registers.flat[0]) for i in index]
