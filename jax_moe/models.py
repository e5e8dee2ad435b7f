"""Sizes and routers of the known FP8 mixture-of-experts models, as plain data.

    >>> from jax_moe import models
    >>> kimi = models.get("kimi-k2")
    >>> kimi.num_experts, kimi.hidden_size, kimi.intermediate_size, kimi.top_k
    (384, 7168, 2048, 8)

Sizes are those of the published configurations, as transformers 5.24 reads them; fields that rest
on less are named in `Model.uncertain`. Left out is what this layer cannot compute: Llama 4 (its
router scales the input), gpt-oss (H is no multiple of 128) and Kimi-K3 (another activation).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from jax_moe.config import MoEConfig, ScaleFormat, Scoring
from jax_moe.scalars import quoted


@dataclasses.dataclass(frozen=True)
class Model:
    """The routed experts of a model; all its layers of that kind are alike.

    Attributes:
        name: What command lines call it.
        num_experts: E, the columns of the router.
        num_local_experts: E_local, the experts of one rank: an eighth, unless `note` says else.
        hidden_size: H.
        intermediate_size: I, of one routed expert.
        top_k: Experts per token.
        n_group: Groups that the experts are split into; 1 where the router has none.
        topk_group: Groups kept per token.
        scoring: What turns logits into scores.
        has_routing_bias: Whether a bias is added to the scores for the selection only.
        renormalize: Whether a token's weights are divided by their sum.
        routed_scaling_factor: Factor of all weights.
        num_shared_experts: Experts that every token takes besides; not part of this layer.
        swiglu_limit: Clamp of the gate (from above) and of the up half (both sides), or None.
        scale_format: Scales that the model was trained with: any f32, or powers of two.
        group_scoring: What a group is worth: the sum of its "two best" experts, or its "best".
        aliases: Names of models with the same fields.
        uncertain: Fields that are general knowledge, or a default where nothing was found.
        note: What differs from the layer that these fields describe.
    """

    name: str
    num_experts: int
    num_local_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int = 8
    n_group: int = 1
    topk_group: int = 1
    scoring: Scoring = "sigmoid"
    has_routing_bias: bool = True
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    num_shared_experts: int = 1
    swiglu_limit: float | None = None
    scale_format: ScaleFormat = "f32"
    group_scoring: Literal["two best", "best"] = "two best"
    aliases: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    note: str = ""

    @property
    def config(self) -> MoEConfig:
        """The router, as far as `MoEConfig` has fields for it; `unsupported` names the rest."""
        return MoEConfig(**{name: getattr(self, name) for name in _fields_of_config()})

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Fields in which the model differs from what `config` can say.

        A layer run with `config` has the model's sizes and amount of work; its numbers are not the
        model's if this is not empty.
        """
        known = _fields_of_config()
        return tuple(
            name
            for name, implied in IMPLIED.items()
            if name not in known and getattr(self, name) != implied
        )


IMPLIED = {
    "scoring": "sigmoid",
    "renormalize": True,
    "swiglu_limit": None,
    "scale_format": "f32",
    "group_scoring": "two best",
}
"""Fields that change the layer's numbers, and what a `MoEConfig` without them means."""


def _fields_of_config() -> list[str]:
    own = {field.name for field in dataclasses.fields(Model)}
    return [field.name for field in dataclasses.fields(MoEConfig) if field.name in own]


def get(name: str) -> Model:
    """A model by its name or one of its aliases.

    Raises:
        ValueError: There is none of that name; the message lists those there are.
    """
    for model in MODELS:
        if isinstance(name, str) and name in (model.name, *model.aliases):
            return model
    raise ValueError(f"model: expected one of {', '.join(names())}, got {quoted(name)}")


def names() -> tuple[str, ...]:
    """All that `get` takes, the aliases after their model."""
    return tuple(name for model in MODELS for name in (model.name, *model.aliases))


_SIZES = ("num_experts", "hidden_size", "intermediate_size", "top_k")
_WEIGHTS = ("has_routing_bias", "renormalize", "routed_scaling_factor")
_ROUTER = ("scoring", *_WEIGHTS)
_OTHER_SCALES = "published without 128x128 scales: to be quantized again when it is loaded"
_HASHED = "its first layers route by a hash of the token"

_softmax = functools.partial(Model, scoring="softmax", has_routing_bias=False, num_shared_experts=0)
_grouped = functools.partial(Model, n_group=8, topk_group=4, routed_scaling_factor=2.5)
_deepseek_v4 = functools.partial(
    Model,
    scoring="sqrtsoftplus",
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    scale_format="ue8m0",
)

