"""Stand-in routing tensors for the workloads, and what a routing asks of one rank."""

from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float32, Int

from bench.workloads import Sizes
from interop.host_routing import topk_ids
from interop.workloads import Workload, captured_routing
from jax_moe import DEEPSEEK_V3, MoEConfig, models
from jax_moe.models import Model

PATTERNS = ("moments", "balanced", "zipf", "one_hot")
_MAX_DRAWS = 64


class HostRouting(NamedTuple):
    """The two routing tensors of a workload, on the host."""

    logits: Float32[np.ndarray, "T E"]
    bias: BFloat16[np.ndarray, " E"]


class LocalLoad(NamedTuple):
    """What one routing asks of this rank.

    Attributes:
        pairs: Local (token, expert) pairs.
        active_experts: Local experts with at least one pair.
        max_per_expert: Pairs of the busiest local expert.
        tokens: Tokens with at least one local pair.
    """

    pairs: int
    active_experts: int
    max_per_expert: int
    tokens: int


def draw(
    workload: Workload,
    sizes: Sizes,
    seed: int,
    pattern: str = "moments",
    model: Model = models.DEEPSEEK_V3,
) -> HostRouting:
    """Draws `routing_logits` and `routing_bias` on the host, so the same for every device.

    Args:
        workload: Gives T and the offset; both enter the seed.
        sizes: Gives the number of experts; below 256, the first columns of the draw are taken.
        seed: The run's seed.
        pattern: `moments` follows the captured routing and redraws until at least min(T, 2) pairs
            are local, so that no row measures an empty layer. The others give every token exactly
            one local expert, to compare loads at the same number of pairs: `balanced` (in turn),
            `zipf` (expert r with probability ~ 1/r) and `one_hot` (the first one takes all).
        model: Gives the router.

    Returns:
        f32[T, E] logits and bf16[E] bias, zeros where the model has none or scores by softmax.

    Raises:
        ValueError: `pattern` is none of `PATTERNS`.
        RuntimeError: No draw had enough local pairs.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"--routing: expected one of {', '.join(PATTERNS)}, got {pattern!r}")
    for attempt in range(_MAX_DRAWS):
        entropy = [seed, workload.num_tokens, workload.local_expert_offset, attempt]
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
        logits, bias = captured_routing(workload.num_tokens, rng, sizes.num_experts)
        # The captured bias is for sigmoids: among softmax scores of 1/E it alone would choose.
        is_biased = model.has_routing_bias and model.scoring != "softmax"
        routing = HostRouting(logits, bias if is_biased else np.zeros_like(bias))
        if pattern != "moments":
            return HostRouting(
                _one_local_expert_each(routing, workload, sizes, pattern, model.config),
                routing.bias,
            )
        if local_load(routing, workload, sizes, model.config).pairs >= min(workload.num_tokens, 2):
            return routing
    raise RuntimeError(f"no routing with a local pair in {_MAX_DRAWS} draws for {workload}")


def _one_local_expert_each(
    routing: HostRouting, workload: Workload, sizes: Sizes, pattern: str, config: MoEConfig
) -> Float32[np.ndarray, "T E"]:
    """Raises one local expert by `pattern` and experts of other ranks above the rest."""
    tokens = np.arange(workload.num_tokens)
    if pattern == "balanced":
        expert = tokens % sizes.num_local_experts
    elif pattern == "one_hot":
        expert = np.zeros_like(tokens)
    else:
        share = np.cumsum(1.0 / np.arange(1, sizes.num_local_experts + 1))
        # Equally spaced quantiles in a scrambled order: the law itself, without sampling noise.
        position = (tokens * 7919 % len(tokens) + 0.5) / len(tokens)
        expert = np.searchsorted(share / share[-1], position)
    first = sizes.offset(workload)
    raised = routing.logits - np.float32(5.0)
    raised[tokens, first + expert] += 9.0
    for slot in range(config.top_k - 1):
        raised[tokens, _elsewhere(tokens, slot, first, sizes, config)] += 9.0
    return raised.astype(ml_dtypes.bfloat16).astype(np.float32)


def _elsewhere(
    tokens: Int[np.ndarray, " T"], slot: int, first: int, sizes: Sizes, config: MoEConfig
) -> Int[np.ndarray, " T"]:
    """Another expert for each slot, none of them local; with groups, of three other groups."""
    groups = config.n_group
    if groups == 1:
        others = sizes.num_experts - sizes.num_local_experts
        position = (tokens * 5 + slot * (others // (config.top_k - 1))) % others
        return (first + sizes.num_local_experts + position) % sizes.num_experts
    per_group = sizes.num_experts // groups
    group = (first // per_group + 1 + (tokens + slot % 3) % (groups - 1)) % groups
    return group * per_group + (tokens * 5 + slot // 3) % per_group


def local_load(
    routing: HostRouting, workload: Workload, sizes: Sizes, config: MoEConfig = DEEPSEEK_V3
) -> LocalLoad:
    """Counts the pairs, experts and tokens that a routing leaves on this rank."""
    local = topk_ids(*routing, config) - sizes.offset(workload)
    is_local = (local >= 0) & (local < sizes.num_local_experts)
    counts = np.bincount(local[is_local], minlength=sizes.num_local_experts)
    return LocalLoad(
        pairs=int(counts.sum()),
        active_experts=int((counts > 0).sum()),
        max_per_expert=int(counts.max()),
        tokens=int(is_local.any(axis=1).sum()),
    )
