"""What each option costs: routers, scale formats, the clamp, precision, batch invariance.

    python -m bench.options
    python -m bench.options --workloads=1,16,80 --jobs=12 --variants=e4m3,bf16

Every variant runs on the same weights, tokens and logits in one process, by the clock of the
benchmark: GPU span, cold L2. Three tables come of it:

    layer      `jax_moe.apply` with one option, against the float32 oracle
    route      the router alone, by score and with or without a bias
    quantize   bf16 rows to FP8, by scale format

`vs` is the time over that of the first variant of its table with the same hidden states, if that
was measured too. `equal` is the share of elements within flashinfer-bench's default tolerances,
rtol = atol = 0.01; of a router the share of ids that are backend xla's; of the quantizer that of
bytes that are xla's on a CPU: on a GPU XLA divides to within 2 ulp only. On a CPU times mean
nothing.
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable
from jaxtyping import Array, PyTree

import jax_moe
from bench import (
    ahead,
    commands,
    correctness,
    environment,
    gpu_clock,
    inputs,
    routing,
    timers,
)
from bench.correctness import Tolerance
from bench.execution import compiled_program
from bench.failures import one_line
from bench.option_rows import Row, table, with_ratios, write
from bench.option_variants import VARIANTS, Variant, chosen_variants, variant_names
from bench.timers import Execution
from bench.workloads import FULL, REDUCED, WORKLOADS, Sizes, select
from interop.arguments import comma_separated, natural
from interop.processes import spawned
from interop.workloads import Workload
from jax_moe import DEEPSEEK_V3, LayerInputs, backends
from jax_moe.io.files import shown
from pallas_kernels import interruption

USUAL, FEW = ("1", "16", "80", "901", "14107"), ("1", "7")
ROOT, FILES = "out/options", ("options.json", "options.md")
_DEFAULT = Tolerance(rtol=0.01, atol=0.01, required_matched_ratio=0.0)
ORACLE = "oracle"
_SEED, _ITERATIONS = 0, 20


def function(variant: Variant, backend: str) -> Callable[[LayerInputs], PyTree[Array]]:
    """The call of a variant, of the layer's inputs; backend `ORACLE` is what it is held against."""
    if backend == ORACLE:
        return oracle(variant)
    options = variant.options

    def layer(given: LayerInputs) -> Array:
        return jax_moe.apply(*given.arguments, backend=backend, **options)

    def route(given: LayerInputs) -> Any:
        config = dataclasses.replace(DEEPSEEK_V3, **variant.router)
        bias = given.routing_bias if variant.bias else None
        logits, factor = given.routing_logits, given.routed_scaling_factor
        return jax_moe.route(logits, bias, factor, config=config, backend=backend)

    def quantize(given: LayerInputs) -> Any:
        return jax_moe.quantize(given.hidden_states, backend=backend, **options)

    return {"layer": layer, "route": route, "quantize": quantize}[variant.stage]


def oracle(variant: Variant) -> Callable[[LayerInputs], PyTree[Array]]:
    """What it is compared with: the float32 oracle, or the stage of backend xla."""
    if variant.stage != "layer":
        return function(variant, "xla")
    return lambda given: jax_moe.reference(*given.arguments, **variant.options)


def question(variant: Variant) -> Variant:
    """What the oracle sees of a variant: layers that differ in precision alone share an answer."""
    if variant.stage != "layer":
        return variant
    seen = {name: one for name, one in variant.options.items() if name == "swiglu_limit"}
    return Variant("layer", ORACLE, seen, dtype=variant.dtype)


def make_inputs(
    workload: Workload, sizes: Sizes, weights: jax_moe.ExpertWeights
) -> dict[str, LayerInputs]:
    """The inputs of a workload, with hidden states in e4m3 and in bf16, which are other numbers."""
    drawn = routing.draw(workload, sizes, _SEED)
    e4m3 = inputs.head(
        inputs.make_arguments("realistic", workload, sizes, _SEED, 0, weights, drawn),
        workload.num_tokens,
    )
    shape = e4m3.hidden_states.shape
    rows = jax.random.normal(jax.random.key(_SEED), shape, jnp.bfloat16)
    return {"e4m3": e4m3, "bf16": e4m3._replace(hidden_states=rows, hidden_states_scale=None)}


class Order(NamedTuple):
    """One program.

    Attributes:
        variant: What is called; for `ORACLE` a variant's `question`.
        backend: What runs it.
        given: On what.
    """

    variant: Variant
    backend: str
    given: LayerInputs


