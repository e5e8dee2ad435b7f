"""One of two processes with four CPU devices each: `python -m tests.two_processes ADDRESS HOST`.

It runs the layer over all eight devices, checks the outputs that are here and prints a line. With
`--die`, process 1 then dies without a word, and process 0 goes on calling.
"""

from __future__ import annotations

import argparse
import os
import signal

from pallas_kernels import interruption

DEVICES = 4
HEARTBEAT_SECONDS = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("host", type=int)
    parser.add_argument("--die", action="store_true")
    args = parser.parse_args()

    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        args.address, 2, args.host, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )
    assert jax.local_device_count() == DEVICES
    for exchange in ("collectives", "two_level"):
        worst = check(exchange)
        print(f"host {args.host}: {exchange} differs in {worst} elements", flush=True)
    if args.die and args.host == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(1000 if args.die else 0):
        check("collectives")


def check(exchange: str) -> int:
    """Elements of the outputs here that are not those of one rank after the other."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    import jax_moe
    from tests.moe_inputs import SMALL, bits
    from tests.parallel_cases import Case, arguments, expected, mesh_of

    case = Case(ranks=2 * DEVICES, tokens=5, exchange=exchange)
    mesh = mesh_of(case)
    in_specs, _ = jax_moe.partition_specs(case.axis_name)
    arrays = [
        jax.make_array_from_callback(
            np.shape(a), NamedSharding(mesh, spec), np.asarray(a).__getitem__
        )
        for a, spec in zip(arguments(case), in_specs, strict=True)
    ]
    layer = jax_moe.expert_parallel(mesh, case.axis_name, config=SMALL, exchange=exchange)
    out = layer(*arrays)
    wanted = expected(case)
    return sum(
        int((bits(shard.data) != bits(wanted[shard.index])).sum())
        for shard in out.addressable_shards
    )


if __name__ == "__main__":
    interruption.exit_with(main)
