"""What Hugging Face checkpoints call the tensors of a mixture-of-experts layer, by model family.

One row per way of naming; what tells the models of a row apart (sizes, scoring) is in their
`config.json` and none of a loader's business.
"""

import re
from typing import Any, NamedTuple

from jax_moe.checkpoint.shards import Checkpoint

BLOCK = [128, 128]
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_FORMATS = (None, "e4m3", "float8_e4m3fn")


class Projections(NamedTuple):
    """What an expert's three matrices are called.

    Attributes:
        gate: The one that the activation function is applied to.
        up: The one whose result is multiplied with that.
        down: The one back to the hidden size.
    """

    gate: str
    up: str
    down: str


class Naming(NamedTuple):
    """How a family of models names a layer's tensors; all below `{prefix}layers.{layer}.`.

    Attributes:
        block: The module of the layer.
        projections: Of the routed experts.
        scale: Ending of a weight's scales in place of "weight".
        bias: The routing bias, in the module.
    """

    block: str
    projections: Projections
    scale: str
    bias: str


_LONG = Projections("gate_proj", "up_proj", "down_proj")
_SHORT = Projections("w1", "w3", "w2")

NAMINGS = (
    # DeepSeek-V3, R1, V3.1 and V3.2, Kimi K2, GLM-5, Qwen3 MoE, Qwen3-Next and Qwen3.5.
    Naming("mlp", _LONG, "weight_scale_inv", "gate.e_score_correction_bias"),
    # MiniMax-M2; the order of w1, w2, w3 is that of Mixtral.
    Naming("block_sparse_moe", _SHORT, "weight_scale_inv", "e_score_correction_bias"),
    # DeepSeek's own names, which V4 keeps on the hub.
    Naming("ffn", _SHORT, "scale", "gate.bias"),
)
_SHARED = ("shared_experts", "shared_expert")


class LayerNames(NamedTuple):
    """The names of one layer's tensors, found in a checkpoint.

    Attributes:
        prefix: Everything before the names in the module, with a dot at its end.
        naming: The family's way.
        num_experts: E.
    """

    prefix: str
    naming: Naming
    num_experts: int

    def expert(self, expert: int) -> str:
        """Prefix of a routed expert's projections."""
        return f"{self.prefix}experts.{expert}."

    @property
    def gate_weight(self) -> str:
        """The router's matrix."""
        return f"{self.prefix}gate.weight"

    @property
    def bias(self) -> str:
        """The routing bias."""
        return f"{self.prefix}{self.naming.bias}"

    @property
    def shared_gate(self) -> str:
        """The gate of the shared expert."""
        return f"{self.prefix}shared_expert_gate.weight"

    def shared(self, source: Checkpoint) -> tuple[str, Projections] | None:
        """Prefix and names of the shared experts' projections; None if the layer has none.

        Raises:
            ValueError: The checkpoint has something of that kind under a name that is not known,
                or `config.json` says that it should have them.
        """
        for prefix in (f"{self.prefix}{name}." for name in _SHARED):
            for projections in (_LONG, _SHORT):
                if f"{prefix}{projections.gate}.weight" in source.weight_map:
                    return prefix, projections
        unknown = [n for n in source.weight_map if n.startswith(f"{self.prefix}shared")]
        if unknown:
            raise ValueError(f"{source.index}: {unknown[0]!r}: shared experts of an unknown kind")
        if _option(source.config, "n_shared_experts"):
            raise ValueError(
                f"{source.index}: '{self.prefix}{_SHARED[0]}.{_LONG.gate}.weight': missing, though "
                f"{source.config_path} has n_shared_experts"
            )
        return None

    def has_bias(self, source: Checkpoint) -> bool:
        """Whether the layer has a routing bias."""
        if self.bias in source.weight_map:
            return True
        config = source.config
        noaux = _option(config, "topk_method") == "noaux_tc"
        if noaux or _option(config, "use_routing_bias"):
            raise ValueError(
                f"{source.index}: {self.bias!r}: missing, though {source.config_path} says that "
                "there is a routing bias"
            )
        return False


def find_layer(source: Checkpoint, layer: int) -> LayerNames:
    """Finds how a checkpoint names a layer, and that it has all of its experts.

    Args:
        source: The checkpoint.
        layer: The layer's number, as the names have it.

    Returns:
        The names.

    Raises:
        ValueError: The quantization is not FP8 in blocks of 128x128, the layer has no experts, or
            not all of them.
    """
    check_quantization(source)
    for prefix in _PREFIXES:
        for naming in NAMINGS:
            module = f"{prefix}layers.{layer}.{naming.block}."
            names = [name for name in source.weight_map if name.startswith(f"{module}experts.")]
            if names:
                return LayerNames(module, naming, _count(source, module, names, naming))
    raise ValueError(
        f"{source.index}: layer {layer}: no tensor such as "
        f"'model.layers.{layer}.mlp.experts.0.gate_proj.weight': no such layer, a dense one, or "
        "names that are not known here"
    )


def check_quantization(source: Checkpoint) -> None:
    """Checks that `config.json` has FP8 in blocks of 128x128, if it says anything.

    Raises:
        ValueError: It has another method, block size or format; names file and field.
    """
    config = _option(source.config, "quantization_config")
    if config is None:
        return  # dtypes and grids are checked tensor by tensor
    where = f"{source.config_path}: quantization_config"
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected an object, got {type(config).__name__}")
    expected: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("quant_method", ("fp8",)),
        ("weight_block_size", (BLOCK,)),
        ("fmt", _FORMATS),
        ("activation_scheme", (None, "dynamic")),
    )
    for field, allowed in expected:
        found = config.get(field)
        if found not in allowed:
            wanted = " or ".join(repr(value) for value in allowed if value is not None)
            raise ValueError(
                f"{where}: {field}: expected {wanted} (FP8 in blocks of 128x128, the only "
                f"quantization supported), got {found!r:.200}"
            )


def _count(source: Checkpoint, module: str, names: list[str], naming: Naming) -> int:
    """E, by the configuration if it tells; all experts must have all of their weights."""
    kinds = "|".join(naming.projections)
    tail = rf"experts\.(0|[1-9][0-9]{{0,5}})\.({kinds})\.weight"
    pattern = re.compile(re.escape(module) + tail)
    found = {(int(m[1]), m[2]) for name in names if (m := pattern.fullmatch(name))}
    if not found:
        raise ValueError(
            f"{source.index}: expected one tensor per expert and projection, such as "
            f"'{module}experts.0.{naming.projections.gate}.weight', got {names[0]!r}"
        )
    fields = ("n_routed_experts", "num_experts", "num_local_experts")
    counts = [_option(source.config, field) for field in fields]
    known = [count for count in counts if type(count) is int]
    count = known[0] if known else max(found)[0] + 1
    for expert in range(count):
        for projection in naming.projections:
            if (expert, projection) not in found:
                name = f"{module}experts.{expert}.{projection}.weight"
                raise ValueError(f"{source.index}: {name!r}: missing, of {count} experts")
    if max(found)[0] >= count:
        name = f"{module}experts.{max(found)[0]}"
        raise ValueError(f"{source.index}: {name!r}: {source.config_path} has {count} experts only")
    return count


def _option(config: dict[str, Any], field: str) -> Any:
    """A field of `config.json`; multi-modal models have it one level down."""
    nested = config.get("text_config")
    if field not in config and isinstance(nested, dict):
        return nested.get(field)
    return config.get(field)
