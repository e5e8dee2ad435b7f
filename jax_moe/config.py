"""What the shapes of the arguments do not tell: how a layer routes, clamps and quantizes."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import jax
import numpy as np

from jax_moe.scalars import boolean, is_integer, is_real, printed, quoted, quoted_with_type
from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.types import Precision as Precision
from pallas_kernels.types import ScaleFormat as ScaleFormat

type Scoring = Literal["sigmoid", "softmax", "sqrtsoftplus"]

SCORINGS: tuple[str, ...] = get_args(Scoring.__value__)
SCALE_FORMATS: tuple[str, ...] = get_args(ScaleFormat.__value__)
PRECISIONS: tuple[str, ...] = get_args(Precision.__value__)
_LARGEST = 2**30
_F32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Routing and arithmetic of the layer, checked when made.

    Hashable: a static argument of every jitted call. By default plain top-k of sigmoid scores;
    with groups, the group-limited top-k of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): the
    experts are split into `n_group` groups, `topk_group` groups are kept, `top_k` experts are taken
    from those. `jax_moe.route` has the formulas.

    Attributes:
        top_k: Experts a token goes to, at least 1.
        n_group: Groups that the E experts are split into, evenly and with two or more in each;
            or 1.
        topk_group: Groups kept per token, 1 to `n_group`.
        block_size: Edge of a quantization block; only 128 is supported.
        scoring: What makes scores of logits: "sigmoid" (DeepSeek-V3, GLM, Kimi, MiniMax),
            "softmax" over all E experts (Qwen, Mixtral, ERNIE) or "sqrtsoftplus" (DeepSeek-V4).
        renormalize: Whether the weights of a token are divided by their sum.
        swiglu_limit: Clamp before the activation: the gate from above, the up half on both sides
            (DeepSeek-V4, GLM-5.3-Flash); a positive number, or None for no clamp.
        scale_format: Scales of the activations that are quantized here: any "f32", or powers of
            two, rounded up, as in "ue8m0" (DeepSeek-V3.1 and later were trained with these).

    Raises:
        TypeError: A field is of another type.
        ValueError: A field is out of its range. The limits that depend on the number of experts
            are checked by the call that knows it.
    """

    top_k: int = 8
    n_group: int = 1
    topk_group: int = 1
    block_size: int = QUANT_BLOCK
    scoring: Scoring = "sigmoid"
    renormalize: bool = True
    swiglu_limit: float | None = None
    scale_format: ScaleFormat = "f32"

    def __post_init__(self) -> None:
        for name in ("top_k", "n_group", "topk_group", "block_size"):
            object.__setattr__(self, name, checked_integer(name, getattr(self, name)))
        if self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.n_group < 1:
            raise ValueError(f"n_group: expected at least 1, got {self.n_group}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(
                f"topk_group: expected 1..n_group (= {self.n_group}), got {self.topk_group}"
            )
        if self.block_size != QUANT_BLOCK:
            raise ValueError(f"block_size: only {QUANT_BLOCK} is supported, got {self.block_size}")
        if not isinstance(self.scoring, str) or self.scoring not in SCORINGS:
            raise ValueError(f"scoring: expected one of {SCORINGS}, got {quoted(self.scoring)}")
        object.__setattr__(self, "renormalize", boolean("renormalize", self.renormalize))
        object.__setattr__(self, "swiglu_limit", checked_swiglu_limit(self.swiglu_limit))
        checked_scale_format(self.scale_format)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """The configuration of a model on the Hugging Face hub.

        Reads the names that the model's own code reads, with that code's defaults, from the part
        about text where there are several. The factor `routed_scaling_factor` is no field: pass it
        to `apply` (`jax_moe.nn.LayerConfig.from_hf` keeps it, and the sizes). A null means none (a
        factor of 1, one group, no clamp, no shared experts), and is refused where the model has
        one by default; but for shared experts, of which there are none then.

        Args:
            config: The model's `config.json`, as `json.load` gives it.

        Returns:
            The configuration.

        Raises:
            TypeError: `config` is no mapping, or a value is of the wrong type.
            ValueError: The model type is not known, a key about experts is not, or a value means
                something that this layer does not compute; names it.
        """
        from jax_moe import huggingface  # it knows this type

        return cls(**huggingface.read(config).router)

    @property
    def routing_options(self) -> dict[str, Any]:
        """The fields that a router takes, by name."""
        names = ("top_k", "n_group", "topk_group", "scoring", "renormalize")
        return {name: getattr(self, name) for name in names}

    def merged(
        self, scale_format: object, swiglu_limit: object
    ) -> tuple[ScaleFormat, float | None]:
        """This configuration's `scale_format` and `swiglu_limit`, and those of a call.

        Args:
            scale_format: The call's, or None for that of the configuration.
            swiglu_limit: The call's, or None for that of the configuration.

        Returns:
            Both, as they are to be used.

        Raises:
            TypeError: A value is of another type.
            ValueError: A value is out of range, or both name one and they differ.
        """
        form = self.scale_format if scale_format is None else checked_scale_format(scale_format)
        limit = checked_swiglu_limit(swiglu_limit)
        limit = self.swiglu_limit if limit is None else limit
        for name, value in (("scale_format", form), ("swiglu_limit", limit)):
            own = getattr(self, name)
            if own not in (value, _DEFAULTS[name]):
                raise ValueError(
                    f"{name}: expected None or {own!r}, as in config, got {quoted(value)}"
                )
        return form, limit


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(MoEConfig)}


