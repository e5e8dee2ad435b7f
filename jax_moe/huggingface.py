"""What a model's `config.json` on the Hugging Face hub says about its experts.

Names and defaults are those of transformers 5.24's configuration classes and of the files that the
models' authors publish. What is not known is refused by name: a guess would route tokens wrongly
without any sign of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from jax_moe.config import (
    SCORINGS,
    MoEConfig,
    check_experts,
    checked_integer,
    checked_swiglu_limit,
)
from jax_moe.scalars import boolean, quoted, quoted_with_type, real


class ModelConfig(NamedTuple):
    """The mixture-of-experts layers of a model.

    Attributes:
        router: The fields of a `MoEConfig`.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I, of one routed expert.
        routed_scaling_factor: Factor of all weights.
        has_routing_bias: Whether the checkpoint holds a bias of the selection.
        num_shared_experts: Experts that every token takes.
        shared_intermediate_size: Of all shared experts together; 0 without any.
        has_shared_gate: Whether their output is weighed by a sigmoid.
        clamps_shared: Whether `swiglu_limit` holds for the shared experts as well.
    """

    router: dict[str, Any]
    num_experts: int
    hidden_size: int
    intermediate_size: int
    routed_scaling_factor: float
    has_routing_bias: bool
    num_shared_experts: int
    shared_intermediate_size: int
    has_shared_gate: bool
    clamps_shared: bool


_NAMES = {
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k"),
    "num_experts": ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
    "n_group": ("n_group", "num_expert_group"),
    "topk_group": ("topk_group",),
    "topk_method": ("topk_method",),
    "is_grouped": ("use_grouped_topk",),
    "scoring": ("scoring_func", "moe_router_activation_func", "score_function"),
    "renormalize": ("norm_topk_prob", "moe_renormalize", "route_norm"),
    "routed_scaling_factor": (
        "routed_scaling_factor",
        "router_scaling_factor",
        "moe_router_scaling_factor",
    ),
    "has_routing_bias": (
        "use_routing_bias",
        "moe_router_enable_expert_bias",
        "moe_use_aux_free",
    ),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("moe_intermediate_size", "expert_hidden_dim"),
    "num_shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "shared_intermediate_size": (
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "share_expert_dim",
    ),
    "shared_size": ("moe_shared_expert_intermediate_size",),  # of each
    "swiglu_limit": ("swiglu_limit",),
    "hidden_act": ("hidden_act",),
}
"""A field, and the keys that different models have for it."""

_NONE = {
    "n_group": 1,
    "topk_group": 1,
    "topk_method": None,
    "renormalize": False,
    "routed_scaling_factor": 1.0,
    "has_routing_bias": False,
    "shared_intermediate_size": None,
    "swiglu_limit": None,
}
"""What a null can mean: none of it, where that is the model's default as well."""

_SIZES = ("top_k", "num_experts", "hidden_size", "intermediate_size")
_FLAGS = ("renormalize", "has_routing_bias", "is_grouped")
_TEXTS = ("topk_method", "scoring", "hidden_act")

_COMMON = {
    "top_k": None,
    "num_experts": None,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": None,
    "is_grouped": True,
    "scoring": "sigmoid",
    "renormalize": True,
    "routed_scaling_factor": 1.0,
    "has_routing_bias": True,
    "hidden_size": None,
    "intermediate_size": None,
    "num_shared_experts": 0,
    "shared_intermediate_size": None,
    "shared_size": None,
    "swiglu_limit": None,
    "hidden_act": "silu",
    "has_shared_gate": False,
}
_DEEPSEEK = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "num_shared_experts": 1}
_GLM = {"num_shared_experts": 1}
_SOFTMAX = {"scoring": "softmax", "has_routing_bias": False}
_QWEN_SHARED = _SOFTMAX | {"num_shared_experts": 1, "has_shared_gate": True}