# In front: name, E, E_local, H, I, top_k.
DEEPSEEK_V3 = _grouped(
    "deepseek-v3", 256, 32, 7168, 2048, 8, aliases=("deepseek-r1", "deepseek-v3.2")
)
"""The benchmark's and the tuners' default; the tilings for sizes that have none of their own."""

MODELS: tuple[Model, ...] = (
    DEEPSEEK_V3,
    _grouped("deepseek-v3.1", 256, 32, 7168, 2048, 8, scale_format="ue8m0"),
    _deepseek_v4("deepseek-v4-flash", 256, 32, 4096, 2048, 6, note=_HASHED),
    _deepseek_v4("deepseek-v4-pro", 384, 48, 7168, 3072, 6, note=_HASHED),
    _softmax(
        "deepseek-v2",
        160,
        20,
        5120,
        1536,
        6,
        n_group=8,
        topk_group=3,
        group_scoring="best",
        renormalize=False,
        routed_scaling_factor=16.0,
        num_shared_experts=2,
        uncertain=(*_SIZES, *_ROUTER, "n_group", "topk_group", "num_shared_experts"),
        note=_OTHER_SCALES,
    ),
    Model(
        "kimi-k2",
        384,
        48,
        7168,
        2048,
        8,
        routed_scaling_factor=2.827,
        uncertain=("routed_scaling_factor",),
    ),
    Model(
        "glm-4.5",
        160,
        20,
        5120,
        1536,
        8,
        routed_scaling_factor=2.5,
        aliases=("glm-4.6", "glm-4.7"),
        uncertain=(*_SIZES, *_ROUTER),
        note=_OTHER_SCALES,
    ),
    Model("glm-4.5-air", 128, 16, 4096, 1408, 8, note=_OTHER_SCALES),
    Model(
        "glm-5",
        256,
        32,
        6144,
        2048,
        8,
        routed_scaling_factor=2.5,
        aliases=("glm-5.1", "glm-5.2"),
    ),
    Model("glm-5.3-flash", 288, 36, 4096, 2048, 8, routed_scaling_factor=2.5, swiglu_limit=10.0),
    _softmax("qwen3-235b", 128, 16, 4096, 1536, 8),
    _softmax("qwen3-coder-480b", 160, 20, 6144, 2560, 8, uncertain=(*_SIZES, *_ROUTER)),
    _softmax("qwen3-30b", 128, 16, 2048, 768, 8),
    _softmax("qwen3-next", 512, 64, 2048, 512, 10, num_shared_experts=1),
    _softmax("qwen3.5-35b", 256, 32, 2048, 512, 8, num_shared_experts=1),
    _softmax("qwen3.5-397b", 512, 64, 4096, 1024, 10, num_shared_experts=1),
    Model("minimax-m2", 256, 32, 3072, 1536, 8, num_shared_experts=0),
    Model(
        "minimax-m3",
        128,
        16,
        6144,
        3072,
        4,
        swiglu_limit=7.0,
        uncertain=(*_WEIGHTS, "num_shared_experts", "scale_format"),
        note="its clamped activation may have another form",
    ),
    Model("mimo-v2-flash", 256, 32, 4096, 2048, 8, num_shared_experts=0),
    Model("step-3.5", 288, 36, 4096, 1280, 8, uncertain=_ROUTER),
    Model("hy3", 192, 24, 4096, 1536, 8, uncertain=_WEIGHTS),
    Model("hy-v4", 256, 32, 2816, 768, 8, swiglu_limit=10.0, uncertain=_WEIGHTS),
    _grouped("ling-1t", 256, 32, 8192, 2048, 8, aliases=("ring-1t",), uncertain=_SIZES + _ROUTER),
    _grouped("a.x-k1", 192, 24, 7168, 2048, 8),
    _softmax(
        "longcat-flash",
        768,
        64,
        6144,
        2048,
        12,
        has_routing_bias=True,
        renormalize=False,
        routed_scaling_factor=6.0,
        note="ids from 512 on are 256 identity experts, which no rank holds",
    ),
    _softmax(
        "ernie-4.5-300b",
        64,
        8,
        8192,
        3584,
        8,
        has_routing_bias=True,
        uncertain=(*_SIZES, *_ROUTER, "num_shared_experts"),
        note=_OTHER_SCALES,
    ),
    _softmax(
        "mistral-4",
        128,
        16,
        4096,
        2048,
        4,
        num_shared_experts=1,
        uncertain=("has_routing_bias", "num_shared_experts"),
        note=_OTHER_SCALES,
    ),
    _softmax("mixtral-8x7b", 8, 1, 4096, 14336, 2, note=_OTHER_SCALES),
)
"""All known models, DeepSeek's first."""
