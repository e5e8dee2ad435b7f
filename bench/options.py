"""What each option costs: routers, scale formats, the clamp, precision, batch invariance.

    python -m bench.options
    python -m bench.options --workloads=1,16,80 --jobs=12 --variants=e4m3,bf16

Every variant runs on the same weights, tokens and logits in one process, by the clock of the
benchmark: GPU span, cold L2. Three tables come of it:

    layer      `jax_moe.apply` with one option, against the float32 oracle
    route      the router alone, by score and with or without a bias
    quantize   bf16 rows to FP8, by scale format

`vs` is the time over that of the first variant of its table with the same hidden states. `equal` is
the share of elements within flashinfer-bench's default tolerances, rtol = atol = 0.01; of a router
the share of ids that are backend xla's; of the quantizer that of bytes that are xla's on a CPU: on
a GPU XLA divides to within 2 ulp only. On a CPU times mean nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable
from jaxtyping import Array, PyTree

import jax_moe
from bench import ahead, correctness, environment, gpu_clock, inputs, routing, tables, timers
from bench.commands import folder
from bench.correctness import Tolerance
from bench.execution import compiled_program
from bench.failures import one_line
from bench.option_variants import VARIANTS, Variant, chosen_variants
from bench.timers import Execution
from bench.workloads import FULL, REDUCED, WORKLOADS, Sizes, select
from interop import interruption
from interop.arguments import natural
from interop.markdown import wrapped
from interop.processes import spawned
from interop.workloads import Workload
from jax_moe import DEEPSEEK_V3, LayerInputs, backends
from jax_moe.io.files import write_atomically

USUAL, FEW = ("1", "16", "80", "901", "14107"), ("1", "7")
_DEFAULT = Tolerance(rtol=0.01, atol=0.01, required_matched_ratio=0.0)
ORACLE = "oracle"
_SEED, _ITERATIONS = 0, 20
_HEADER = ("stage", "variant", "T", "us", "vs", "error", "equal")


class Row(NamedTuple):
    """One measurement.

    Attributes:
        stage: Of the variant.
        variant: Its name.
        tokens: T.
        us: Median GPU span of a call; on a CPU the host's time.
        p10: 10th percentile of it.
        p90: 90th percentile.
        ratio: `us` over that of the first variant of its kind.
        error: Against the oracle, relative, in the Frobenius norm; of a router the worst relative
            difference of a weight; None for the quantizer.
        equal: Share of right elements, as the module says.
        problem: Why there is no time.
    """

    stage: str
    variant: str
    tokens: int
    us: float | None = None
    p10: float | None = None
    p90: float | None = None
    ratio: float | None = None
    error: float | None = None
    equal: float | None = None
    problem: str = ""


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
    """Each variant on the inputs of its dtype, then each different question to an oracle."""
    questions: list[Variant] = []
    for variant in variants:
        if question(variant) not in questions:
            questions.append(question(variant))
    asked = [(one, backend) for one in variants] + [(one, ORACLE) for one in questions]
    return [Order(variant, backend, given[variant.dtype]) for variant, backend in asked]


def compile_all(orders: Sequence[Order], jobs: int) -> list[Any]:
    """Compiles each program in one of `jobs` processes.

    Returns:
        In order, what `serialize_executable.deserialize_and_load` takes, or what went wrong.
    """
    with spawned(min(jobs, len(orders)), ahead.start) as pool:
        pending = [
            pool.submit(_compile, *one._replace(given=specs_of(one.given))) for one in orders
        ]
        for count, _ in enumerate(futures.as_completed(pending), start=1):
            left = [one for one, program in zip(orders, pending, strict=True) if not program.done()]
            still = f", left: {'; '.join(map(_name, left))}" if 0 < len(left) <= jobs else ""
            print(f"{count} of {len(orders)} programs compiled{still}", flush=True)
    return [one.exception() or one.result() for one in pending]


def loaded(order: Order, program: tuple[Any, ...] | Exception | None) -> Callable[..., Any]:
    """The program of an order, from `compile_all`; None compiles here.

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
        program: From `compile_all`; None compiles here.
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