def orders_of(
    given: Mapping[str, LayerInputs], backend: str, variants: Sequence[Variant] = VARIANTS
) -> list[Order]:
    """Each variant on the inputs of its dtype, right after the oracle's answer that it needs."""
    questions: list[Variant] = []
    orders = []
    for variant in variants:
        if (asked := question(variant)) not in questions:
            questions.append(asked)
            orders.append(Order(asked, ORACLE, given[asked.dtype]))
        orders.append(Order(variant, backend, given[variant.dtype]))
    return orders


def compiled(orders: Sequence[Order], jobs: int) -> Generator[Any, None, None]:
    """Compiles programs in `jobs` processes, one in each, and more once those are taken.

    So a row is measured and written before the programs of later ones are compiled, and no process
    compiles meanwhile.

    Args:
        orders: What to compile.
        jobs: How many processes; 0 compiles nothing.

    Yields:
        In order, what `serialize_executable.deserialize_and_load` takes, or what went wrong, or
        None: to be compiled here.
    """
    if not jobs:
        yield from [None] * len(orders)
        return
    number = itertools.count(1)
    with spawned(min(jobs, len(orders)), ahead.start) as pool:
        for batch in itertools.batched(orders, jobs):
            pending = {_submitted(pool, one): one for one in batch}
            for _ in futures.as_completed(pending):
                left = [_name(one) for future, one in pending.items() if not future.done()]
                still = f", left: {'; '.join(left)}" if left else ""
                print(f"{next(number)} of {len(orders)} programs compiled{still}", flush=True)
            yield from [program.exception() or program.result() for program in pending]


def _submitted(pool: futures.Executor, order: Order) -> futures.Future[Any]:
    try:
        return pool.submit(_compile, *order._replace(given=specs_of(order.given)))
    except BrokenProcessPool as error:  # by an earlier program
        failed: futures.Future[Any] = futures.Future()
        failed.set_exception(error)
        return failed


def loaded(order: Order, program: tuple[Any, ...] | Exception | None) -> Callable[..., Any]:
    """The program of an order, from `compiled`; None compiles here.

    Raises:
        Exception: What went wrong there.
    """
    if isinstance(program, Exception):
        raise program
    if program is None:
        return jax.jit(function(order.variant, order.backend))
    return serialize_executable.deserialize_and_load(*program)


def _compile(variant: Variant, backend: str, specs: LayerInputs) -> tuple[Any, ...] | None:
    return compiled_program(jax.jit(function(variant, backend)).lower(specs).compile()).serialized


def specs_of(given: LayerInputs) -> LayerInputs:
    """The inputs' shapes and dtypes."""
    return jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), given)


def measure(
    order: Order,
    program: tuple[Any, ...] | Exception | None,
    expected: PyTree[Array] | Exception,
    *,
    clock: gpu_clock.GpuClock | None,
    iterations: int,
) -> Row:
    """Checks and times one variant.

    Args:
        order: What to call.
        program: From `compiled`; None compiles here.
        expected: The oracle's answer, or why there is none.
        clock: The GPU's; None takes the host's times.
        iterations: Timed calls.
    """
    variant, given = order.variant, order.given
    row = Row(variant.stage, variant.name, given.tokens)
    try:
        run = loaded(order, program)
        found = jax.block_until_ready(run(given))
        if isinstance(expected, Exception):
            raise expected
        row = row._replace(**_compared(variant.stage, found, expected))
        bound = Execution(lambda: run(given), jax.block_until_ready, "jit", None)
        timers.warm_up(bound, 3)
        if clock:
            times = [sample.span_us for sample in clock.time(bound, iterations)]
        else:
            times = timers.wall_times(bound, iterations)
        us = timers.statistics_of(times)
        return row._replace(us=us.median, p10=us.p10, p90=us.p90)
    except Exception as problem:
        return row._replace(problem=one_line(problem))


def answer(order: Order, program: tuple[Any, ...] | Exception | None) -> PyTree[Array] | Exception:
    """What an oracle says, or why it says nothing."""
    given: Any = order.given
    try:
        if order.variant.stage == "quantize":
            cpu = jax.devices("cpu")[0]
            program, given = None, jax.device_put(given._replace(weights=None), cpu)
            return jax.device_get(loaded(order, program)(given))
        return jax.block_until_ready(loaded(order, program)(given))
    except Exception as problem:
        return problem


