"""The layer over N devices: its time, that of the slowest rank's local work, and what is between.

    python bench_main.py --ranks=4
    python -m bench.parallel --ranks=1 --tokens=64,4096     # also: what the layer adds to `apply`
    python -m bench.parallel --local-of=4,8,16              # one device: a rank's local work

Calls run in a loop inside one program, each depending on the one before, over several routings, so
that neither the host nor a repeated routing is measured. Times are those of the host, of the whole
program, which ends with its slowest rank; L2 is warm. On CPU devices they mean nothing.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe
from bench import commands, environment, parallel_rows, steps
from bench.failures import one_line, writing
from bench.parallel_inputs import (
    AXIS,
    NUM_ROUTINGS,
    ROUTINGS,
    busiest_share,
    draw,
    gathered,
    input_maker,
    input_specs,
    make_inputs,
    mesh_of,
    pieces_run,
    routing,
    with_routing,
)
from bench.parallel_rows import EXCHANGES, Row
from bench.workloads import FULL, REDUCED, Sizes, token_counts
from interop.arguments import up_to
from jax_moe import DEEPSEEK_V3, LayerInputs
from jax_moe.io.files import shown
from pallas_kernels import interruption

TOKENS, FEW_TOKENS = (1, 8, 32, 128, 1024, 4096, 8192), (1, 17)
ROOT, FILES = "out/parallel", ("parallel.json", "parallel.png")
MOST_ERROR = 0.01  # of bf16 partial sums, rounded once more than one device rounds them
_REPEATS = 5

Layer = Callable[[LayerInputs], Any]


class Case(NamedTuple):
    """What one number of tokens is measured by.

    Attributes:
        exchanges: By name, those that may hang last.
        pieces: Numbers of them; fewer are run where T has no cut into so many of one size.
        routings: Of `bench.parallel_inputs.ROUTINGS`.
    """

    exchanges: Sequence[str]
    pieces: Sequence[int] = (1,)
    routings: Sequence[str] = ("even",)


class _Program(NamedTuple):
    """A layer, compiled.

    Attributes:
        row: What it is; with a problem if it could not be compiled.
        once: One call.
        loop: Many.
    """

    row: Row
    once: Any = None
    loop: Any = None


def over_ranks(layer: Callable[..., Any]) -> Layer:
    """What takes all arguments but the offset, which each rank has of its own."""

    def call(inputs: LayerInputs) -> Any:
        *arrays, _, factor = inputs.arguments
        return layer(*arrays, factor)

    return call


def exchanged(mesh: jax.sharding.Mesh, exchange: str, num_tokens: int, pieces: int = 1) -> Layer:
    """The layer by an exchange, in so many pieces.

    Args:
        mesh: Of the ranks.
        exchange: Its name.
        num_tokens: T of each rank.
        pieces: Into which they are divided.
    """
    rows = mesh.devices.size * -(-num_tokens // pieces)
    return over_ranks(jax_moe.expert_parallel(mesh, AXIS, exchange=exchange, max_rows_at_once=rows))


def once(layer: Layer, specs: LayerInputs) -> Any:
    """The program of one call, of the first routing."""
    return jax.jit(lambda inputs: layer(routing(inputs))).lower(specs).compile()


def looped(layer: Layer, calls: int, specs: LayerInputs, ranks: int) -> Any:
    """The program of `calls` calls, each after the one before.

    What a rank has computed goes into a scale of its own weights, times zero: so its next call
    waits for it, and for no other rank unless the layer itself does.
    """

    def program(inputs: LayerInputs) -> Any:
        def step(i: Any, scale: Any) -> Any:
            weights = inputs.weights._replace(gemm1_weights_scale=scale)
            out = layer(routing(inputs, i % NUM_ROUTINGS)._replace(weights=weights))
            first = out.reshape(ranks, -1)[:, :1].astype(scale.dtype)
            return (scale.reshape(ranks, -1) + 0.0 * first).reshape(scale.shape)

        return lax.fori_loop(0, calls, step, inputs.weights.gemm1_weights_scale)

    return jax.jit(program).lower(specs).compile()


def microseconds(program: Any, argument: Any, calls: int) -> float:
    """Median time of one of the calls of a compiled program."""
    jax.block_until_ready(program(argument))
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(program(argument))
        found.append((time.perf_counter() - start) / calls * 1e6)
    return float(np.median(found))


def local_work(mesh: jax.sharding.Mesh) -> Layer:
    """`apply` of every rank on all ranks' tokens, which it has already: bf16[N,N*T,H]."""
    split, everywhere = P(AXIS), P()

    def rank(inputs: LayerInputs) -> Any:
        offset = lax.axis_index(AXIS) * inputs.weights.num_local_experts
        return jax_moe.apply(*inputs._replace(local_expert_offset=offset).arguments)[None]

    specs = LayerInputs.of(*(everywhere,) * 4, *(split,) * 4, everywhere, everywhere)
    return jax.shard_map(rank, mesh=mesh, in_specs=(specs,), out_specs=split, check_vma=False)


