"""Cases of the layer over several ranks, and what they must give; for eight CPU devices.

The oracle is `jax_moe.apply`, one rank after the other on all tokens: no exchange, no mesh.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AxisType

import jax_moe
from jax_moe import ExpertWeights, LayerInputs
from tests.moe_inputs import E4M3, SMALL, make_inputs, sharded_arguments

NUM_EXPERTS = 32
MOST_TOKENS = 8 * 129
ROUTINGS = ("random", "zipf", "one_rank")
FACTOR = 2.5


class Case(NamedTuple):
    """One call.

    Attributes:
        ranks: N.
        tokens: T of each rank.
        routing: One of `ROUTINGS`.
        live: "all" tokens, or "some": none of rank 1, half of the last rank's.
        placement: None, or "copies": every expert once and some a second or third time.
        exchange: A name of `jax_moe.parallel.exchange`.
        pieces: How many.
        check_vma: As in `jax.shard_map`.
        mesh: "auto" or "explicit" axes.
    """

    ranks: int
    tokens: int
    routing: str = "random"
    live: str = "all"
    placement: str | None = None
    exchange: str = "collectives"
    pieces: int = 1
    check_vma: bool = True
    mesh: str = "auto"

    @property
    def hosts(self) -> int:
        """Of a mesh with two axes."""
        return min(self.ranks, 2)

    @property
    def axis_name(self) -> Any:
        """One axis, two for `two_level`."""
        return ("host", "device") if self.exchange == "two_level" else "expert"

    @property
    def max_rows_at_once(self) -> int:
        """For that many pieces."""
        return self.ranks * max(-(-self.tokens // self.pieces), 1)


@functools.cache
def tokens_of(routing: str) -> LayerInputs:
    """The most tokens that a case has, and weights of all experts."""
    inputs = make_inputs(
        MOST_TOKENS, num_experts=NUM_EXPERTS, num_local_experts=NUM_EXPERTS, offset=0
    )
    logits = np.array(inputs.routing_logits)
    if routing == "zipf":
        logits -= 2 * np.log(np.arange(1, NUM_EXPERTS + 1, dtype=np.float32))
    elif routing == "one_rank":  # the first four experts are on the first of eight ranks
        logits[:, :4] = 4 + logits[:, :4] / 8
    return inputs._replace(routing_logits=logits, routed_scaling_factor=FACTOR)


@functools.cache
def reference_of(routing: str) -> np.ndarray:
    """The float32 oracle's outputs of all these tokens."""
    return np.asarray(jax_moe.reference(*tokens_of(routing).arguments, config=SMALL), np.float32)


def live_tokens(case: Case) -> np.ndarray:
    """i32[N]."""
    live = np.full(case.ranks, case.tokens, np.int32)
    if case.live == "some":
        live[-1] //= 2
        live[1:2] = 0
    return live


def is_live(case: Case) -> np.ndarray:
    """bool[N*T]."""
    return (np.arange(case.tokens) < live_tokens(case)[:, None]).ravel()


