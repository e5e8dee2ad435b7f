"""What `bench.options` measures: a stage of the layer with one option."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from interop.arguments import comma_separated


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


def variant_names(text: str) -> tuple[str, ...]:
    """The type of an argument that is names of variants, separated by commas.

    Some names hold a comma themselves, with a space after it. The longest beginning of a variant's
    name is one name: "e4m3, high" is, "e4m3, bf16" and "e4m3,high" are two.
    """
    comma_separated(text)  # which refuses an empty name
    parts = text.split(",")
    found = []
    while parts:
        for count in range(len(parts), 0, -1):
            name = ",".join(parts[:count]).strip()
            if any(one.name.startswith(name) for one in VARIANTS):
                break
        found.append(name)
        del parts[:count]
    return tuple(found)


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