class Oracle:
    """The sum over the ranks' local work, and how far a result is from it; compiled when made.

    Args:
        mesh: Of the ranks.
        specs: Of the inputs.
    """

    def __init__(self, mesh: jax.sharding.Mesh, specs: LayerInputs) -> None:
        local, split = local_work(mesh), NamedSharding(mesh, P(AXIS))

        def total(inputs: LayerInputs) -> Any:
            return local(routing(inputs)).astype(jnp.float32).sum(axis=0)

        def distance(out: Any, wanted: Any) -> Any:
            return jnp.linalg.norm(out.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)

        x = specs.hidden_states
        outs = [
            jax.ShapeDtypeStruct(x.shape, dtype, sharding=split)
            for dtype in (jnp.bfloat16, jnp.float32)
        ]
        whole = gathered(mesh, specs)
        self.total = jax.jit(total, out_shardings=split).lower(whole).compile()
        self._distance = jax.jit(distance).lower(*outs).compile()

    def error(self, out: Any, wanted: Any) -> float:
        """Relative, in the Frobenius norm."""
        return float(self._distance(out, wanted))


def measure(ranks: int, num_tokens: int, case: Case, sizes: Sizes, calls: int) -> Iterator[Row]:
    """The layer over the first `ranks` devices, checked and timed.

    Everything is compiled first; then, in the turn of this process, inputs are made and run.

    Args:
        ranks: N.
        num_tokens: T of each.
        case: Exchanges, pieces, routings.
        sizes: E, H and I.
        calls: Of a loop.

    Yields:
        A row as soon as it is known.
    """
    mesh = mesh_of(ranks)
    specs = input_specs(mesh, num_tokens, sizes)
    oracle = Oracle(mesh, specs)
    local_loop = looped(local_work(mesh), calls, gathered(mesh, specs), ranks)
    programs = [
        _compiled(mesh, Row(ranks, num_tokens, name, pieces=pieces), specs, calls)
        for name in case.exchanges
        for pieces in pieces_run(num_tokens, case.pieces)
    ]
    drawn = {name: draw(name, ranks * num_tokens, sizes.num_experts) for name in case.routings}
    make = input_maker(mesh, num_tokens, sizes)
    killed = steps.wait_for_turn()
    made = make()
    routed = {name: with_routing(made, one, mesh) for name, one in drawn.items()}
    wanted: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for name, inputs in routed.items():
        whole = gathered(mesh, inputs)
        wanted[name] = oracle.total(whole)
        known[name] = {
            "routing": name,
            "local_us": microseconds(local_loop, whole, calls),
            "busiest": busiest_share(inputs, ranks),
        }
    for program in programs:
        if f"check_{program.row.exchange}" in killed:
            program = _Program(program.row._replace(problem="left out: its check was killed"))
        for name, inputs in routed.items():
            row = program.row._replace(**known[name])
            yield _measured(row, program, inputs, oracle, wanted[name], calls)


def _compiled(mesh: jax.sharding.Mesh, row: Row, specs: LayerInputs, calls: int) -> _Program:
    try:
        layer = exchanged(mesh, row.exchange, row.tokens, row.pieces)
        return _Program(row, once(layer, specs), looped(layer, calls, specs, row.ranks))
    except Exception as problem:
        return _Program(row._replace(problem=one_line(problem)))


def _measured(
    row: Row, program: _Program, inputs: LayerInputs, oracle: Oracle, wanted: Any, calls: int
) -> Row:
    if row.problem:
        return row
    try:
        row = row._replace(error=oracle.error(program.once(inputs), wanted))
        if row.error is None or not row.error <= MOST_ERROR:
            return row._replace(problem="wrong")  # a wrong result has no speed
        return row._replace(layer_us=microseconds(program.loop, inputs, calls))
    except Exception as problem:
        return row._replace(problem=one_line(problem))


