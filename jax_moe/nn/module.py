"""The layer as a Flax NNX module. Needs flax, the extra of that name."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, Sharding
from jaxtyping import BFloat16, Float, Int32

from jax_moe import backends
from jax_moe.checkpoint import Checkpoint, load_layer
from jax_moe.config import Precision, checked_batch_invariant, checked_precision
from jax_moe.nn.config import LayerConfig, checked_layer_config
from jax_moe.nn.layer import check_fits, checked_layer_weights, fuse_shared, moe_layer
from jax_moe.parallel.ranks import AxisName
from jax_moe.scalars import boolean, got
from jax_moe.types import ExpertWeights, LayerWeights
from pallas_kernels.shapes import QUANT_BLOCK

EXPERT_AXIS = "expert"
"""The mesh axis in the sharding metadata of the routed experts' first axis."""


class FrozenWeight(nnx.Variable):
    """A weight that is not trained: FP8 values, their scales, the bias of the selection.

    No `nnx.Param`, so that an optimizer's filter leaves it alone.
    """


class DeepSeekMoE(nnx.Module):
    """A mixture-of-experts layer with FP8 experts, `jax_moe.nn.moe_layer` as a module.

    The gates are `nnx.Param`, all else is `FrozenWeight`. The routed experts carry sharding
    metadata that splits their first axis over the mesh axis "expert"
    (`nnx.get_partition_spec(nnx.state(layer))`).

    Examples:
        >>> layer = DeepSeekMoE(config, rngs=nnx.Rngs(0))                     # doctest: +SKIP
        >>> layer = DeepSeekMoE.from_checkpoint("DeepSeek-V3", 3)             # doctest: +SKIP
        >>> y = nnx.jit(lambda layer, x: layer(x))(layer, x)                  # doctest: +SKIP

    Args:
        config: What the layer is.
        rngs: Where the random weights come from, stream "params".
        backend: As in `jax_moe.apply`.
        precision: As in `jax_moe.apply`.
        batch_invariant: As in `moe_layer`.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An option does not exist, or `rngs` has neither this stream nor a default.
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        rngs: nnx.Rngs,
        backend: str = "auto",
        precision: Precision = "fast",
        batch_invariant: bool = False,
    ) -> None:
        self.backend = backends.checked(backend)
        self.precision = checked_precision(precision)
        self.batch_invariant = checked_batch_invariant(batch_invariant)
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs: expected flax.nnx.Rngs, got {got(rngs)}")
        if "params" not in rngs and "default" not in rngs:
            streams = ", ".join(rngs) or "none"
            raise ValueError(f"rngs: expected a stream 'params' or 'default', got {streams}")
        self._fill(config, _random_weights(checked_layer_config(config), rngs.params()))

    def _fill(self, config: LayerConfig, weights: LayerWeights) -> None:
        self.config = config
        self.gate_weight = nnx.Param(weights.gate_weight)
        bias = weights.e_score_correction_bias
        self.e_score_correction_bias = None if bias is None else FrozenWeight(bias)
        self.experts = nnx.Dict(_variables(weights.experts, EXPERT_AXIS))
        shared = weights.shared_experts
        self.shared_experts = None if shared is None else nnx.Dict(_variables(shared, None))
        gate = weights.shared_gate
        self.shared_gate = None if gate is None else nnx.Param(gate)

    @classmethod
    def from_weights(
        cls,
        config: LayerConfig,
        weights: LayerWeights,
        *,
        backend: str = "auto",
        precision: Precision = "fast",
        batch_invariant: bool = False,
    ) -> Self:
        """A module of weights that are there already, fused or not.

        Args:
            config: What the layer is.
            weights: Its weights: all E experts, or one rank's E/N of them.
            backend: As in `jax_moe.apply`.
            precision: As in `jax_moe.apply`.
            batch_invariant: As in `moe_layer`.

        Returns:
            The module; the arrays are not copied.

        Raises:
            TypeError: An argument is of another type.
            ValueError: An option does not exist, or the weights are of another layer than
                `config`.
        """
        checked_layer_weights("weights", weights)
        check_fits("weights", weights, checked_layer_config(config))
        options: dict[str, Any] = {
            "backend": backend,
            "precision": precision,
            "batch_invariant": batch_invariant,
        }
        module = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **options))
        module._fill(config, weights)
        return module

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | os.PathLike[str] | Checkpoint,
        layer: int,
        *,
        fused: bool = False,
        backend: str = "auto",
        precision: Precision = "fast",
        batch_invariant: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
        sharding: Mesh | Sharding | None = None,
        tensor_parallel: tuple[int, int] = (0, 1),
        progress: bool = False,
        num_threads: int | None = None,
    ) -> Self:
        """A module with the weights of one layer of a checkpoint.

        Args:
            folder: The checkpoint's folder, with its `config.json`, or a `Checkpoint` of it.
            layer: The layer's number.
            fused: Whether to make the shared experts part of the routed ones' matmuls.
            backend: As in `jax_moe.apply`.
            precision: As in `jax_moe.apply`.
            batch_invariant: As in `moe_layer`.
            rank: As in `jax_moe.checkpoint.load_layer`, and so on for the others.
            num_ranks: How many ranks there are.
            sharding: Of the routed experts.
            tensor_parallel: Splits all experts; the module is that of one rank, and the outputs of
                all add up.
            progress: Shows a bar.
            num_threads: Threads to read with.

        Returns:
            The module.

        Raises:
            TypeError: As `load_layer` and `LayerConfig.from_hf`.
            ValueError: As `load_layer` and `LayerConfig.from_hf`.
            RuntimeError: As `load_layer`.
        """
        options: dict[str, Any] = {  # checked before gigabytes are read
            "backend": backends.checked(backend),
            "precision": checked_precision(precision),
            "batch_invariant": checked_batch_invariant(batch_invariant),
        }
        fused = boolean("fused", fused)
        source = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
        if not source.config:
            raise ValueError(f"{source.config_path}: expected what the layer is, got nothing")
        config = LayerConfig.from_hf(source.config)
        weights = load_layer(
            source,
            layer,
            rank=rank,
            num_ranks=num_ranks,
            sharding=sharding,
            tensor_parallel=tensor_parallel,
            progress=progress,
            num_threads=num_threads,
        )
        config = _as_loaded(config, weights)
        if fused:
            weights = fuse_shared(weights, config)
        return cls.from_weights(config, weights, **options)

    @property
    def weights(self) -> LayerWeights:
        """The weights as the pure function takes them."""
        bias, gate, shared = self.e_score_correction_bias, self.shared_gate, self.shared_experts
        return LayerWeights(
            _values(self.experts),
            self.gate_weight[...],
            None if bias is None else bias[...],
            None if shared is None else _values(shared),
            None if gate is None else gate[...],
        )

    def __call__(
        self,
        hidden_states: Float[Array, "... H"],
        *,
        axis_name: AxisName | None = None,
        num_tokens: int | Int32[Array, ""] | None = None,
        with_load: bool = False,
    ) -> BFloat16[Array, "... H"] | tuple[BFloat16[Array, "... H"], Int32[Array, " E"]]:
        """Runs the layer.

        Args:
            hidden_states: bf16, f16 or f32[...,H].
            axis_name: As in `moe_layer`.
            num_tokens: As in `moe_layer`.
            with_load: As in `moe_layer`.

        Returns:
            As `moe_layer`.

        Raises:
            TypeError: As `moe_layer`.
            ValueError: As `moe_layer`.
            NotImplementedError: As `moe_layer`.
        """
        return moe_layer(
            self.weights,
            hidden_states,
            config=self.config,
            axis_name=axis_name,
            backend=self.backend,
            num_tokens=num_tokens,
            with_load=with_load,
            precision=self.precision,
            batch_invariant=self.batch_invariant,
        )


def _variables(experts: ExpertWeights, axis: str | None) -> dict[str, FrozenWeight]:
    return {
        name: FrozenWeight(value, out_sharding=(axis, None, None), eager_sharding=False)
        for name, value in experts._asdict().items()
    }


def _as_loaded(config: LayerConfig, weights: LayerWeights) -> LayerConfig:
    """The configuration of what was loaded: a rank of several has a part of each expert's width."""
    shared = weights.shared_experts
    return dataclasses.replace(
        config,
        intermediate_size=weights.experts.intermediate_size,
        shared_intermediate_size=0 if shared is None else shared.intermediate_size,
    )


