"""The float32 formulas that the oracle and the plain backend share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32

from jax_moe.config import MoEConfig
from jax_moe.types import Routing
from pallas_kernels.shapes import QUANT_BLOCK

_LOWEST = np.int32(np.iinfo(np.int32).min)


def matmul(x: Float32[Array, "R K"], weight: Float32[Array, "N K"]) -> Float32[Array, "R N"]:
    """`x @ weight.T` in true float32, on GPUs too."""
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def dequantize_rows(
    values: Float[Array, "R C"], scales: Float32[Array, "C//128 R"]
) -> Float32[Array, "R C"]:
    """Float32 of rows that carry one scale per 128 columns."""
    rows, columns = values.shape
    blocks = values.astype(jnp.float32).reshape(rows, columns // QUANT_BLOCK, QUANT_BLOCK)
    return (blocks * scales.T[:, :, None]).reshape(rows, columns)


def dequantize_weight(
    values: Float[Array, "N K"], scales: Float32[Array, "N//128 K//128"]
) -> Float32[Array, "N K"]:
    """Float32 of one expert's matrix that carries one scale per block of 128x128."""
    n, k = scales.shape
    blocks = values.astype(jnp.float32).reshape(n, QUANT_BLOCK, k, QUANT_BLOCK)
    return (blocks * scales[:, None, :, None]).reshape(values.shape)


def to_bits(values: Array) -> Array:
    """The same bits as unsigned integers.

    Rows of an 8 or 16 bit float array are read and written in this form: XLA's CPU compiler would
    convert the whole array to a wider type and back for each slice, gather or update.
    """
    return lax.bitcast_convert_type(values, jnp.dtype(f"uint{8 * values.dtype.itemsize}"))


def take(values: Array, index: Array) -> Array:
    """`values[index]`, reading no more than that."""
    return lax.bitcast_convert_type(to_bits(values)[index], values.dtype)


def swiglu(gemm1_output: Float32[Array, "R 2*I"]) -> Float32[Array, "R I"]:
    """`silu(second half) * first half`: the gate is the *second* half of the columns.

    The sigmoid saturates at 0 and 1, so a finite input never makes `inf * 0`.
    """
    up, gate = jnp.split(gemm1_output, 2, axis=1)
    return gate * jax.nn.sigmoid(gate) * up


def route(
    routing_logits: Float32[Array, "T E"],
    routing_bias: Float[Array, " E"],
    routed_scaling_factor: Float32[Array, ""],
    *,
    config: MoEConfig,
) -> Routing:
    """Group-limited sigmoid top-k; see `jax_moe.route` for the rules on ties and NaN."""
    scores = 1 / (1 + jnp.exp(-routing_logits))
    biased = scores + routing_bias.astype(jnp.float32)[None]
    in_groups = biased.reshape(-1, config.n_group, biased.shape[1] // config.n_group)
    best_two = jnp.take_along_axis(in_groups, _best(_rank(in_groups), 2), axis=2)
    kept = _best(_rank(best_two[..., 0] + best_two[..., 1]), config.topk_group)
    groups = jnp.arange(config.n_group, dtype=jnp.int32)[None, :, None]
    is_kept = (kept[:, None, :] == groups).any(axis=2)
    ranks = jnp.where(is_kept[:, :, None], _rank(in_groups), _LOWEST).reshape(biased.shape)
    topk_ids = _best(ranks, config.top_k)
    chosen = jnp.take_along_axis(scores, topk_ids, axis=1)
    topk_weights = chosen / (chosen.sum(axis=1, keepdims=True) + 1e-20) * routed_scaling_factor
    return Routing(topk_ids, topk_weights)


def _rank(scores: Array) -> Array:
    """Integers in the order of the scores, NaN below -inf, nothing as low as `_LOWEST`."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    return jnp.where(jnp.isnan(scores), _LOWEST + 1, ordered)


def _best(ranks: Array, count: int) -> Array:
    """Indices of the `count` largest along the last axis, best first, ties to the lowest index."""
    columns = lax.broadcasted_iota(jnp.int32, ranks.shape, ranks.ndim - 1)

    def take(ranks: Array, _: None) -> tuple[Array, Array]:
        best = lax.argmax(ranks, ranks.ndim - 1, jnp.int32)
        return jnp.where(columns == best[..., None], _LOWEST, ranks), best

    return jnp.moveaxis(lax.scan(take, ranks, length=count, unroll=8)[1], 0, -1)
