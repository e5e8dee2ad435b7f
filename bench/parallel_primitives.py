"""What an exchange is made of: collectives and our kernels between GPUs, by bytes."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from bench import steps
from bench.failures import one_line
from bench.parallel import microseconds
from bench.parallel_inputs import AXIS

BYTES = tuple(1024 * 4**i for i in range(10))  # 1 KB to 256 MB
_COLUMNS = 128, 1024  # of bf16 per row, the fewest and the most


class Primitive(NamedTuple):
    """One of them.

    Attributes:
        function: Of bf16[rows,columns] on each rank.
        spreads: Whether its result has N times the rows, not its argument.
        moves: Whether anything travels.
    """

    function: Callable[[Any], Any]
    spreads: bool = False
    moves: bool = True


def primitives(ranks: int) -> dict[str, dict[str, Primitive]]:
    """By name, in groups that fail together. Each moves (N-1)/N of the rows of its larger side."""
    return {
        "collectives": {
            "nothing": Primitive(lambda x: x, moves=False),  # the loop, which all times hold
            "all_gather": Primitive(lambda x: lax.all_gather(x, AXIS, tiled=True), spreads=True),
            "all_to_all": Primitive(lambda x: lax.all_to_all(x, AXIS, 0, 0, tiled=True)),
            "reduce_scatter": Primitive(lambda x: lax.psum_scatter(x, AXIS, tiled=True)),
        },
        "nvlink": {
            "nvlink_dispatch": Primitive(functools.partial(_dispatched, ranks=ranks), spreads=True),
            "nvlink_combine": Primitive(functools.partial(_combined, ranks=ranks)),
        },
        "ragged": {"ragged_all_to_all": Primitive(functools.partial(_ragged, ranks=ranks))},
    }


def measure(
    mesh: jax.sharding.Mesh, group: str, sizes: Sequence[int], calls: int
) -> Iterator[dict[str, Any]]:
    """Microseconds and GB/s per rank of each primitive of a group at each size.

    Args:
        mesh: Of the ranks.
        group: Of `primitives`.
        sizes: Bytes of a rank on the larger side; rounded to rows.
        calls: Of a loop.

    Yields:
        name, bytes, and either us and gb_s, sent bytes of a rank over the time, or the problem.
    """
    ranks = mesh.devices.size
    found: list[tuple[dict[str, Any], float, jax.ShapeDtypeStruct, Any]] = []
    for size in sizes:
        columns = max(_COLUMNS[0], min(size // (2 * ranks), _COLUMNS[1]))
        part = max(size // (2 * columns) // ranks, 1)
        for name, primitive in primitives(ranks)[group].items():
            row: dict[str, Any] = {"name": name, "bytes": part * ranks * 2 * columns}
            spec = _spec(mesh, part if primitive.spreads else part * ranks, columns)
            try:
                program = looped(mesh, primitive.function, calls).lower(spec).compile()
            except Exception as problem:
                yield row | {"problem": one_line(problem)}
                continue
            sent = row["bytes"] * (ranks - 1) / ranks if primitive.moves else 0.0
            found.append((row, sent, spec, program))
    steps.wait_for_turn()
    for row, sent, spec, program in found:
        zeros = functools.partial(jnp.zeros, spec.shape, spec.dtype)
        try:
            us = microseconds(program, jax.jit(zeros, out_shardings=spec.sharding)(), calls)
        except Exception as problem:
            yield row | {"problem": one_line(problem)}
            continue
        yield row | {"us": us, "gb_s": sent / us / 1e3}


def looped(mesh: jax.sharding.Mesh, function: Callable[[Any], Any], calls: int) -> Any:
    """The jitted program of calls, each after the one before, whose argument it changes."""

    def rank(x: Any) -> Any:
        def step(_: Any, x: Any) -> Any:
            return x.at[0, 0].add((0 * function(x)[0, 0]).astype(x.dtype))

        return lax.fori_loop(0, calls, step, x)

    spec = PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def _spec(mesh: jax.sharding.Mesh, rows: int, columns: int) -> jax.ShapeDtypeStruct:
    """Of an argument with so many rows on each rank."""
    shape = (rows * mesh.devices.size, columns)
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


def _ids(num_tokens: int, ranks: int) -> Any:
    """An expert of every rank for every token: each row goes everywhere."""
    return jnp.broadcast_to(jnp.arange(ranks, dtype=jnp.int32), (num_tokens, ranks))


def _dispatched(x: Any, ranks: int) -> Any:
    from pallas_kernels.mosaic.dispatch import dispatch

    ids = _ids(x.shape[0], ranks)
    weights = ids.astype(jnp.float32)
    return dispatch(x, None, ids, weights, axis_name=AXIS, num_local_experts=1)[0]


def _combined(x: Any, ranks: int) -> Any:
    from pallas_kernels.mosaic.combine import combine

    ids = _ids(x.shape[0] // ranks, ranks)
    return combine(x, ids, axis_name=AXIS, num_local_experts=1)


def _ragged(x: Any, ranks: int) -> Any:
    part = x.shape[0] // ranks
    offsets = jnp.arange(ranks, dtype=jnp.int32) * part
    sizes = jnp.full(ranks, part, jnp.int32)
    at = jnp.full(ranks, lax.axis_index(AXIS) * part, jnp.int32)
    out = jnp.zeros_like(x)
    return lax.ragged_all_to_all(x, out, offsets, sizes, at, sizes, axis_name=AXIS)
