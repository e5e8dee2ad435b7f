"""The layer over N devices: its time, that of the slowest rank's local work, and what is between.

    python bench_main.py --ranks=4
    python -m bench.parallel --ranks=1 --tokens=64,4096     # also: what the layer adds to `apply`
    python -m bench.parallel --local-of=4,8,16              # one device: a rank's local work

Calls run in a loop inside one program, each depending on the one before, over several routings, so
that neither the host nor a repeated routing is measured. Times are those of the host, of the whole
program, which ends with its slowest rank; L2 is warm. On CPU devices they mean nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe
from bench import environment, tables
from bench.failures import one_line
from bench.workloads import FULL, REDUCED, Sizes, token_counts
from interop import plot_style
from jax_moe import ExpertWeights, LayerInputs
from jax_moe.io.files import write_atomically
from pallas_kernels.tuning.command import positive

AXIS = "expert"
TOKENS, FEW_TOKENS = (1, 8, 32, 128, 1024, 4096, 8192), (1, 17)
FACTOR = 2.5
_ROUTINGS = 4
_REPEATS = 5
_MOST_ERROR = 0.01  # of bf16 partial sums, rounded once more than one device rounds them


class Row(NamedTuple):
    """One measurement.

    Attributes:
        ranks: N.
        tokens: T of each rank.
        exchange: Its name, or "none" for local work alone.
        layer_us: Median of a call.
        local_us: Median of the slowest rank's local work on the same tokens.
        error: Against the sum of the ranks' local work, relative, in the Frobenius norm.
        problem: Why there is nothing else.
    """

    ranks: int
    tokens: int
    exchange: str
    layer_us: float | None = None
    local_us: float | None = None
    error: float | None = None
    problem: str = ""


def make_inputs(
    mesh: jax.sharding.Mesh, num_tokens: int, sizes: Sizes, experts: int | None = None
) -> LayerInputs:
    """Made where they belong, rank by rank: even routing, Gaussian weights, FP8 rows.

    `routing_logits` are those of several routings, f32[R,N*T,E]; `routing` picks one.

    Args:
        mesh: Of the ranks.
        num_tokens: T of each.
        sizes: E, H and I.
        experts: Of each rank; None shares E among them.
    """
    (_, _, *specs, _), _ = jax_moe.partition_specs(AXIS)
    ranks, (hidden, inner) = mesh.devices.size, (sizes.hidden_size, sizes.intermediate_size)
    experts = sizes.num_experts // ranks if experts is None else experts
    blocks = hidden // 128, inner // 128

    def rank() -> Any:
        key = jax.random.fold_in(jax.random.key(0), lax.axis_index(AXIS))

        def normal(index: int, *shape: int) -> Any:
            return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.bfloat16)

        def e4m3(index: int, *shape: int) -> Any:
            keys = jax.random.split(jax.random.fold_in(key, index), shape[0])
            return lax.map(
                lambda one: jax.random.normal(one, shape[1:], jnp.bfloat16).astype(
                    jnp.float8_e4m3fn
                ),
                keys,
            )  # one expert at a time is in bf16

        logits = normal(0, _ROUTINGS, num_tokens, sizes.num_experts).astype(jnp.float32)
        return (
            logits,
            normal(1, num_tokens, hidden).astype(jnp.float8_e4m3fn),
            jnp.full((blocks[0], num_tokens), 0.05),
            e4m3(2, experts, 2 * inner, hidden),
            jnp.full((experts, 2 * blocks[1], blocks[0]), 0.02),
            e4m3(3, experts, hidden, inner),
            jnp.full((experts, *blocks), 0.02),
        )

    out_specs = (P(None, AXIS), *specs)
    make = jax.shard_map(rank, mesh=mesh, in_specs=(), out_specs=out_specs, check_vma=False)
    logits, x, scale, *weights = jax.jit(make)()
    everywhere = NamedSharding(mesh, P())
    bias = jax.device_put(np.zeros(sizes.num_experts, np.float32), everywhere)
    factor = jax.device_put(np.float32(FACTOR), everywhere)
    return LayerInputs(logits, bias, x, scale, ExpertWeights(*weights), 0, factor)


def routing(inputs: LayerInputs, index: Any = 0) -> LayerInputs:
    """The same with one of the routings."""
    logits = lax.dynamic_index_in_dim(inputs.routing_logits, index, 0, keepdims=False)
    return inputs._replace(routing_logits=logits)


def over_ranks(layer: Callable[..., Any]) -> Callable[[LayerInputs], Any]:
    """What takes all arguments but the offset, which each rank has of its own."""

    def call(inputs: LayerInputs) -> Any:
        *arrays, _, factor = inputs.arguments
        return layer(*arrays, factor)

    return call


def looped(layer: Callable[[LayerInputs], Any], calls: int) -> Any:
    """A program of `calls` calls, each after the one before."""

    def program(inputs: LayerInputs) -> Any:
        def step(i: Any, bias: Any) -> Any:
            out = layer(routing(inputs, i % _ROUTINGS)._replace(routing_bias=bias))
            return bias + 0.0 * out.ravel()[0].astype(jnp.float32)

        return lax.fori_loop(0, calls, step, inputs.routing_bias)

    return jax.jit(program)


def microseconds(layer: Callable[[LayerInputs], Any], inputs: LayerInputs, calls: int) -> float:
    """Median time of a call."""
    program = looped(layer, calls).lower(inputs).compile()
    jax.block_until_ready(program(inputs))
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(program(inputs))
        found.append((time.perf_counter() - start) / calls * 1e6)
    return float(np.median(found))


def local_work(mesh: jax.sharding.Mesh) -> Callable[[LayerInputs], Any]:
    """`apply` of every rank on all ranks' tokens, which it has already: f32 [N,N*T,H]."""
    split, everywhere = P(AXIS), P()

    def rank(inputs: LayerInputs) -> Any:
        offset = lax.axis_index(AXIS) * inputs.weights.num_local_experts
        return jax_moe.apply(*inputs._replace(local_expert_offset=offset).arguments)[None]

    specs = LayerInputs.of(*(everywhere,) * 4, *(split,) * 4, everywhere, everywhere)
    return jax.shard_map(rank, mesh=mesh, in_specs=(specs,), out_specs=split, check_vma=False)


