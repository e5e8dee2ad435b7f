"""How much work a routing asks of this rank, and the least time it can take."""

from typing import NamedTuple

from bench.gaussian import BLOCK
from bench.roofline import Roofline
from bench.routing import LocalLoad
from bench.workloads import Sizes
from interop.workloads import Workload

SCALE_BYTES, BF16_BYTES = 4, 2


class Floors(NamedTuple):
    """The least times of a work, in us.

    Attributes:
        unpromoted_us: Of bytes over the read rate and FLOPs over the rate of `torch._scaled_mm`,
            the larger.
        promoted_us: The same with the rate of FP8 matmuls that promote their sums.
    """

    unpromoted_us: float | None
    promoted_us: float | None


class Work(NamedTuple):
    """What must move and be multiplied for one call, counting local pairs and active experts only.

    Attributes:
        bytes: Weights and scales of the active experts, activations with their scales, and the
            bf16 output.
        flops: Of the two GEMMs over the local pairs.
    """

    bytes: int
    flops: int

    def floors(self, roofline: Roofline | None) -> Floors:
        """The unpromoted and the promoted floor; None where a rate was not measured."""
        if roofline is None:
            return Floors(None, None)
        read, promoted = roofline.read_bytes_per_s, roofline.promoted_flops_per_s
        return Floors(
            unpromoted_us=self.floor_us(read, roofline.fp8_flops_per_s),
            promoted_us=self.floor_us(read, promoted) if promoted else None,
        )

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