def measure_local(of: int, num_tokens: int, sizes: Sizes, calls: int) -> Row:
    """One device as one rank of `of`: `apply` on all N*T slots with E/N experts."""
    inputs = make_inputs(mesh_of(1), of * num_tokens, sizes, sizes.num_experts // of)

    def layer(inputs: LayerInputs) -> Any:
        return jax_moe.apply(*inputs._replace(local_expert_offset=0).arguments)

    local_us = microseconds(looped(layer, calls, inputs, 1), inputs, calls)
    return Row(of, num_tokens, "none", local_us=local_us)


def execute(ranks: int, tokens: Sequence[int], case: Case, folder: Path, local_of: Any = ()) -> int:
    """Measures, prints, writes as it goes; returns the exit code.

    Raises:
        ValueError: There are fewer devices than ranks, or the experts do not divide among them.
        FileError: A file cannot be written; names it.
    """
    on_gpu = environment.default_backend() == "gpu"
    sizes = FULL if on_gpu else REDUCED
    if len(jax.devices()) < ranks:
        raise ValueError(f"--ranks: expected at most {len(jax.devices())} devices, got {ranks}")
    if sizes.num_experts % ranks:
        raise ValueError(f"--ranks: expected a divisor of {sizes.num_experts} experts, got {ranks}")
    for of in local_of:
        if sizes.num_experts % of:
            raise ValueError(
                f"--local-of: expected divisors of {sizes.num_experts} experts, got {of}"
            )
    about = environment.about(sizes.over(ranks), are_checked=not local_of) | {
        "config": str(DEEPSEEK_V3),
        "exchanges": jax_moe.describe_exchange(mesh_of(ranks), AXIS),
    }
    if local_of:  # a row's ranks say which it has
        about["sizes"]["num_local_experts"] = [sizes.num_experts // of for of in local_of]
    if not on_gpu:
        print(about["note"], flush=True)
    rows: list[Row] = []
    with commands.shown_if_cut_short(lambda: parallel_rows.table(rows)):
        for num_tokens in tokens or (TOKENS if on_gpu else FEW_TOKENS):
            calls = 40 if num_tokens <= 128 else 20 if num_tokens <= 1024 else 8
            calls = calls if on_gpu else 2
            found: Iterator[Row]
            if local_of:
                found = (measure_local(of, num_tokens, sizes, calls) for of in local_of)
            else:
                found = measure(ranks, num_tokens, case, sizes, calls)
            for row in found:
                rows.append(row)
                parallel_rows.write(rows, about | {"complete": False}, folder / "parallel.json")
                interruption.check()
            print(f"T={num_tokens} done", flush=True)
        parallel_rows.write(rows, about | {"complete": True}, folder / "parallel.json")
    print("\n".join(parallel_rows.table(rows)))
    print(f"wrote {shown(folder / 'parallel.json')}")
    with writing(folder / "parallel.png"):
        if parallel_rows.plot(rows, about, folder / "parallel.png"):
            print(f"wrote {shown(folder / 'parallel.png')}")
    return 1 if any(row.problem for row in rows) else 0


def run(ranks: int, folder: Path) -> int:
    """What `bench_main.py --ranks` does: every exchange that these devices have.

    Args:
        ranks: How many devices.
        folder: Of the results.

    Returns:
        The exit code: 1 if a result is wrong or failed.
    """
    devices_for(ranks)
    environment.enable_compilation_cache()
    return execute(ranks, (), Case(exchanges_on(ranks)), folder)


def devices_for(ranks: int) -> None:
    """Where there is no GPU, as many CPU devices; before JAX has started any.

    At most one per expert: more are refused later, and JAX would start thousands for minutes.
    """
    if not environment.has_gpu_driver():
        jax.config.update("jax_num_cpu_devices", min(ranks, REDUCED.num_experts))


def exchanges_on(ranks: int) -> tuple[str, ...]:
    """What can be measured there."""
    on_gpu = environment.default_backend() == "gpu"
    return ("collectives", "nvlink") if on_gpu and ranks > 1 else ("collectives",)


def _check_exchanges(names: Sequence[str], ranks: int) -> None:
    """Refuses what cannot run on these devices; too few of them are refused later."""
    try:
        for name in names if ranks <= len(jax.devices()) else ():
            exchanged(mesh_of(ranks), name, num_tokens=1)
    except NotImplementedError as error:
        raise ValueError(f"--exchanges: {error}") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = commands.parser("bench.parallel", __doc__)
    parser.add_argument("--ranks", type=up_to(FULL.num_experts), default=1, help="one per device")
    parser.add_argument("--tokens", type=token_counts, default=(), help="of each rank, by commas")
    parser.add_argument("--exchanges", type=_names, help=f"some of {', '.join(EXCHANGES)}")
    parser.add_argument(
        "--pieces", type=token_counts, default=(1,), help="fewer where T has no cut into so many"
    )
    parser.add_argument("--routings", type=_names, default=("even",))
    parser.add_argument("--local-of", type=token_counts, default=())
    commands.add_output(parser, ROOT)
    args = parser.parse_args(argv)
    for flag, names, known in (
        ("exchanges", args.exchanges or (), EXCHANGES),
        ("routings", args.routings, ROUTINGS),
    ):
        if unknown := [name for name in names if name not in known]:
            got = ", ".join(map(repr, unknown))
            parser.error(f"--{flag}: expected some of {', '.join(known)}, got {got}")
    for flag in ("ranks", "exchanges", "pieces", "routings"):
        if args.local_of and getattr(args, flag) != parser.get_default(flag):
            parser.error(
                f"--local-of: reads --tokens, --output, --overwrite alone, got --{flag} too"
            )
    devices_for(args.ranks)
    try:
        environment.enable_compilation_cache()
        _check_exchanges(args.exchanges or (), args.ranks)
        case = Case(args.exchanges or exchanges_on(args.ranks), args.pieces, args.routings)
        with commands.results(args.output, ROOT, FILES, overwrite=args.overwrite) as folder:
            return execute(args.ranks, args.tokens, case, folder, args.local_of)
    except ValueError as error:
        print(f"python -m bench.parallel: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    environment.prepare_process()
    interruption.exit_with(main)
