"""What travels through the layer, by name.

Plain NamedTuples, so `jax.tree.map`, partition specs and shape structs work on them: building one
never checks anything, `check` and every entry of `jax_moe` do.

Symbols: T tokens, E experts, E_local local experts, k = top_k, H hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jaxtyping import Float, Float8e4m3fn, Float32

from jax_moe.scalars import alive, got
from pallas_kernels.types import GroupPlan as GroupPlan
from pallas_kernels.types import Quantized as Quantized
from pallas_kernels.types import Routing as Routing


class ExpertWeights(NamedTuple):
    """The expert weights of one rank: JAX, NumPy or torch arrays, or anything shaped like them.

    Scales multiply, one per block of 128x128: `value * scale` dequantizes. Shapes are all that can
    be checked: where 2*I equals H, transposed `gemm1_weights` pass for right ones, and the order of
    the halves never shows.

    Attributes:
        gemm1_weights: e4m3[E_local,2*I,H]; rows 0..I-1 make the up half, rows I..2*I-1 the gate.
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
    """

    gemm1_weights: Float8e4m3fn[Array, "E_local 2*I H"]
    gemm1_weights_scale: Float32[Array, "E_local 2*I//128 H//128"]
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"]
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"]

    @property
    def num_local_experts(self) -> int:
        """E_local."""
        return self.gemm1_weights.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.gemm1_weights.shape[2]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.gemm1_weights.shape[1] // 2

    def check(self) -> Self:
        """Checks types, dtypes and shapes, as every entry does.

        Returns:
            The same weights.

        Raises:
            TypeError: An array is no JAX or NumPy array, or of another dtype.
            ValueError: A shape does not fit; names the argument, what was expected and what came.
        """
        from jax_moe import validate  # it knows this type

        validate.weights(self, {})
        return self

    @classmethod
    def from_gate_up(
        cls,
        gate_up_weights: Float8e4m3fn[Array, "E_local 2*I H"],
        gate_up_weights_scale: Float32[Array, "E_local 2*I//128 H//128"],
        down_weights: Float8e4m3fn[Array, "E_local H I"],
        down_weights_scale: Float32[Array, "E_local H//128 I//128"],
    ) -> Self:
        """Weights in the order of Hugging Face, vLLM and sglang (`w13`): the gate comes first.

        The halves are copied once into the order of this package; the bits stay.

        Args:
            gate_up_weights: e4m3[E_local,2*I,H], the gate's rows first; JAX, NumPy or torch.
            gate_up_weights_scale: f32[E_local,2*I/128,H/128], in the same order.
            down_weights: e4m3[E_local,H,I], taken as it is.
            down_weights_scale: f32[E_local,H/128,I/128], taken as it is.

        Returns:
            The weights, up first.

        Raises:
            TypeError: An argument is no array.
            ValueError: The rows or the scale's rows do not fall into two halves, or an array is
                deleted.
        """
        _check_arrays(
            gate_up_weights=gate_up_weights,
            gate_up_weights_scale=gate_up_weights_scale,
            down_weights=down_weights,
            down_weights_scale=down_weights_scale,
        )
        return cls(
            _swap_halves("gate_up_weights", gate_up_weights),
            _swap_halves("gate_up_weights_scale", gate_up_weights_scale),
            down_weights,
            down_weights_scale,
        )


def _check_arrays(**arrays: Any) -> None:
    """Arrays of JAX or NumPy, or anything that can be copied as a torch tensor can."""
    for name, array in arrays.items():
        is_array = isinstance(array, jax.Array | np.ndarray)
        if not is_array and not (hasattr(array, "shape") and hasattr(array, "clone")):
            raise TypeError(f"{name}: expected a JAX, NumPy or torch array, got {got(array)}")
        alive(name, array)


def _swap_halves(name: str, array: Any) -> Any:
    """Axis 1 with its halves exchanged."""
    if len(array.shape) != 3 or array.shape[1] % 2:
        raise ValueError(f"{name}: expected [E_local, 2*n, m], got {list(array.shape)}")
    half = array.shape[1] // 2
    if isinstance(array, jax.Array):
        return _swap_halves_on_device(array)
    swapped = np.empty_like(array) if isinstance(array, np.ndarray) else array.clone()  # torch
    swapped[:, :half], swapped[:, half:] = array[:, half:], array[:, :half]
    return swapped


@jax.jit  # one by one, its operations would upload numbers, which `jax.transfer_guard` may forbid
def _swap_halves_on_device(array: Array) -> Array:
    half = array.shape[1] // 2
    return jnp.concatenate([array[:, half:], array[:, :half]], axis=1)


class LayerWeights(NamedTuple):
    """Everything that a mixture-of-experts layer of a model holds, for one rank.

    A pytree: what a model does not have is None and has no leaf.

    Attributes:
        experts: This rank's routed experts.
        gate_weight: bf16[E,H] or f32[E,H], as stored; `hidden_states @ gate_weight.T` are the
            routing logits of all E experts.
        e_score_correction_bias: f32[E], which `apply` takes as `routing_bias`; or None.
        shared_experts: The experts that every token takes, side by side as one: E_local is 1 and I
            is the sum of theirs; or None.
        shared_gate: bf16[1,H] or f32[1,H], as stored: the shared experts' output is weighed by the
            sigmoid of `hidden_states @ shared_gate.T` (Qwen3-Next); or None: it is taken as it is.
    """

    experts: ExpertWeights
    gate_weight: Float[Array, "E H"]
    e_score_correction_bias: Float32[Array, " E"] | None = None
    shared_experts: ExpertWeights | None = None
    shared_gate: Float[Array, "1 H"] | None = None


class LayerInputs(NamedTuple):
    """What `jax_moe.apply` takes: the ten arguments of the definition, the weights in one place.

    Attributes:
        routing_logits: f32, bf16 or f16[T,E].
        routing_bias: bf16[E] or f32[E], or None.
        hidden_states: e4m3[T,H], or bf16, f16 or f32[T,H].
        hidden_states_scale: f32[H/128,T]; None exactly if `hidden_states` is not e4m3.
        weights: Of this rank's experts.
        local_expert_offset: Global id of the first local expert, an integer scalar.
        routed_scaling_factor: Factor of all weights, a real scalar.
    """

    routing_logits: Float[Array, "T E"]
    routing_bias: Float[Array, " E"] | None
    hidden_states: Float[Array, "T H"]
    hidden_states_scale: Float32[Array, "H//128 T"] | None
    weights: ExpertWeights
    local_expert_offset: Any  # int, or i32[]
    routed_scaling_factor: Any  # float, or f32[]

    @classmethod
    def of(
        cls,
        routing_logits: Any,
        routing_bias: Any,
        hidden_states: Any,
        hidden_states_scale: Any,
        gemm1_weights: Any,
        gemm1_weights_scale: Any,
        gemm2_weights: Any,
        gemm2_weights_scale: Any,
        local_expert_offset: Any,
        routed_scaling_factor: Any,
    ) -> Self:
        """From the ten arguments in the definition's order."""
        return cls(
            routing_logits,
            routing_bias,
            hidden_states,
            hidden_states_scale,
            ExpertWeights(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale),
            local_expert_offset,
            routed_scaling_factor,
        )

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The ten arguments in the definition's order: `jax_moe.apply(*inputs.arguments)`."""
        return (
            self.routing_logits,
            self.routing_bias,
            self.hidden_states,
            self.hidden_states_scale,
            *self.weights,
            self.local_expert_offset,
            self.routed_scaling_factor,
        )

    @property
    def tokens(self) -> int:
        """T."""
        return self.hidden_states.shape[0]

    def routed(self, routing: Routing) -> RoutedInputs:
        """The same, once the router has chosen."""
        return RoutedInputs(
            self.hidden_states,
            self.hidden_states_scale,
            self.weights,
            routing,
            self.local_expert_offset,
        )


