"""What `bench.options` measures: a stage of the layer with one option."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One way to call a stage.

    Attributes:
        stage: "layer", "route" or "quantize".
        name: In the tables.
        options: Keywords of the stage.
        router: Fields of the router's `MoEConfig` that are not DeepSeek-V3's.
        dtype: Of the hidden states.
        bias: Whether the router has one.
    """

    stage: str
    name: str
    options: Mapping[str, Any] = {}
    router: Mapping[str, Any] = {}
    dtype: str = "e4m3"
    bias: bool = True


_HIGH, _INVARIANT = {"precision": "high"}, {"batch_invariant": True}
VARIANTS = (
    Variant("layer", "e4m3"),
    Variant("layer", "e4m3, swiglu_limit=7", {"swiglu_limit": 7.0}),
    Variant("layer", "e4m3, batch_invariant", _INVARIANT),
    Variant("layer", "e4m3, high", _HIGH),
    Variant("layer", "e4m3, high, batch_invariant", _HIGH | _INVARIANT),
    Variant("layer", "bf16", dtype="bf16"),
    Variant("layer", "bf16, ue8m0", {"scale_format": "ue8m0"}, dtype="bf16"),
    Variant("layer", "bf16, high", _HIGH, dtype="bf16"),
    Variant("route", "sigmoid"),
    Variant("route", "softmax", router={"scoring": "softmax"}),
    Variant("route", "sqrtsoftplus", router={"scoring": "sqrtsoftplus"}),
    Variant("route", "sigmoid, no bias", bias=False),
    Variant("route", "softmax, no bias", router={"scoring": "softmax"}, bias=False),
    Variant("route", "sigmoid, not renormalized", router={"renormalize": False}),
    Variant("quantize", "f32 scales", dtype="bf16"),
    Variant("quantize", "ue8m0 scales", {"scale_format": "ue8m0"}, dtype="bf16"),
)


def chosen_variants(names: Sequence[str]) -> tuple[Variant, ...]:
    """Those of `VARIANTS` whose name begins with one of these; all if there are none.

    Raises:
        ValueError: No variant's name begins so.
    """
    for name in names:
        if not any(one.name.startswith(name) for one in VARIANTS):
            known = ", ".join(repr(one.name) for one in VARIANTS)
            raise ValueError(f"--variants: expected the beginning of {known}, got {name!r}")
    return tuple(one for one in VARIANTS if not names or one.name.startswith(tuple(names)))