def with_ratios(rows: Sequence[Row], variants: Sequence[Variant] = VARIANTS) -> list[Row]:
    """The rows, each over the first variant of its stage, hidden states and T."""
    dtypes = {(one.stage, one.name): one.dtype for one in variants}
    first: dict[Any, float] = {}
    found = []
    for row in rows:
        kind = (row.stage, dtypes[row.stage, row.variant], row.tokens)
        if row.us is not None:
            row = row._replace(ratio=row.us / first.setdefault(kind, row.us))
        found.append(row)
    return found


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as text, the header first."""
    return [list(_HEADER)] + [
        [
            row.stage,
            row.variant,
            str(row.tokens),
            "-" if row.us is None else f"{row.us:.1f}",
            "-" if row.ratio is None else f"{row.ratio:.3f}",
            "-" if row.error is None else f"{row.error:.2g}",
            row.problem or ("-" if row.equal is None else f"{row.equal:.4f}"),
        ]
        for row in rows
    ]


def _name(order: Order) -> str:
    what = f"{order.variant.stage} {order.variant.name}, T={order.given.tokens}"
    return f"{what}, for the check" if order.backend == ORACLE else what


def write(rows: Sequence[Row], about: Mapping[str, Any], folder: Path, asked: int) -> None:
    """`options.json` and, for people, `options.md`; both say if rows are left of those `asked`."""
    about = dict(about) | {"complete": len(rows) == asked}
    with write_atomically(folder / "options.json", "w") as file:
        json.dump({"about": about, "rows": [row._asdict() for row in rows]}, file, indent=1)
    head = (
        f"{about['device']['kind']}, backend `{about['backend']}`, commit {about['git_commit']}, "
        f"{environment.date(about['started'])}, `{about['command']}`."
    )
    beware = [f"**REDUCED sizes**: {about['note']}.", ""] if about["reduced"] else []
    if not about["complete"]:
        beware += [f"**Incomplete**: {len(rows)} of {asked} rows.", ""]
    table = tables.markdown(cells(rows), left=2)
    lines = ["# What each option costs", "", *beware, head, "", *table, ""]
    with write_atomically(folder / "options.md", "w") as file:
        file.write("\n".join(wrapped(lines)))


def run(
    workloads: Sequence[str], backend: str, jobs: int, folder: Path, names: Sequence[str] = ()
) -> int:
    """Measures, prints and writes.

    Args:
        workloads: Token counts or uuids; empty for the usual ones.
        backend: What runs the variants.
        jobs: Processes that compile; 0 compiles variant by variant.
        folder: Of the results.
        names: Of variants, or how they begin; all if there are none.

    Returns:
        The exit code: 1 if something failed.
    """
    variants = chosen_variants(names)
    environment.enable_compilation_cache()
    on_gpu = jax.default_backend() == "gpu"
    sizes = FULL if on_gpu else REDUCED
    about = environment.about(sizes) | {"backend": backend, "seed": _SEED}
    if not on_gpu:
        print(about["note"], flush=True)
    clock = None if gpu_clock.unavailable_reason() else gpu_clock.GpuClock()
    weights = inputs.draw_weights("realistic", sizes, _SEED)
    chosen = select(workloads or (USUAL if on_gpu else FEW), WORKLOADS)
    given = [make_inputs(row, sizes, weights) for row in chosen]
    by_tokens = [orders_of(one, backend, variants) for one in given]
    orders = [order for one in by_tokens for order in one]
    programs = iter(compile_all(orders, jobs) if jobs else [None] * len(orders))
    asked = len(variants) * len(given)
    rows: list[Row] = []
    for of_tokens in by_tokens:
        pairs = list(zip(of_tokens, programs, strict=False))  # takes no more than it needs
        oracles = pairs[len(variants) :]
        answers: dict[int, Any] = {}
        for order, program in pairs[: len(variants)]:
            print(f"{len(rows) + 1} of {asked}: {_name(order)}", flush=True)
            place = next(
                place
                for place, (one, _) in enumerate(oracles)
                if one.variant == question(order.variant)
            )
            if place not in answers:  # one that does not end costs the rows from here on alone
                answers[place] = answer(*oracles[place])
            iterations = _ITERATIONS if on_gpu else 1
            found = measure(order, program, answers[place], clock=clock, iterations=iterations)
            rows = with_ratios([*rows, found])
            write(rows, about, folder, asked)
    print("\n".join(tables.aligned(cells(rows), left=2)))
    print(f"wrote {folder / 'options.json'}")
    return 1 if any(row.problem for row in rows) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.options")
    parser.add_argument(
        "--workloads", type=lambda text: text.split(","), default=(), help="token counts, or all"
    )
    parser.add_argument(
        "--variants",
        type=lambda text: text.split(","),
        default=(),
        help="only those whose name begins with one of these",
    )
    parser.add_argument("--backend", default="auto", choices=("auto", *backends.NAMES))
    parser.add_argument("--jobs", type=natural, default=0, help="processes that compile ahead")
    parser.add_argument("--output", type=folder, default="out/options")
    args = parser.parse_args(argv)
    try:
        return run(args.workloads, args.backend, args.jobs, args.output, args.variants)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    environment.prepare_process()
    sys.exit(interruption.ended(main))
