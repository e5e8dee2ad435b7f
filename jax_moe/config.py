"""What the shapes of the arguments do not tell: how many experts, from how many groups."""

import dataclasses
import operator

from jax_moe.scalars import printed
from pallas_kernels.shapes import QUANT_BLOCK

_LARGEST = 2**30


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Routing of the layer, checked when made. Hashable: a static argument of every jitted call.

    Group-limited top-k of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): the experts are split
    into `n_group` groups, `topk_group` groups are kept, `top_k` experts are taken from those.
    `n_group=1, topk_group=1` is plain top-k.

    Attributes:
        top_k: Experts a token goes to, at least 1.
        n_group: Groups that the E experts are split into, evenly and with two or more in each.
        topk_group: Groups kept per token, 1 to `n_group`.
        block_size: Edge of a quantization block; only 128 is supported.

    Raises:
        TypeError: A field is not an integer.
        ValueError: A field is out of its range. The limits that depend on the number of experts
            are checked by the call that knows it.
    """

    top_k: int = 8
    n_group: int = 8
    topk_group: int = 4
    block_size: int = QUANT_BLOCK

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _integer(field.name, getattr(self, field.name)))
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


def _integer(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name}: expected an integer, got {value!r} ({type(value).__name__})"
        ) from None
    if abs(number) > _LARGEST:
        raise ValueError(f"{name}: expected at most {_LARGEST}, got {printed(number)}")
    return number


DEEPSEEK_V3 = MoEConfig(top_k=8, n_group=8, topk_group=4)
"""DeepSeek-V3 and R1: 8 of 256 experts, from 4 of 8 groups."""