def gathered(mesh: jax.sharding.Mesh, inputs: LayerInputs) -> LayerInputs:
    """The same with all tokens on every device."""
    tokens = inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale
    logits, x, scale = jax.device_put(tokens, NamedSharding(mesh, P()))
    return inputs._replace(routing_logits=logits, hidden_states=x, hidden_states_scale=scale)


def measure(
    ranks: int, num_tokens: int, exchanges: Sequence[str], sizes: Sizes, calls: int
) -> list[Row]:
    """The layer by each exchange over the first `ranks` devices, checked and timed."""
    mesh = jax.make_mesh(
        (ranks,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:ranks]
    )
    inputs = make_inputs(mesh, num_tokens, sizes)
    whole = gathered(mesh, inputs)
    local = local_work(mesh)
    parts = jax.jit(lambda inputs: local(routing(inputs)).astype(jnp.float32).sum(axis=0))
    wanted = np.asarray(parts(whole), np.float32)
    local_us = microseconds(local, whole, calls)
    rows = []
    for name in exchanges:
        row = Row(ranks, num_tokens, name)
        try:
            layer = over_ranks(jax_moe.expert_parallel(mesh, AXIS, exchange=name))
            out = np.asarray(layer(routing(inputs)), np.float32)
            error = float(np.linalg.norm(out - wanted) / np.linalg.norm(wanted))
            row = row._replace(error=error)
            if not error <= _MOST_ERROR:
                rows.append(row._replace(problem="wrong"))  # a wrong result has no speed
                continue
            row = row._replace(layer_us=microseconds(layer, inputs, calls), local_us=local_us)
        except Exception as problem:
            row = row._replace(problem=one_line(problem))
        rows.append(row)
    return rows