class RoutedInputs(NamedTuple):
    """What `jax_moe.apply_routed` takes: everything after the router.

    Attributes:
        hidden_states: e4m3[T,H], or bf16, f16 or f32[T,H].
        hidden_states_scale: f32[H/128,T]; None exactly if `hidden_states` is not e4m3.
        weights: Of this rank's experts.
        routing: Experts and weights of each token.
        local_expert_offset: Global id of the first local expert, an integer scalar.
    """

    hidden_states: Float[Array, "T H"]
    hidden_states_scale: Float32[Array, "H//128 T"] | None
    weights: ExpertWeights
    routing: Routing
    local_expert_offset: Any  # int, or i32[]

    @classmethod
    def of(
        cls,
        hidden_states: Any,
        hidden_states_scale: Any,
        gemm1_weights: Any,
        gemm1_weights_scale: Any,
        gemm2_weights: Any,
        gemm2_weights_scale: Any,
        topk_ids: Any,
        topk_weights: Any,
        local_expert_offset: Any,
    ) -> Self:
        """From the arguments of `jax_moe.apply_routed`, in their order."""
        return cls(
            hidden_states,
            hidden_states_scale,
            ExpertWeights(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale),
            Routing(topk_ids, topk_weights),
            local_expert_offset,
        )

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of `jax_moe.apply_routed`: `apply_routed(*arguments, num_experts=E)`."""
        return (
            self.hidden_states,
            self.hidden_states_scale,
            *self.weights,
            *self.routing,
            self.local_expert_offset,
        )

    @property
    def tokens(self) -> int:
        """T."""
        return self.hidden_states.shape[0]

    @property
    def rows(self) -> Quantized:
        """The rows with their scales, of quantized hidden states."""
        assert self.hidden_states_scale is not None
        return Quantized(self.hidden_states, self.hidden_states_scale)


for _kind in (
    ExpertWeights, LayerWeights, LayerInputs, RoutedInputs, Routing, GroupPlan, Quantized
):  # fmt: skip
    # So that `jax.export` can write programs that take or give it.
    export.register_namedtuple_serialization(_kind, serialized_name=f"jax_moe.{_kind.__name__}")
