"""Inputs of the layer over several ranks, made where they belong; their shapes without making them.

Routings are "even" (independent Gaussian logits), "captured" (those of the stand-in for the
captured routing, with its bias) and "zipf" (an expert is wanted in proportion to 1, 1/2, 1/3, ...,
in an order that is shuffled once).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32

import jax_moe
from bench.workloads import Sizes
from interop.host_routing import topk_ids
from interop.workloads import captured_routing
from jax_moe import ExpertWeights, LayerInputs
from jax_moe.parallel.pieces import split

AXIS = "expert"
FACTOR = 2.5
NUM_ROUTINGS = 4
ROUTINGS = ("even", "captured", "zipf")
_COUNTED = 4096  # tokens whose experts are counted on the host


class Drawn(NamedTuple):
    """Routings drawn on the host.

    Attributes:
        logits: Of all ranks' tokens.
        bias: Of the experts.
    """

    logits: Float32[np.ndarray, "R N*T E"]
    bias: Float32[np.ndarray, " E"]


def mesh_of(ranks: int) -> jax.sharding.Mesh:
    """One axis over the first `ranks` devices."""
    devices = jax.devices()[:ranks]
    return jax.make_mesh((ranks,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def pieces_run(num_tokens: int, asked: Sequence[int]) -> list[int]:
    """The numbers of pieces that T is divided into where `asked` are asked for, each once."""
    return list(dict.fromkeys(len(split(num_tokens, -(-num_tokens // one))) for one in asked))


def make_inputs(
    mesh: jax.sharding.Mesh, num_tokens: int, sizes: Sizes, experts: int | None = None
) -> LayerInputs:
    """Made where they belong, rank by rank: even routing, Gaussian weights, FP8 rows.

    `routing_logits` are those of several routings, f32[R,N*T,E]; `routing` picks one.

    Args:
        mesh: Of the ranks.
        num_tokens: T of each.
        sizes: E, H and I.
        experts: Of each rank; None shares E among them.
    """
    return input_maker(mesh, num_tokens, sizes, experts)()


def input_maker(
    mesh: jax.sharding.Mesh, num_tokens: int, sizes: Sizes, experts: int | None = None
) -> Callable[[], LayerInputs]:
    """`make_inputs`, compiled but not called."""
    program = jax.jit(_maker(mesh, num_tokens, sizes, experts)).lower().compile()
    return lambda: _with_the_same_everywhere(program(), mesh)


def input_specs(mesh: jax.sharding.Mesh, num_tokens: int, sizes: Sizes) -> LayerInputs:
    """Shapes, dtypes and shardings of `make_inputs`, to compile for."""
    made = jax.eval_shape(_maker(mesh, num_tokens, sizes, None))
    arrays: list[Any] = [
        jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=NamedSharding(mesh, spec))
        for one, spec in zip(made, _specs(), strict=True)
    ]
    bias: Any = jax.ShapeDtypeStruct(
        made[0].shape[-1:], jnp.float32, sharding=NamedSharding(mesh, P())
    )
    factor: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    logits, x, scale, *weights = arrays
    return LayerInputs(logits, bias, x, scale, ExpertWeights(*weights), 0, factor)


def _specs() -> tuple[P, ...]:
    (_, _, *specs, _), _ = jax_moe.partition_specs(AXIS)
    return (P(None, AXIS), *specs)


def _maker(
    mesh: jax.sharding.Mesh, num_tokens: int, sizes: Sizes, experts: int | None
) -> Callable[[], Any]:
    ranks, (hidden, inner) = mesh.devices.size, (sizes.hidden_size, sizes.intermediate_size)
    experts = sizes.num_experts // ranks if experts is None else experts
    blocks = hidden // 128, inner // 128

    def rank() -> Any:
        key = jax.random.fold_in(jax.random.key(0), lax.axis_index(AXIS))

        def normal(index: int, *shape: int) -> Any:
            return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.bfloat16)

        def e4m3(index: int, *shape: int) -> Any:
            keys = jax.random.split(jax.random.fold_in(key, index), shape[0])
            return lax.map(
                lambda one: jax.random.normal(one, shape[1:], jnp.bfloat16).astype(
                    jnp.float8_e4m3fn
                ),
                keys,
            )  # one expert at a time is in bf16

        logits = normal(0, NUM_ROUTINGS, num_tokens, sizes.num_experts).astype(jnp.float32)
        return (
            logits,
            normal(1, num_tokens, hidden).astype(jnp.float8_e4m3fn),
            jnp.full((blocks[0], num_tokens), 0.05, jnp.float32),
            e4m3(2, experts, 2 * inner, hidden),
            jnp.full((experts, 2 * blocks[1], blocks[0]), 0.02, jnp.float32),
            e4m3(3, experts, hidden, inner),
            jnp.full((experts, *blocks), 0.02, jnp.float32),
        )

    return jax.shard_map(rank, mesh=mesh, in_specs=(), out_specs=_specs(), check_vma=False)


def _with_the_same_everywhere(made: Any, mesh: jax.sharding.Mesh) -> LayerInputs:
    """The arrays of the ranks beside bias and factor, which every rank has."""
    logits, x, scale, *weights = made
    everywhere = NamedSharding(mesh, P())
    bias = jax.device_put(np.zeros(logits.shape[-1], np.float32), everywhere)
    factor = jax.device_put(np.float32(FACTOR), everywhere)
    return LayerInputs(logits, bias, x, scale, ExpertWeights(*weights), 0, factor)


@functools.lru_cache(maxsize=4)
def draw(pattern: str, num_tokens: int, num_experts: int) -> Drawn | None:
    """Routings of all ranks' tokens; None for "even", which the devices draw.

    Args:
        pattern: One of `ROUTINGS`.
        num_tokens: N*T.
        num_experts: E.

    Raises:
        ValueError: There is no such routing.
    """
    if pattern not in ROUTINGS:
        raise ValueError(f"--routings: expected some of {', '.join(ROUTINGS)}, got {pattern!r}")
    if pattern == "even":
        return None
    rng = np.random.default_rng(0)
    if pattern == "captured":
        logits, biases = zip(
            *(captured_routing(num_tokens, rng, num_experts) for _ in range(NUM_ROUTINGS)),
            strict=True,
        )
        return Drawn(np.stack(logits), biases[0].astype(np.float32))
    wanted = -np.log1p(rng.permutation(num_experts)).astype(np.float32)
    shape = (NUM_ROUTINGS, num_tokens, num_experts)
    # The largest of log-probabilities with Gumbel noise are draws without replacement.
    noise = -np.log(rng.standard_exponential(shape, np.float32))
    return Drawn(wanted + noise, np.zeros(num_experts, np.float32))


def with_routing(inputs: LayerInputs, drawn: Drawn | None, mesh: jax.sharding.Mesh) -> LayerInputs:
    """The same inputs, routed as was drawn."""
    if drawn is None:
        return inputs
    logits = jax.device_put(drawn.logits, NamedSharding(mesh, P(None, AXIS)))
    bias = jax.device_put(drawn.bias, NamedSharding(mesh, P()))
    return inputs._replace(routing_logits=logits, routing_bias=bias)


def busiest_share(inputs: LayerInputs, ranks: int) -> float:
    """(token, expert) pairs of the busiest rank over those of the mean rank, of one routing."""
    logits = np.asarray(inputs.routing_logits[0])
    spread = logits[:: max(1, len(logits) // _COUNTED)]  # tokens of every rank
    ids = topk_ids(spread, np.asarray(inputs.routing_bias))
    of_ranks = np.bincount(ids.ravel() // (logits.shape[-1] // ranks), minlength=ranks)
    return float(of_ranks.max() / of_ranks.mean())


def routing(inputs: LayerInputs, index: Any = 0) -> LayerInputs:
    """The same with one of the routings."""
    logits = lax.dynamic_index_in_dim(inputs.routing_logits, index, 0, keepdims=False)
    return inputs._replace(routing_logits=logits)


def gathered(mesh: jax.sharding.Mesh, inputs: LayerInputs) -> LayerInputs:
    """The same with all tokens on every device; of shapes, their shapes there."""
    everywhere = NamedSharding(mesh, P())

    def gather(array: Any) -> Any:
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=everywhere)
        return jax.device_put(array, everywhere)

    return inputs._replace(
        routing_logits=gather(inputs.routing_logits),
        hidden_states=gather(inputs.hidden_states),
        hidden_states_scale=gather(inputs.hidden_states_scale),
    )