def _values(variables: Any) -> ExpertWeights:
    return ExpertWeights(**{name: variables[name][...] for name in ExpertWeights._fields})


def _random_weights(config: LayerConfig, key: Array) -> LayerWeights:
    """Gaussian weights that keep the size of the activations, quantized."""
    routed, shared, gate, shared_gate = jax.random.split(key, 4)
    width, hidden_size = config.shared_intermediate_size, config.hidden_size
    return LayerWeights(
        _random_experts(routed, config.num_experts, hidden_size, config.intermediate_size),
        _gaussian(gate, (config.num_experts, hidden_size)),
        jnp.zeros(config.num_experts, jnp.float32) if config.has_routing_bias else None,
        _random_experts(shared, 1, hidden_size, width) if width else None,
        _gaussian(shared_gate, (1, hidden_size)) if config.has_shared_gate else None,
    )


def _random_experts(key: Array, count: int, hidden_size: int, width: int) -> ExpertWeights:
    up, down = jax.random.split(key)
    return ExpertWeights(
        *_quantized(_gaussian(up, (count, 2 * width, hidden_size))),
        *_quantized(_gaussian(down, (count, hidden_size, width))),
    )


def _gaussian(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5


def _quantized(weights: Float[Array, "E N K"]) -> tuple[Array, Array]:
    """e4m3[E,N,K] and f32[E,N/128,K/128], the largest magnitude of a block at 448."""
    experts, n, k = weights.shape
    blocks = weights.reshape(experts, n // QUANT_BLOCK, QUANT_BLOCK, k // QUANT_BLOCK, QUANT_BLOCK)
    scales = jnp.abs(blocks).max(axis=(2, 4), keepdims=True) / 448
    values = (blocks / scales).astype(jnp.float8_e4m3fn)
    return values.reshape(weights.shape), scales[:, :, 0, :, 0]
