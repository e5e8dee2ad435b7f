"""The ten arguments of a workload, on the default JAX device, from a seed alone.

`realistic`: Gaussian weights and activations, quantized by blocks with scale = amax / 448;
    outputs are of order 1.
`flashinfer`: as flashinfer-bench fills random tensors: f32 (all scales) is N(0, 1), negative values
    included, e4m3 is N(0, 1) clipped to +-2; outputs are of order 1e5.
`dataset`: routing tensors from a flashinfer-trace folder, the rest as `flashinfer`.

Weights are drawn once per run and shared by all workloads; a trial redraws the activations. Without
a data set the routing is a stand-in (`bench.routing`), drawn once per workload, as a file would be.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bench.gaussian import BLOCK, clipped_gaussian_e4m3, gaussian, key_for, quantized_gaussian
from bench.routing import HostRouting
from bench.workloads import Sizes
from interop.workloads import ROUTED_SCALING_FACTOR, Workload
from jax_moe import ExpertWeights, LayerInputs

KINDS = ("realistic", "flashinfer", "dataset")
_WEIGHTS, _ACTIVATIONS = 0, 1  # streams of the seed
_DRAWN_TOKENS = (64, 1024, 16384, 2**20)


def draw_weights(kind: str, sizes: Sizes, seed: int) -> ExpertWeights:
    """Draws the weights of a run.

    Args:
        kind: One of `KINDS`.
        sizes: The constant axes.
        seed: The run's seed.

    Returns:
        The weights on the default device: 1.41 GB at full size, made expert by expert.
    """
    return _draw_weights(kind == "realistic", sizes, seed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw_weights(realistic: bool, sizes: Sizes, seed: int) -> ExpertWeights:
    hidden, intermediate = sizes.hidden_size, sizes.intermediate_size
    shapes = (
        (2 * intermediate, hidden, 2 / math.sqrt(hidden)),
        (hidden, intermediate, 4 / math.sqrt(intermediate)),
    )

    def one_expert(expert: Array) -> tuple[Array, ...]:
        drawn: list[Array] = []
        for gemm, (rows, columns, std) in enumerate(shapes):
            key = jax.random.fold_in(key_for(seed, _WEIGHTS, gemm), expert)
            drawn += _matrix(realistic, key, rows, columns, BLOCK, std)
        return tuple(drawn)

    return ExpertWeights(*jax.lax.map(one_expert, jnp.arange(sizes.num_local_experts)))


def _matrix(
    realistic: bool, key: Array, rows: int, columns: int, block_rows: int, std: float
) -> tuple[Array, Array]:
    if realistic:
        return quantized_gaussian(key, rows, columns, block_rows=block_rows, std=std)
    values_key, scales_key = jax.random.split(key)
    scales = gaussian(scales_key, (rows // block_rows, columns // BLOCK))
    return clipped_gaussian_e4m3(values_key, (rows, columns)), scales


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw_activations(
    realistic: bool, num_tokens: int, hidden: int, key: Array
) -> tuple[Array, Array]:
    values, scales = _matrix(realistic, key, num_tokens, hidden, 1, 1.0)
    return values, scales.T


def padded_tokens(num_tokens: int) -> int:
    """The token count that inputs are drawn at: one of few, since each needs its own programs."""
    return next(rows for rows in _DRAWN_TOKENS if rows >= num_tokens)


def make_arguments(
    kind: str,
    workload: Workload,
    sizes: Sizes,
    seed: int,
    trial: int,
    weights: ExpertWeights,
    routing: HostRouting,
    factor: float = ROUTED_SCALING_FACTOR,
) -> LayerInputs:
    """Completes the ten arguments of one trial, for `padded_tokens(T)` tokens.

    Args:
        kind: One of `KINDS`.
        workload: The row.
        sizes: The constant axes.
        seed: The run's seed.
        trial: Number of the trial; each has its own activations.
        weights: From `draw_weights`.
        routing: From `bench.routing.draw` or a data set.
        factor: The `routed_scaling_factor`.

    Returns:
        JAX arrays on the default device; offset and factor as device scalars, i32[] and f32[]. The
        first T tokens are the workload's (`head` takes them), the others have zero logits.
    """
    tokens = padded_tokens(workload.num_tokens)
    key = key_for(seed, _ACTIVATIONS, workload.num_tokens, workload.local_expert_offset, trial)
    values, scales = _draw_activations(kind == "realistic", tokens, sizes.hidden_size, key)
    logits = np.zeros((tokens, routing.logits.shape[1]), np.float32)
    logits[: workload.num_tokens] = routing.logits
    return LayerInputs(
        routing_logits=jnp.asarray(logits),
        routing_bias=jnp.asarray(routing.bias),
        hidden_states=values,
        hidden_states_scale=scales,
        weights=weights,
        local_expert_offset=jnp.int32(sizes.offset(workload)),
        routed_scaling_factor=jnp.float32(factor),
    )


def specs(num_tokens: int, sizes: Sizes) -> LayerInputs:
    """Shapes and dtypes of the inputs, for compiling without them."""
    experts, hidden, intermediate = sizes[1:]
    blocks, inner_blocks = hidden // BLOCK, intermediate // BLOCK
    f32, e4m3 = jnp.float32, jnp.float8_e4m3fn
    shape: Any = jax.ShapeDtypeStruct  # which stands for an array
    weights = ExpertWeights(
        gemm1_weights=shape((experts, 2 * intermediate, hidden), e4m3),
        gemm1_weights_scale=shape((experts, 2 * inner_blocks, blocks), f32),
        gemm2_weights=shape((experts, hidden, intermediate), e4m3),
        gemm2_weights_scale=shape((experts, blocks, inner_blocks), f32),
    )
    return LayerInputs(
        routing_logits=shape((num_tokens, sizes.num_experts), f32),
        routing_bias=shape((sizes.num_experts,), jnp.bfloat16),
        hidden_states=shape((num_tokens, hidden), e4m3),
        hidden_states_scale=shape((blocks, num_tokens), f32),
        weights=weights,
        local_expert_offset=shape((), jnp.int32),
        routed_scaling_factor=shape((), f32),
    )


def head(inputs: LayerInputs, num_tokens: int) -> LayerInputs:
    """The inputs of the first `num_tokens` tokens, in memory of their own."""
    assert inputs.hidden_states_scale is not None
    taken = inputs._replace(
        routing_logits=inputs.routing_logits[:num_tokens],
        hidden_states=inputs.hidden_states[:num_tokens],
        hidden_states_scale=inputs.hidden_states_scale[:, :num_tokens],
    )
    return jax.block_until_ready(taken)
