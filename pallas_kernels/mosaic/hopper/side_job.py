"""Work for the two warps of a grouped matmul's producer that neither fill nor draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class IdleWork(NamedTuple):
    """What one of those warps does in every CTA, while tiles are multiplied.

    Attributes:
        inputs: Arrays that it takes in.
        out_type: What it gives out.
        run: `run(inputs, output, sms)`, with references in place of the arrays; code of a single
            warp, see `single_warp`.
    """

    inputs: tuple[Any, ...]
    out_type: Any
    run: Callable[[Any, Any, int], None]
