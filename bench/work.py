"""How much work a routing asks of this rank, and the least time it can take."""

from typing import NamedTuple

from bench.gaussian import BLOCK
from bench.routing import LocalLoad
from bench.workloads import Sizes
from interop.workloads import Workload

SCALE_BYTES, BF16_BYTES = 4, 2


class Work(NamedTuple):
    """What must move and be multiplied for one call, counting local pairs and active experts only.

    Attributes:
        bytes: Weights and scales of the active experts, activations with their scales, and the
            bf16 output.
        flops: Of the two GEMMs over the local pairs.
    """

    bytes: int
    flops: int

    def floor_us(self, read_bytes_per_s: float, fp8_flops_per_s: float) -> float:
        """The least time at these two rates; no launch, routing or unpermute time is in it."""
        return 1e6 * max(self.bytes / read_bytes_per_s, self.flops / fp8_flops_per_s)


def gemm_bytes(rows: int, columns: int) -> int:
    """Bytes of one e4m3 weight matrix with its 128 x 128 scales."""
    return rows * columns + SCALE_BYTES * (rows // BLOCK) * (columns // BLOCK)


def quantized_row_bytes(columns: int) -> int:
    """Bytes of one e4m3 row with its 1 x 128 scales."""
    return columns + SCALE_BYTES * (columns // BLOCK)


def work_of(workload: Workload, sizes: Sizes, load: LocalLoad) -> Work:
    """Counts the bytes and FLOPs of one call.

    Args:
        workload: Gives T.
        sizes: Gives H and I.
        load: The local pairs and active experts of the routing.

    Returns:
        The work of this rank.
    """
    hidden, intermediate = sizes.hidden_size, sizes.intermediate_size
    expert = gemm_bytes(2 * intermediate, hidden) + gemm_bytes(hidden, intermediate)
    token = quantized_row_bytes(hidden) + BF16_BYTES * hidden
    return Work(
        bytes=load.active_experts * expert + workload.num_tokens * token,
        flops=2 * load.pairs * (2 * intermediate * hidden + hidden * intermediate),
    )
