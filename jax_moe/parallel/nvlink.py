"""The exchange by Pallas kernels between GPUs of one process: rows go only where they are needed.

A token of DeepSeek-V3 has its experts in at most four of eight groups, so with eight ranks a row
goes to four of them at most. The kernels are launched like any other, and the whole layer is one
CUDA graph. They use peer pointers and semaphores in global memory, no multicast.
"""

import dataclasses

from jax import Array
from jaxtyping import Float, Int32

from jax_moe.parallel.ranks import Ranks
from jax_moe.parallel.tokens import Tokens
from jax_moe.types import Routing


@dataclasses.dataclass(frozen=True)
class NVLink:
    """Rows are written to the ranks that need them, partial sums read from those that made them.

    Attributes:
        ranks: Along one axis.
        num_local_experts: E_local: physical expert e is on rank e div E_local.
    """

    ranks: Ranks
    num_local_experts: int

    def dispatch(self, tokens: Tokens) -> Tokens:
        """Slot r*T + t holds token t of rank r, if one of its experts is here, and always its ids.

        Nothing reads the other slots: the local layer takes the rows of local pairs only.
        """
        from pallas_kernels.mosaic.dispatch import dispatch

        rows, scales, *routing = dispatch(
            tokens.hidden_states,
            tokens.hidden_states_scale,
            *tokens.routing,
            axis_name=self.ranks.axes[0],
            num_local_experts=self.num_local_experts,
        )
        return Tokens(rows, None if scales is None else scales.T, Routing(*routing))

    def combine(
        self,
        partial_sums: Float[Array, "N*T H"],
        sent: Int32[Array, "T k"],
        received: Int32[Array, "N*T k"],
    ) -> Float[Array, "T H"]:
        """The sums of this rank's tokens."""
        from pallas_kernels.mosaic.combine import combine

        return combine(
            partial_sums,
            sent,
            axis_name=self.ranks.axes[0],
            num_local_experts=self.num_local_experts,
        )