def checked_scale_format(value: object) -> ScaleFormat:
    """Checks a `scale_format`.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, str) or value not in SCALE_FORMATS:
        raise ValueError(f"scale_format: expected one of {SCALE_FORMATS}, got {quoted(value)}")
    return value  # type: ignore[return-value]


def checked_precision(value: object) -> Precision:
    """Checks a `precision`.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, str) or value not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {quoted(value)}")
    return value  # type: ignore[return-value]


def checked_batch_invariant(value: object) -> bool:
    """Checks a `batch_invariant`.

    Raises:
        TypeError: It is no bool.
    """
    return boolean("batch_invariant", value)


def checked_swiglu_limit(value: Any, name: str = "swiglu_limit") -> float | None:
    """Checks a `swiglu_limit`; `name` is the argument's.

    Raises:
        TypeError: It is no Python or NumPy number.
        ValueError: It is not positive, normal and finite in float32.
    """
    if value is None:
        return None
    if not is_real(value):
        raise TypeError(f"{name}: expected a number or None, got {quoted_with_type(value)}")
    with contextlib.suppress(OverflowError):  # a Python integer with many digits
        if float(_F32.tiny) <= float(value) <= float(_F32.max):
            return float(value)
    raise ValueError(
        f"{name}: expected a positive number, normal and finite in float32, or None, "
        f"got {quoted(value)}"
    )


def checked_integer(name: str, value: object) -> int:
    """Checks a field that is an integer, of Python or NumPy.

    Raises:
        TypeError: It is none.
        ValueError: It is larger than any size can be.
    """
    try:
        if not is_integer(value) and not isinstance(value, jax.Array | np.ndarray):
            raise TypeError  # a tensor of torch has an index as well
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {quoted_with_type(value)}") from None
    if abs(number) > _LARGEST:
        raise ValueError(f"{name}: expected at most {_LARGEST}, got {printed(number)}")
    return number


def check_experts(
    name: str,
    config: MoEConfig,
    num_experts: int,
    source: str = "",
    *,
    n_group: str = "n_group",
    top_k: str = "top_k",
) -> None:
    """Checks that a router fits the number of experts.

    Args:
        name: The argument that holds the router.
        config: The router.
        num_experts: E.
        source: For the message, what has that many, as " of routing_logits".
        n_group: What the message calls it.
        top_k: What the message calls it.

    Raises:
        ValueError: The groups do not split the experts, or those kept hold too few.
    """
    # Groups are chosen by the sum of their two best; one alone is not chosen.
    is_split = num_experts % config.n_group == 0 and num_experts >= 2 * config.n_group
    if config.n_group > 1 and not is_split:
        raise ValueError(
            f"{name}: expected {n_group} to split the {num_experts} experts{source} into "
            f"equal groups of at least 2, or to be 1, got {config.n_group}"
        )
    kept = config.topk_group * (num_experts // config.n_group)
    if config.top_k > kept:
        raise ValueError(
            f"{name}: expected {top_k} of at most {kept}, which is what {config.topk_group} of "
            f"{config.n_group} groups of {num_experts} experts hold, got {config.top_k}"
        )


DEEPSEEK_V3 = MoEConfig(top_k=8, n_group=8, topk_group=4)
"""DeepSeek-V3 and R1: 8 of 256 experts, from 4 of 8 groups."""