def placement_of(case: Case) -> np.ndarray | None:
    """i32[E_physical]: half as many slots again, in no order."""
    if case.placement is None:
        return None
    rng = np.random.default_rng(1)
    copies = rng.choice(8, NUM_EXPERTS // 2)  # so some of the first eight have three or more
    return rng.permutation(np.concatenate([np.arange(NUM_EXPERTS), copies])).astype(np.int32)


def inputs_of(case: Case) -> LayerInputs:
    """Global arrays; dead tokens are NaN in everything."""
    inputs = tokens_of(case.routing)
    count = case.ranks * case.tokens
    dead = ~is_live(case)
    logits = inputs.routing_logits[:count].copy()
    rows, scales = inputs.hidden_states[:count].copy(), inputs.hidden_states_scale[:, :count].copy()
    logits[dead], rows[dead], scales[:, dead] = np.nan, E4M3(np.nan), np.nan
    weights = inputs.weights
    if case.placement is not None:
        weights = ExpertWeights(*(array[placement_of(case)] for array in weights))
    return LayerInputs(logits, inputs.routing_bias, rows, scales, weights, 0, FACTOR)


def arguments(case: Case) -> tuple[Any, ...]:
    """The nine arguments of the layer over several ranks."""
    return sharded_arguments(inputs_of(case))


def mesh_of(case: Case) -> jax.sharding.Mesh:
    """The first N devices."""
    kind = AxisType.Auto if case.mesh == "auto" else AxisType.Explicit
    devices = jax.devices()[: case.ranks]
    if case.exchange == "two_level":
        shape, names = (case.hosts, case.ranks // case.hosts), ("host", "device")
    else:
        shape, names = (case.ranks,), ("expert",)
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def run(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Output and load of the case."""
    layer = jax_moe.expert_parallel(
        mesh_of(case),
        case.axis_name,
        config=SMALL,
        exchange=case.exchange,
        max_rows_at_once=case.max_rows_at_once,
        with_load=True,
        check_vma=case.check_vma,
    )
    out, load = layer(*arguments(case), num_tokens=live_tokens(case), placement=placement_of(case))
    return np.asarray(out), np.asarray(load)


def ids_and_weights(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Logical ids, -1 for dead tokens, and weights of all ranks' tokens, routed rank by rank.

    (On a CPU, the last bit of a weight depends on how many tokens are routed at once.)
    """
    inputs = inputs_of(case)
    logits, bias = inputs.routing_logits, inputs.routing_bias
    shape = len(logits), SMALL.top_k
    if not logits.size:
        return np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    routed = [jax_moe.route(a, bias, FACTOR, config=SMALL) for a in np.split(logits, case.ranks)]
    live = is_live(case)[:, None]
    ids, weights = (np.concatenate(arrays) for arrays in zip(*routed, strict=True))
    return np.where(live, ids, -1), np.where(live, weights, 0)


def slots_of(ids: np.ndarray, placed: np.ndarray | None) -> np.ndarray:
    """Physical ids, token by token: token t takes copy t mod copies."""
    if placed is None:
        return ids
    slots = np.full_like(ids, -1)
    for token, choice in zip(*np.nonzero(ids >= 0), strict=True):
        copies = np.flatnonzero(placed == ids[token, choice])
        slots[token, choice] = copies[token % len(copies)]
    return slots


@functools.cache
def _one_rank(num_slots: int) -> Any:
    return jax.jit(functools.partial(jax_moe.apply_routed, num_experts=num_slots))


def partial_sums(case: Case) -> np.ndarray:
    """bf16[N,N*T,H]: what the experts of each rank make of all tokens.

    All cases share two programs: `MOST_TOKENS` rows, all weights, the ids of one rank's experts.
    """
    inputs, placed = tokens_of(case.routing), placement_of(case)
    weights = inputs.weights if placed is None else [array[placed] for array in inputs.weights]
    ids, topk_weights = ids_and_weights(case)
    slots = np.full((MOST_TOKENS, SMALL.top_k), -1, np.int32)
    slots[: len(ids)] = slots_of(ids, placed)
    padded = np.zeros(slots.shape, np.float32)
    padded[: len(ids)] = topk_weights
    num_slots = len(weights[0])
    rank_of = np.where(slots < 0, -1, slots // (num_slots // case.ranks))
    outs = [
        _one_rank(num_slots)(
            inputs.hidden_states,
            inputs.hidden_states_scale,
            *weights,
            np.where(rank_of == rank, slots, -1),
            padded,
            0,
        )
        for rank in range(case.ranks)
    ]
    return np.stack([np.asarray(out)[: len(ids)] for out in outs])


def in_order(parts: np.ndarray) -> np.ndarray:
    """The sum over the first axis in float32 and in its order, cast once."""
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total = total + part.astype(np.float32)
    return total.astype(ml_dtypes.bfloat16)


def expected(case: Case) -> np.ndarray:
    """The output, to the bit."""
    parts = partial_sums(case)
    if case.exchange != "two_level":
        return in_order(parts)
    by_host = np.split(parts, case.hosts)
    return in_order(np.stack([in_order(host) for host in by_host]))
