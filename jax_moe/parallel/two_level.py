"""The exchange for several hosts: a row crosses the network once per pair of hosts.

    dispatch   all-gather over the hosts, each device with those of its number ("rail"),
               then all-gather inside each host
    combine    all-to-all and sum inside each host, then all-to-all and sum over the hosts

A host sends one sum for each token of another instead of one per device. That sum is rounded to
the dtype of the partial sums before it crosses, the one difference from the flat exchange.
"""

import dataclasses

from jax import Array
from jaxtyping import Float, Int32

from jax_moe.parallel.collectives import add_in_order, gather, send_home
from jax_moe.parallel.ranks import Ranks
from jax_moe.parallel.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class TwoLevel:
    """Collectives over the host axis, then over the device axis.

    Slots are ordered by device number, then host, then token.
    """

    ranks: Ranks

    def dispatch(self, tokens: Tokens) -> Tokens:
        """Slot (g*D + d)*T + t holds token t of device g of host d, of D hosts."""
        hosts, devices = self.ranks.axes
        return gather(tokens, (hosts,), (devices,))

    def combine(
        self,
        partial_sums: Float[Array, "N*T H"],
        sent: Int32[Array, "T k"],
        received: Int32[Array, "N*T k"],
    ) -> Float[Array, "T H"]:
        """The sums of this rank's tokens."""
        hosts, devices = self.ranks.axes
        num_hosts, num_devices = self.ranks.sizes
        in_host = add_in_order(send_home(partial_sums, (devices,), num_devices))  # [D*T, H]
        return add_in_order(send_home(in_host, (hosts,), num_hosts))
