"""What a whole layer is, besides its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jax_moe import huggingface
from jax_moe.config import MoEConfig, check_experts, checked_integer, checked_swiglu_limit
from jax_moe.scalars import boolean, got, is_real, real
from pallas_kernels.shapes import QUANT_BLOCK, round_up


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """The mixture-of-experts layer of a model, checked when made. Hashable.

    Attributes:
        router: How experts are picked, clamped and quantized; it fits E.
        num_experts: E.
        hidden_size: H, a multiple of 128.
        intermediate_size: I of one routed expert, a multiple of 128.
        routed_scaling_factor: Factor of all routed weights.
        has_routing_bias: Whether there is a bias of the selection.
        shared_intermediate_size: I of all shared experts together, a multiple of 128; 0 for none.
        shared_swiglu_limit: Clamp of the shared experts' activation, or None.
        has_shared_gate: Whether their output is weighed by a sigmoid of the hidden states.

    Raises:
        TypeError: A field is of another type.
        ValueError: A field is out of its range.
    """

    router: MoEConfig
    num_experts: int
    hidden_size: int
    intermediate_size: int
    routed_scaling_factor: float = 1.0
    has_routing_bias: bool = True
    shared_intermediate_size: int = 0
    shared_swiglu_limit: float | None = None
    has_shared_gate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.router, MoEConfig):
            raise TypeError(  # type: ignore[unreachable]
                f"router: expected a jax_moe.MoEConfig, got {got(self.router)}"
            )
        for name, minimum in (
            ("num_experts", 1),
            ("hidden_size", QUANT_BLOCK),
            ("intermediate_size", QUANT_BLOCK),
            ("shared_intermediate_size", 0),
        ):
            value = checked_integer(name, getattr(self, name))
            object.__setattr__(self, name, value)
            blocks = "" if name == "num_experts" else f" in whole blocks of {QUANT_BLOCK}"
            if value < minimum or (blocks and value % QUANT_BLOCK):
                raise ValueError(f"{name}: expected {minimum} or more{blocks}, got {value}")
        check_experts("router", self.router, self.num_experts)
        for name in ("has_routing_bias", "has_shared_gate"):
            object.__setattr__(self, name, boolean(name, getattr(self, name)))
        factor = self.routed_scaling_factor
        if not is_real(factor):  # an array would not be hashable
            raise TypeError(f"routed_scaling_factor: expected a number, got {got(factor)}")
        real("routed_scaling_factor", factor)
        object.__setattr__(self, "routed_scaling_factor", float(factor))
        if self.has_shared_gate and not self.shared_intermediate_size:
            raise ValueError("has_shared_gate: expected shared experts to gate, got none")
        limit = checked_swiglu_limit(self.shared_swiglu_limit, "shared_swiglu_limit")
        object.__setattr__(self, "shared_swiglu_limit", limit)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """The layer of a model on the Hugging Face hub, as `load_layer` loads it.

        An intermediate size that is no multiple of 128 becomes the next one, with which the
        weights are loaded: zeros are behind them.

        Args:
            config: The model's `config.json`, as `json.load` gives it.

        Returns:
            The configuration.

        Raises:
            TypeError: As `MoEConfig.from_hf`.
            ValueError: As `MoEConfig.from_hf`.
        """
        found = huggingface.read(config)
        return cls(
            router=MoEConfig(**found.router),
            num_experts=found.num_experts,
            hidden_size=found.hidden_size,
            intermediate_size=round_up(found.intermediate_size, QUANT_BLOCK),
            routed_scaling_factor=found.routed_scaling_factor,
            has_routing_bias=found.has_routing_bias,
            shared_intermediate_size=round_up(found.shared_intermediate_size, QUANT_BLOCK),
            shared_swiglu_limit=found.router["swiglu_limit"] if found.clamps_shared else None,
            has_shared_gate=found.has_shared_gate,
        )


def checked_layer_config(value: object) -> LayerConfig:
    """Checks what a caller passes as `config`.

    Raises:
        TypeError: It is no `LayerConfig`.
    """
    if not isinstance(value, LayerConfig):
        raise TypeError(f"config: expected a jax_moe.nn.LayerConfig, got {got(value)}")
    return value