def _compared(stage: str, found: Any, expected: Any) -> dict[str, Any]:
    if stage == "layer":
        check = correctness.check(found, expected, _DEFAULT)
        return {"error": check.relative_error, "equal": check.matched_ratio}
    if stage == "route":
        worst = jnp.abs(found.topk_weights / expected.topk_weights - 1).max()
        equal = (found.topk_ids == expected.topk_ids).mean()
        return {"error": float(worst), "equal": float(equal)}
    same = [
        (jax.lax.bitcast_convert_type(a, kind) == jax.lax.bitcast_convert_type(b, kind)).mean()
        for a, b, kind in zip(found, expected, (jnp.uint8, jnp.uint32), strict=True)
    ]
    return {"equal": float(min(same))}


def _name(order: Order) -> str:
    what = f"{order.variant.stage} {order.variant.name}, T={order.given.tokens}"
    return f"{what}, for the check" if order.backend == ORACLE else what


def run(
    workloads: Sequence[str], backend: str, jobs: int, folder: Path, names: Sequence[str] = ()
) -> int:
    """Measures, prints and writes.

    Args:
        workloads: Token counts or uuids; empty for the usual ones.
        backend: What runs the variants.
        jobs: Processes that compile, so many programs at a time; 0 compiles variant by variant.
        folder: Of the results.
        names: Of variants, or how they begin; all if there are none.

    Returns:
        The exit code: 1 if something failed.
    """
    variants = chosen_variants(names)
    on_gpu = environment.default_backend() == "gpu"
    sizes = FULL if on_gpu else REDUCED
    backend = backends.select_for_call(backend, ())  # what "auto" means here
    about = environment.about(sizes) | {"backend": backend, "seed": _SEED}
    if not on_gpu:
        print(about["note"], flush=True)
    clock = None if gpu_clock.unavailable_reason() else gpu_clock.GpuClock()
    weights = inputs.draw_weights("realistic", sizes, _SEED)
    chosen = select(workloads or (USUAL if on_gpu else FEW), WORKLOADS)
    given = [make_inputs(row, sizes, weights) for row in chosen]
    by_tokens = [orders_of(one, backend, variants) for one in given]
    orders = [order for one in by_tokens for order in one]
    asked = len(variants) * len(given)
    rows: list[Row] = []
    with (
        commands.shown_if_cut_short(lambda: table(rows)),
        contextlib.closing(compiled(orders, jobs)) as programs,
    ):
        for of_tokens in by_tokens:
            answers: list[tuple[Variant, Any]] = []
            for order, program in zip(of_tokens, programs, strict=False):  # takes what it needs
                print(f"{len(rows) + 1} of {asked}: {_name(order)}", flush=True)
                if order.backend == ORACLE:
                    answers.append((order.variant, answer(order, program)))
                    interruption.check()
                    continue
                asking = question(order.variant)
                expected = next(said for one, said in answers if one == asking)
                iterations = _ITERATIONS if on_gpu else 1
                found = measure(order, program, expected, clock=clock, iterations=iterations)
                rows = with_ratios([*rows, found])
                write(rows, about, folder, asked)
                interruption.check()
    print("\n".join(table(rows)))
    print("\n".join(f"wrote {shown(folder / name)}" for name in FILES))
    return 1 if any(row.problem for row in rows) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = commands.parser("bench.options", __doc__)
    parser.add_argument(
        "--workloads", type=comma_separated, default=(), help="token counts, uuids, or all"
    )
    parser.add_argument(
        "--variants",
        type=variant_names,
        default=(),
        help='only those whose name begins with one of these, as in "e4m3, high" or bf16,sigmoid',
    )
    parser.add_argument("--backend", default="auto", choices=("auto", *backends.NAMES))
    parser.add_argument("--jobs", type=natural, default=0, help="processes that compile")
    commands.add_output(parser, ROOT)
    args = parser.parse_args(argv)
    environment.enable_compilation_cache()
    try:
        if args.backend != "auto" and (reason := backends.unsupported_reason(args.backend)):
            raise ValueError(f"--backend={args.backend}: {reason}")
        select(args.workloads or FEW)  # unknown names are refused while an earlier run is whole
        chosen_variants(args.variants)
        with commands.results(args.output, ROOT, FILES, overwrite=args.overwrite) as folder:
            return run(args.workloads, args.backend, args.jobs, folder, args.variants)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    environment.prepare_process()
    interruption.exit_with(main)
