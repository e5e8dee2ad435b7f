"""A trace of the layer over several ranks that opens in Perfetto, and its time by kernel and rank.

Graphs are off while it is taken, so that every kernel is seen by itself: durations of kernels are
those of a call, the gaps between them are not.
"""

import collections
import gzip
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bench import steps
from bench.failures import writing
from bench.parallel import exchanged, once
from bench.parallel_inputs import input_maker, input_specs, mesh_of
from bench.workloads import Sizes
from jax_moe.io.files import write_atomically

CALLS = 3
_DEVICE = re.compile(r"/device:\w+:(\d+)")


class KernelTime(NamedTuple):
    """A kernel on one rank.

    Attributes:
        rank: Which.
        name: Of the kernel.
        us: Of a call.
        launches: Of a call.
    """

    rank: int
    name: str
    us: float
    launches: float


def record(ranks: int, num_tokens: int, exchange: str, sizes: Sizes, path: Path) -> dict[str, Any]:
    """Traces calls of a layer.

    Args:
        ranks: N.
        num_tokens: T of each.
        exchange: Its name.
        sizes: E, H and I.
        path: Of the trace, `.json.gz`.

    Returns:
        exchange, tokens, and trace, the file's name, or the problem.
    """
    mesh = mesh_of(ranks)
    layer = once(exchanged(mesh, exchange, num_tokens), input_specs(mesh, num_tokens, sizes))
    make = input_maker(mesh, num_tokens, sizes)
    found = {"exchange": exchange, "tokens": num_tokens}
    killed = steps.wait_for_turn()
    if f"check_{exchange}" in killed:
        return found | {"problem": "left out: its check was killed"}
    inputs = make()
    jax.block_until_ready(layer(inputs))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # its events are most of a file
    options.host_tracer_level = 1
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
            for _ in range(CALLS):
                jax.block_until_ready(layer(inputs))
        (written,) = Path(folder).rglob("perfetto_trace.json.gz")
        with writing(path), write_atomically(path, "wb") as file, written.open("rb") as trace:
            shutil.copyfileobj(trace, file)
    return found | {"trace": path.name}


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a trace."""
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def by_kernel(events: Sequence[dict[str, Any]], calls: int = CALLS) -> list[KernelTime]:
    """Time of each kernel on each device, of a call, by rank and the longest first.

    Args:
        events: Of a trace by JAX's profiler: a process per device, a thread per stream beside
            threads that say the same by operation and by program.
        calls: That were traced.
    """
    ranks, streams = {}, set()
    for event in events:
        if event.get("ph") != "M":
            continue
        name = event.get("args", {}).get("name", "")
        if event["name"] == "process_name" and (device := _DEVICE.search(name)):
            ranks[event["pid"]] = int(device[1])
        elif event["name"] == "thread_name" and name.startswith("Stream"):
            streams.add((event["pid"], event["tid"]))
    total: dict[tuple[int, str], list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for event in events:
        where = event.get("pid"), event.get("tid")
        if event.get("ph") == "X" and where[0] in ranks and where in streams:
            sums = total[ranks[event["pid"]], event["name"]]
            sums[0] += event["dur"]
            sums[1] += 1
    times = [
        KernelTime(rank, name, us / calls, count / calls)
        for (rank, name), (us, count) in total.items()
    ]
    return sorted(times, key=lambda one: (one.rank, -one.us))