def measure_local(of: int, num_tokens: int, sizes: Sizes, calls: int) -> Row:
    """One device as one rank of `of`: `apply` on all N*T slots with E/N experts."""
    mesh = jax.make_mesh((1,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    inputs = make_inputs(mesh, of * num_tokens, sizes, sizes.num_experts // of)

    def layer(inputs: LayerInputs) -> Any:
        return jax_moe.apply(*inputs._replace(local_expert_offset=0).arguments)

    return Row(of, num_tokens, "none", local_us=microseconds(layer, inputs, calls))


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as text: efficiency is local work over layer."""
    cells = [
        ["exchange", "ranks", "T", "layer us", "local us", "between us", "efficiency", "error"]
    ]
    for row in rows:
        between = share = "-"
        if row.layer_us is not None and row.local_us is not None:
            between = f"{row.layer_us - row.local_us:.1f}"
            share = f"{row.local_us / row.layer_us:.3f}"
        numbers = [f"{v:.1f}" if v is not None else "-" for v in (row.layer_us, row.local_us)]
        error = "-" if row.error is None else f"{row.error:.5f}"
        cells.append(
            [row.exchange, str(row.ranks), str(row.tokens), *numbers, between, share, error]
        )
    problems = [f"{row.exchange} T={row.tokens}: {row.problem}" for row in rows if row.problem]
    return [*tables.aligned(cells), *problems]


def write(rows: Sequence[Row], folder: Path) -> None:
    """`parallel.json`, and `parallel.png` where layers were timed."""
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / "parallel.json", "w") as file:
        json.dump(
            {"about": environment.about(), "rows": [row._asdict() for row in rows]}, file, indent=1
        )
    timed = [row for row in rows if row.layer_us is not None and row.local_us is not None]
    if not timed:
        return
    figure = plot_style.figure(8, 5)
    axes = figure.subplots()
    for name in dict.fromkeys(row.exchange for row in timed):
        mine = [row for row in timed if row.exchange == name]
        ratio = [row.layer_us / row.local_us for row in mine if row.layer_us and row.local_us]
        axes.plot([row.tokens for row in mine], ratio, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of each rank")
    axes.set_ylabel("layer over the slowest rank's local work")
    axes.set_title(f"{timed[0].ranks} x {jax.devices()[0].device_kind}")
    axes.legend()
    with write_atomically(folder / "parallel.png", "wb") as picture:
        figure.savefig(picture, format="png", dpi=130)


def execute(
    ranks: int, tokens: Sequence[int], exchanges: Sequence[str], folder: Path, local_of: Any = ()
) -> int:
    """Measures, prints, writes; returns the exit code.

    Raises:
        ValueError: There are fewer devices than ranks, or the experts do not fit them.
    """
    on_gpu = jax.default_backend() == "gpu"
    sizes = FULL if on_gpu else REDUCED
    if len(jax.devices()) < ranks:
        raise ValueError(f"--ranks: expected at most {len(jax.devices())} devices, got {ranks}")
    if sizes.num_experts % ranks:
        raise ValueError(f"--ranks: expected a divisor of {sizes.num_experts} experts, got {ranks}")
    if not on_gpu:
        print("CPU devices at reduced size: results are checked, times mean nothing", flush=True)
    rows: list[Row] = []
    for num_tokens in tokens or (TOKENS if on_gpu else FEW_TOKENS):
        calls = 2 if not on_gpu else 40 if num_tokens <= 128 else 20 if num_tokens <= 1024 else 8
        if local_of:
            rows += [measure_local(of, num_tokens, sizes, calls) for of in local_of]
        else:
            rows += measure(ranks, num_tokens, exchanges, sizes, calls)
        print(f"T={num_tokens} done", flush=True)
        write(rows, folder)
    print("\n".join(table(rows)))
    print(f"wrote {folder / 'parallel.json'}")
    return 1 if any(row.problem for row in rows) else 0


def run(ranks: int, folder: Path | None) -> int:
    """What `bench_main.py --ranks` does: every exchange that these devices have.

    Args:
        ranks: How many devices.
        folder: Of the results; None is `out/parallel`.

    Returns:
        The exit code: 1 if a result is wrong or failed.
    """
    devices_for(ranks)
    environment.enable_compilation_cache()
    return execute(ranks, (), exchanges_on(ranks), folder or Path("out/parallel"))


def devices_for(ranks: int) -> None:
    """Where there is no GPU, as many CPU devices; before JAX has started any."""
    if not environment.has_gpu_driver():
        jax.config.update("jax_num_cpu_devices", ranks)


def exchanges_on(ranks: int) -> tuple[str, ...]:
    """What can be measured there."""
    on_gpu = jax.default_backend() == "gpu"
    return ("collectives", "nvlink") if on_gpu and ranks > 1 else ("collectives",)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.parallel")
    parser.add_argument("--ranks", type=positive, default=1)
    parser.add_argument("--tokens", type=token_counts, default=())
    parser.add_argument("--exchanges", type=lambda text: tuple(text.split(",")))
    parser.add_argument("--local-of", type=token_counts, default=())
    parser.add_argument("--output", type=Path, default=Path("out/parallel"))
    args = parser.parse_args(argv)
    devices_for(args.ranks)
    environment.enable_compilation_cache()
    exchanges = args.exchanges or exchanges_on(args.ranks)
    try:
        return execute(args.ranks, args.tokens, exchanges, args.output, args.local_of)
    except ValueError as error:
        print(f"python -m bench.parallel: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    environment.prepare_process()
    sys.exit(main())
