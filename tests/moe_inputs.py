"""Small inputs of the layer, seeded, made with NumPy alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jax_moe
from jax_moe import ExpertWeights, LayerInputs
from tests import numpy_oracle

E4M3 = ml_dtypes.float8_e4m3fn
SMALL = jax_moe.MoEConfig(top_k=4, n_group=4, topk_group=2)
TOKEN_ARGUMENTS = ("routing_logits", "routing_bias", "hidden_states", "hidden_states_scale")
SCALAR_ARGUMENTS = ("local_expert_offset", "routed_scaling_factor")


def replaced(inputs: LayerInputs, **changes: Any) -> LayerInputs:
    """The same with any of the ten arguments changed, by name."""
    weights = {name: changes.pop(name) for name in ExpertWeights._fields if name in changes}
    return inputs._replace(weights=inputs.weights._replace(**weights), **changes)


def named_arguments(inputs: LayerInputs) -> dict[str, Any]:
    """The ten arguments by name, in order."""
    names = (*TOKEN_ARGUMENTS, *ExpertWeights._fields, *SCALAR_ARGUMENTS)
    return dict(zip(names, inputs.arguments, strict=True))


def named_arrays(inputs: LayerInputs) -> dict[str, Any]:
    """The eight array arguments by name, in order."""
    names = (*TOKEN_ARGUMENTS, *ExpertWeights._fields)
    return dict(zip(names, array_arguments(inputs), strict=True))


def token_arguments(inputs: LayerInputs) -> tuple[Any, ...]:
    """The arrays before the weights: what `TorchMoE` takes, its scalars bound."""
    return tuple(getattr(inputs, name) for name in TOKEN_ARGUMENTS)


def array_arguments(inputs: LayerInputs) -> tuple[Any, ...]:
    """The eight arrays: what a program takes whose scalars are bound."""
    return (*token_arguments(inputs), *inputs.weights)


def scalar_arguments(inputs: LayerInputs) -> tuple[Any, Any]:
    """The two scalars."""
    return inputs.local_expert_offset, inputs.routed_scaling_factor


def handle_arguments(inputs: LayerInputs) -> tuple[Any, ...]:
    """All but the weights: what a `TorchMoE` takes, which holds them."""
    return (*token_arguments(inputs), *scalar_arguments(inputs))


def make_inputs(
    num_tokens: int,
    *,
    num_experts: int = 32,
    num_local_experts: int = 8,
    hidden_size: int = 256,
    intermediate_size: int = 128,
    offset: int = 8,
    seed: int = 0,
) -> LayerInputs:
    """Gaussian activations and weights, quantized, so that outputs are of order one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_tokens, hidden_size), np.float32)
    values, scales = numpy_oracle.quantize(x)
    w13 = _weights(rng, num_local_experts, 2 * intermediate_size, hidden_size)
    w2 = _weights(rng, num_local_experts, hidden_size, intermediate_size)
    logits = rng.standard_normal((num_tokens, num_experts), np.float32)
    bias = (rng.standard_normal(num_experts) / 10).astype(ml_dtypes.bfloat16)
    return LayerInputs.of(logits, bias, values, scales, *w13, *w2, offset, 2.5)


def _weights(rng: np.random.Generator, experts: int, n: int, k: int) -> tuple[Any, Any]:
    """Gaussian e4m3 with a random scale per 128x128 block, about 1/sqrt(k) in size."""
    values = rng.standard_normal((experts, n, k), np.float32).astype(E4M3)
    scales = rng.uniform(0.5, 1.5, (experts, n // 128, k // 128)) / np.sqrt(k)
    return values, scales.astype(np.float32)


def rank_specs(
    num_tokens: int,
    *,
    num_experts: int = 256,
    num_local: int = 32,
    hidden: int = 7168,
    intermediate: int = 2048,
) -> LayerInputs:
    """Shapes and dtypes of the layer; the defaults are one of DeepSeek-V3's eight ranks."""
    blocks = (hidden // 128, intermediate // 128)
    shapes = (
        ((num_tokens, num_experts), jnp.float32),
        ((num_experts,), jnp.bfloat16),
        ((num_tokens, hidden), E4M3),
        ((blocks[0], num_tokens), jnp.float32),
        ((num_local, 2 * intermediate, hidden), E4M3),
        ((num_local, 2 * blocks[1], blocks[0]), jnp.float32),
        ((num_local, hidden, intermediate), E4M3),
        ((num_local, *blocks), jnp.float32),
        ((), jnp.int32),
        ((), jnp.float32),
    )
    return LayerInputs.of(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))


def logits_for(choices: np.ndarray, num_experts: int, top_k: int) -> np.ndarray:
    """Logits that send each token to the experts of `choices` [T,c], c <= top_k, in that order.

    The rest of the top k is filled from the last experts. Needs a config of one group.
    """
    logits = np.tile(np.linspace(-6, -5, num_experts, dtype=np.float32), (len(choices), 1))
    best_first = np.linspace(4, 2, top_k, dtype=np.float32)[: choices.shape[1]]
    np.put_along_axis(logits, choices, np.broadcast_to(best_first, choices.shape), axis=1)
    return logits


def sharded_arguments(inputs: LayerInputs) -> tuple[Any, ...]:
    """All but the offset: what a layer over several ranks takes, where each has its own."""
    return (*array_arguments(inputs), inputs.routed_scaling_factor)


def on_device(inputs: LayerInputs) -> LayerInputs:
    """The same with JAX arrays in place of NumPy's."""
    arrays = [None if value is None else jnp.asarray(value) for value in array_arguments(inputs)]
    return LayerInputs.of(*arrays, *scalar_arguments(inputs))


def bits(x: Any) -> np.ndarray:
    """The bit patterns of a float array, to compare exactly, NaN included."""
    x = np.asarray(jax.device_get(x))
    return x.view(f"u{x.dtype.itemsize}")


def relative_error(found: Any, expected: Any) -> float:
    """Difference over expectation in the Frobenius norm."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