_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _SOFTMAX | {"renormalize": False, "num_shared_experts": 2},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "deepseek_v4": {
        "scoring": "sqrtsoftplus",
        "routed_scaling_factor": 1.5,
        "num_shared_experts": 1,
        "swiglu_limit": 10.0,
    },
    "kimi_k2": _DEEPSEEK | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
    "kimi_linear": {"routed_scaling_factor": 2.446, "num_shared_experts": 1},
    "glm4_moe": _GLM,
    "glm4v_moe_text": _GLM,
    "glm_moe_dsa": _GLM | {"routed_scaling_factor": 2.5},
    "glm5_next_text": _GLM | {"routed_scaling_factor": 2.5, "swiglu_limit": 10.0},
    "qwen3_moe": _SOFTMAX | {"renormalize": False},
    "qwen3_next": _QWEN_SHARED,
    "qwen3_5_moe_text": _QWEN_SHARED,
    "minimax_m2": {},
    "mimo_v2_flash": {},
    "mixtral": _SOFTMAX,
    "ernie4_5_moe": _SOFTMAX | {"has_routing_bias": True, "num_shared_experts": 2},
    "hy_v3": {"routed_scaling_factor": 2.826, "num_shared_experts": 1},
    "hy_v4": {"routed_scaling_factor": 2.827, "num_shared_experts": 1, "swiglu_limit": 10.0},
    "dots1": {"renormalize": False},
    "bailing_hybrid": _DEEPSEEK,
    "exaone_moe": {"routed_scaling_factor": 2.5, "num_shared_experts": 1},
}
"""Model types, and what their configuration means where it does not say."""

_NO_OWN_SIZE = ("minimax_m2", "mixtral")
"""Models whose `intermediate_size` is that of an expert."""

_ABOUT_EXPERTS = re.compile(r"expert|moe|rout|topk|scoring|swiglu|hash")
_WITHOUT_EFFECT = re.compile(
    r"""router_aux_loss_coef|output_router_logits|aux_loss_alpha|seq_aux|router_jitter_noise
    |moe_layer_freq|moe_layer_(start|end)_index|moe_layer_interval|moe_layers_enum|moe_norm_min
    |ep_size|index_.*|.*num_hash_layers|enable_moe_fp32_combine|moe_router_use_sigmoid
    |(moe_)?router_dtype|is_moe_layer|moe_capacity""",
    re.VERBOSE,
)
"""Keys about training, about which layers have experts, or that change nothing in inference."""

_PLAIN = {
    "moe_gate": "topk",
    "moe_router_enable_routed_scaling": True,
    "moe_router_enable_shared_expert": True,
    "expert_dtype": "fp8",
}
"""Keys that change nothing if they have this value, and what the layer does not compute if not."""


def read(config: Mapping[str, Any]) -> ModelConfig:
    """Reads a `config.json`.

    Args:
        config: As `json.load` gives it.

    Returns:
        What it says about experts.

    Raises:
        TypeError: It is no mapping, or a value is of another type.
        ValueError: The model type or a key is not known, a value is missing, or it means something
            that this layer does not compute; names it.
    """
    _mapping("config", config)
    quantization = _part(config, "quantization_config") or {}
    text = _part(config, "text_config")
    if text is not None:
        config = text
        quantization = _part(config, "quantization_config") or quantization
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ValueError(f"model_type: expected one of {known}, got {quoted(kind)}")
    defaults = _COMMON | _FAMILIES[kind]
    fields = _fields(kind)
    given, keys = _given(config, kind, fields, defaults)
    found = defaults | given
    for name in _SIZES:
        if found[name] is None:
            known = " or ".join(key for key, field in fields.items() if field == name)
            key, said = keys.get(name, known), "null" if name in keys else "none"
            raise ValueError(f"{key}: expected a number in the {kind} config, got {said}")
    if found["hidden_act"] != "silu":
        raise ValueError(f"hidden_act: expected 'silu', got {quoted(found['hidden_act'])}")
    _set_groups(found)
    names = {name: keys.get(name, f"the default {texts[0]}") for name, texts in _NAMES.items()}
    shared = found["num_shared_experts"]
    width = found["shared_intermediate_size"]
    if width is None:
        product = f"{names['num_shared_experts']} * {names['intermediate_size']}"
        size = found["shared_size"] or found["intermediate_size"]
        width = checked_integer(product, shared * size)
    if width and config.get("shared_moe_mode"):
        _refuse(kind, "shared_moe_mode", config["shared_moe_mode"])
    scale_fmt = quantization.get("scale_fmt")
    if scale_fmt not in (None, "float", "ue8m0"):
        raise ValueError(f"scale_fmt: expected 'ue8m0', 'float' or none, got {quoted(scale_fmt)}")
    router = {name: found[name] for name in ("top_k", "n_group", "topk_group", "scoring")}
    router |= {"renormalize": found["renormalize"], "swiglu_limit": found["swiglu_limit"]}
    router["scale_format"] = "ue8m0" if scale_fmt == "ue8m0" else "f32"
    _check_groups(router, found["num_experts"], names)
    return ModelConfig(
        router=router,
        num_experts=found["num_experts"],
        hidden_size=found["hidden_size"],
        intermediate_size=found["intermediate_size"],
        routed_scaling_factor=found["routed_scaling_factor"],
        has_routing_bias=found["has_routing_bias"],
        num_shared_experts=shared if width else 0,
        shared_intermediate_size=width,
        has_shared_gate=bool(found["has_shared_gate"] and width),
        clamps_shared=kind != "hy_v4",
    )


