"""Everything there is to know about expert parallelism on the GPUs of one host, in one call.

    python -m bench.parallel_gpus --output out/parallel_gpus --minutes 9

Each step is a process of its own with a limit (`bench.steps`). Multicast (NVLS) stays off.

    check        every exchange against the sum over one-rank layers; the same bits in 100 runs;
                 with and without CUDA graphs
    primitives   collectives and the kernels between GPUs, 1 KB to 256 MB per rank
    layer        `bench.parallel` for each number of tokens, the local work beside it
    trace        a Perfetto trace of one layer
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import jax_moe
from bench import environment, parallel
from bench.steps import Step, run_all
from bench.workloads import FULL, REDUCED

STEPS = (
    ("check_collectives", ["check", "collectives"], True, 100),
    ("check_nvlink", ["check", "nvlink"], True, 100),
    ("check_nvlink_no_graphs", ["check", "nvlink"], False, 80),
    *((f"layer_{t}", ["layer", str(t)], True, 120) for t in (128, 8, 1024, 8192)),
    ("primitives", ["primitives"], True, 120),
    *((f"layer_{t}", ["layer", str(t)], True, 120) for t in (4096, 32, 1)),
    ("trace", ["trace", "collectives"], True, 60),
)
"""Name, what, whether with CUDA graphs, seconds; the most telling first."""

NO_GRAPHS = "--xla_gpu_enable_command_buffer="
RUNS = 100
BYTES = tuple(1024 * 4**i for i in range(10))  # 1 KB to 256 MB


def steps_of(folder: Path, only: str) -> list[Step]:
    """The steps whose name holds `only`, with NVLS off, and one cache of programs for all."""
    flags = os.environ.get("XLA_FLAGS", "")
    variables = {"NCCL_NVLS_ENABLE": "0", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    command = ["-m", "bench.parallel_gpus", "--output", str(folder), "--step"]
    return [
        Step(
            name,
            [*command, *what],
            seconds,
            variables | {"XLA_FLAGS": (flags if graphs else f"{flags} {NO_GRAPHS}").strip()},
        )
        for name, what, graphs, seconds in STEPS
        if only in name
    ]


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((jax.device_count(),), (parallel.AXIS,), axis_types=(AxisType.Auto,))


def check(exchange: str) -> int:
    """Few and many tokens by one exchange: right, and the same bits in every run."""
    mesh, sizes = _mesh(), FULL if jax.default_backend() == "gpu" else REDUCED
    wrong = False
    for num_tokens in (1, 32, 1024) if sizes is FULL else (1, 5):
        inputs = parallel.make_inputs(mesh, num_tokens, sizes)
        whole = parallel.gathered(mesh, inputs)
        local = parallel.local_work(mesh)
        parts = jax.jit(lambda a, local=local: local(a).astype(jnp.float32).sum(axis=0))
        wanted = np.asarray(parts(parallel.routing(whole)))
        layer = parallel.over_ranks(jax_moe.expert_parallel(mesh, parallel.AXIS, exchange=exchange))
        outs = [layer(parallel.routing(inputs)) for _ in range(RUNS)]
        first = np.asarray(outs[0]).view(np.uint16)
        same = all((np.asarray(out).view(np.uint16) == first).all() for out in outs)
        found = np.asarray(outs[0], np.float32)
        error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        wrong |= not (same and error < 0.01)
        _say(step="check", exchange=exchange, T=num_tokens, error=error, same_bits=same)
    return int(wrong)


def primitives() -> int:
    """Microseconds and GB/s per rank of what an exchange is made of."""
    mesh, ranks = _mesh(), jax.device_count()
    calls = 20 if jax.default_backend() == "gpu" else 1
    names: dict[str, Callable[[Any], Any]] = {
        "all_gather": lambda x: lax.all_gather(x[: x.shape[0] // ranks], parallel.AXIS, tiled=True),
        "all_to_all": lambda x: lax.all_to_all(x, parallel.AXIS, 0, 0, tiled=True),
        "reduce_scatter": lambda x: jnp.tile(
            lax.psum_scatter(x, parallel.AXIS, tiled=True), (ranks, 1)
        ),
    }
    if jax.default_backend() == "gpu" and ranks > 1:
        names["nvlink_dispatch"] = functools.partial(_dispatched, ranks=ranks)
        names["nvlink_combine"] = functools.partial(_combined, ranks=ranks)
    for size in BYTES if calls > 1 else BYTES[:2]:
        rows = max(size // 2048 // ranks, 1) * ranks  # 1024 columns of bf16
        for name, function in names.items():
            try:
                us = _time(mesh, function, rows, calls)
            except Exception as problem:
                _say(step="primitive", name=name, bytes=size, problem=str(problem)[:200])
                continue
            sent = rows * 2048 * (ranks - 1) / ranks
            _say(step="primitive", name=name, bytes=rows * 2048, us=us, gb_s=sent / us / 1e3)
    return 0


def _time(mesh: Any, function: Callable[[Any], Any], rows: int, calls: int) -> float:
    def rank(x: Any) -> Any:
        return lax.fori_loop(0, calls, lambda _, x: function(x).astype(x.dtype), x)

    spec = PartitionSpec(parallel.AXIS)
    program = jax.jit(
        jax.shard_map(rank, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    x = jnp.zeros((rows * mesh.devices.size, 1024), jnp.bfloat16)
    x = jax.device_put(x, jax.NamedSharding(mesh, spec))
    jax.block_until_ready(program(x))
    found = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(program(x))
        found.append((time.perf_counter() - start) / calls * 1e6)
    return float(np.median(found))


def _ids(num_tokens: int, ranks: int) -> Any:
    """An expert of every rank for every token: each row goes everywhere."""
    return jnp.broadcast_to(jnp.arange(ranks, dtype=jnp.int32), (num_tokens, ranks))


def _dispatched(x: Any, ranks: int) -> Any:
    from pallas_kernels.mosaic.dispatch import dispatch

    rows, ids = x[: x.shape[0] // ranks], _ids(x.shape[0] // ranks, ranks)
    weights = ids.astype(jnp.float32)
    return dispatch(rows, None, ids, weights, axis_name=parallel.AXIS, num_local_experts=1)[0]


def _combined(x: Any, ranks: int) -> Any:
    from pallas_kernels.mosaic.combine import combine

    ids = _ids(x.shape[0] // ranks, ranks)
    total = combine(x, ids, axis_name=parallel.AXIS, num_local_experts=1)
    return jnp.tile(total, (ranks, 1))


def trace(exchange: str, folder: Path) -> int:
    """A trace that opens in Perfetto, of a layer of 128 tokens."""
    mesh = _mesh()
    inputs = parallel.make_inputs(mesh, 128, FULL if jax.default_backend() == "gpu" else REDUCED)
    layer = parallel.over_ranks(jax_moe.expert_parallel(mesh, parallel.AXIS, exchange=exchange))
    inputs = parallel.routing(inputs)
    jax.block_until_ready(layer(inputs))
    with jax.profiler.trace(str(folder / "trace"), create_perfetto_trace=True):
        for _ in range(3):
            jax.block_until_ready(layer(inputs))
    return 0


def _say(**found: Any) -> None:
    print(json.dumps({"ranks": jax.device_count()} | found), flush=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.parallel_gpus")
    parser.add_argument("--output", type=Path, default=Path("out/parallel_gpus"))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", default="", help="steps whose name holds this")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.step:
        return run_all(steps_of(args.output, args.only), args.output, args.minutes)
    environment.prepare_process()
    what, *rest = args.step
    if what == "check":
        return check(*rest)
    if what == "primitives":
        return primitives()
    if what == "trace":
        return trace(rest[0], args.output)
    ranks = jax.device_count()
    folder = args.output / f"layer_{rest[0]}"
    return parallel.execute(ranks, (int(rest[0]),), parallel.exchanges_on(ranks), folder)


if __name__ == "__main__":
    sys.exit(main())
