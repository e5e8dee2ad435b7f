"""A side job: work for the two warps of a grouped matmul's producer that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class SideJob(NamedTuple):
    """What one of those warps does in every CTA, while tiles are multiplied.

    Attributes:
        inputs: Arrays that it takes in.
        out_type: What it gives out.
        run: `run(inputs, output, sms)`, with references in place of the arrays; code of a single
            warp, see `mosaic.warp`.
    """

    inputs: tuple[Any, ...]
    out_type: Any
    run: Callable[[Any, Any, int], None]