def _fields(kind: str) -> dict[str, str]:
    """Our field for each key that a file may have."""
    fields = {key: field for field, keys in _NAMES.items() for key in keys}
    if kind in _NO_OWN_SIZE:
        fields["intermediate_size"] = "intermediate_size"
    return fields


def _given(
    config: Mapping[str, Any], kind: str, fields: dict[str, str], defaults: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields that the file states, each of its type, and the key that it has for each."""
    found: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for key, value in config.items():
        if not isinstance(key, str):
            raise TypeError(f"config: expected names of text, got {quoted_with_type(key)}")
        if key in fields:
            field = fields[key]
            if value is None and field == "num_shared_experts":
                value = 0  # the models' own code makes none then, whatever the default is
            if value is None:
                _check_null(key, field, kind, defaults[field])
                keys.setdefault(field, key)
                continue
            value = _of_its_type(key, field, value)
            if field in found and found[field] != value:
                said = f"{found[field]!r} as {keys[field]} says"
                raise ValueError(f"{key}: expected {said}, got {quoted(value)}")
            if field not in found:
                found[field], keys[field] = value, key
        elif key in _PLAIN:
            if value not in (None, _PLAIN[key]):
                _refuse(kind, key, value)
        elif key == "shared_moe_mode":  # of no effect without shared experts, which are known later
            continue
        elif _ABOUT_EXPERTS.search(key) and not _WITHOUT_EFFECT.fullmatch(key) and value:
            _refuse(kind, key, value)
    return found, keys


def _refuse(kind: str, key: str, value: Any) -> NoReturn:
    raise ValueError(f"{key}: not known for model_type {kind!r}, got {quoted(value)}")


def _check_null(key: str, field: str, kind: str, default: Any) -> None:
    """Refuses a null where it is not the same as no key at all; a size is asked for later."""
    if field in _SIZES or (field in _NONE and default == _NONE[field]):
        return
    raise ValueError(
        f"{key}: expected a value or no such key in the {kind} config (which means {default!r}), "
        "got null"
    )


def _set_groups(found: dict[str, Any]) -> None:
    """Groups as numbers; how a group is scored depends on the method's name."""
    method = found["topk_method"]
    if method not in (None, "noaux_tc", "greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method: expected 'noaux_tc' or 'greedy', got {quoted(method)}")
    n_group, topk_group = found["n_group"], found["topk_group"]
    if method == "greedy" or not found["is_grouped"]:
        n_group = topk_group = 1
    if method == "group_limited_greedy" and topk_group < n_group:
        raise ValueError(
            "topk_method: expected groups that are scored by their two best experts, got "
            "'group_limited_greedy', which takes the best one"
        )
    found["n_group"], found["topk_group"] = n_group, topk_group


def _check_groups(router: dict[str, Any], num_experts: int, names: Mapping[str, str]) -> None:
    """Checks the numbers that depend on each other, under the names that the file has."""
    n_group, topk_group = router["n_group"], router["topk_group"]
    if topk_group > n_group:
        raise ValueError(
            f"{names['topk_group']}: expected 1..{names['n_group']} (= {n_group}), got {topk_group}"
        )
    source = f" of {names['num_experts']}"
    used = {name: names[name] for name in ("n_group", "top_k")}
    check_experts("config", MoEConfig(**router), num_experts, source, **used)


def _of_its_type(key: str, field: str, value: Any) -> Any:
    """A value that the file states, checked under the name that the file has for it."""
    if field in _FLAGS:
        return boolean(key, value)
    if field in _TEXTS:
        if not isinstance(value, str):
            raise TypeError(f"{key}: expected text, got {quoted_with_type(value)}")
        if field == "scoring" and value == "noaux_tc":  # dots.llm1 has the method's name there
            return "sigmoid"
        if field == "scoring" and value not in SCORINGS:
            raise ValueError(f"{key}: expected one of {SCORINGS}, got {quoted(value)}")
        return value
    if field == "swiglu_limit":
        return checked_swiglu_limit(value, key)
    if field == "routed_scaling_factor":
        return float(real(key, value))
    number = checked_integer(key, value)
    least = 1 if field in (*_SIZES, "n_group", "topk_group") else 0
    if number < least:
        raise ValueError(f"{key}: expected {least} or more, got {number}")
    return number


def _mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping, got {type(value).__name__}")


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """A mapping within; None where the file does not have it, or has a null."""
    part = config.get(name)
    if part is not None:
        _mapping(name, part)
    return part
