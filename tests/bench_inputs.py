"""A workload's arguments at reduced size, as the benchmark draws them."""

from bench import inputs, routing
from bench.workloads import REDUCED, select
from jax_moe import LayerInputs


def padded_arguments(num_tokens: int, trial: int = 0) -> tuple[LayerInputs, routing.HostRouting]:
    """The arguments at the token count that they are drawn at, and their routing."""
    workload = select([str(num_tokens)])[0]
    weights = inputs.draw_weights("realistic", REDUCED, 0)
    routed = routing.draw(workload, REDUCED, 0)
    return inputs.make_arguments("realistic", workload, REDUCED, 0, trial, weights, routed), routed


def reduced_arguments(num_tokens: int, trial: int = 0) -> LayerInputs:
    """The arguments of a workload's own tokens."""
    return inputs.head(padded_arguments(num_tokens, trial)[0], num_tokens)
