"""The layer inside a model: L times in one `lax.scan`, hidden states carried from one to the next.

    python bench_main.py --layers=61
    python -m bench.layers --layers=61 --tokens=1,16,64,256

Each step quantizes bf16 hidden states, runs the whole layer on them and adds a small part of its
result, as a residual connection does. Twice: with one set of weights for all steps, and with a set
for each of as many layers as the memory holds. Every step has a routing of its own.

Wall time is the host's, of the whole program, per step; L2 is as the step before left it. On a GPU
with torch its profiler adds where the time of a step goes (`bench.scan_parts`). On a CPU times mean
nothing.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float32

import jax_moe
from bench import commands, environment, execution, gpu_clock, inputs, scan_parts, sm_clock
from bench.failures import one_line, writing
from bench.results import KernelTime, plain
from bench.runner import kernel_times
from bench.scan_parts import Parts
from bench.sm_clock import Reading
from bench.timers import Execution, warm_up
from bench.workloads import FULL, MOST_LAYERS, REDUCED, Sizes, token_counts
from interop.arguments import up_to
from interop.workloads import ROUTED_SCALING_FACTOR
from jax_moe import DEEPSEEK_V3, ExpertWeights
from jax_moe.io.files import shown, write_atomically
from pallas_kernels import interruption

TOKENS, FEW_TOKENS = (1, 16, 64, 256), (1, 7)
LAYERS, FEW_LAYERS = 61, 3
ROOT, FILES = "out/layers", ("layers.json",)
_OFFSET = 0
# Without a norm in between, SwiGLU squares what it gets: at 2.5 bf16 overflows after a few layers.
_FACTOR = ROUTED_SCALING_FACTOR / 256
_REPEATS = 5
_MOST_ERROR = 0.01  # of a scan against the same steps one by one; XLA may fuse the sums otherwise
_SPARE_BYTES = 6 * 2**30  # for what the program needs besides the weights
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


class Row(NamedTuple):
    """One measurement, times in us per layer.

    Attributes:
        weights: "one" set for all layers, or "own" sets.
        layers: L, the steps of the scan.
        tokens: T.
        wall_us: Median of the host's time.
        parts: Of what it is made, by the profiler; None without one.
        kernels: Of one program, in order of the first start.
        launches: Launch calls by the host per program; a CUDA graph counts once.
        clock: The SM clock of programs back to back, without a profiler.
        temporary_bytes: Of the compiled program, if XLA says.
        error: Against the steps one by one, relative, in the Frobenius norm.
        problem: Why there are no times.
    """

    weights: str
    layers: int
    tokens: int
    wall_us: float | None = None
    parts: Parts | None = None
    kernels: tuple[KernelTime, ...] = ()
    launches: int | None = None
    clock: Reading | None = None
    temporary_bytes: int | None = None
    error: float | None = None
    problem: str = ""


class Model(NamedTuple):
    """What a program of L layers takes.

    Attributes:
        hidden_states: bf16[T,H].
        routing_logits: f32[L,T,E], of every layer its own.
        routing_bias: f32[E].
        weights: Of one layer; or with a leading axis of L, each layer's own.
    """

    hidden_states: BFloat16[Array, "T H"]
    routing_logits: Float32[Array, "L T E"]
    routing_bias: Float32[Array, " E"]
    weights: ExpertWeights


def step(
    hidden_states: BFloat16[Array, "T H"],
    routing_logits: Float32[Array, "T E"],
    routing_bias: Float32[Array, " E"],
    weights: ExpertWeights,
) -> BFloat16[Array, "T H"]:
    """One layer with its residual connection."""
    layer: Any = jax_moe.apply  # the weights come as a tuple
    out = layer(routing_logits, routing_bias, hidden_states, None, *weights, _OFFSET, _FACTOR)
    return hidden_states + out


def scanned(model: Model) -> BFloat16[Array, "T H"]:
    """All layers in one scan."""
    own = model.weights.gemm1_weights.ndim == 4

    def body(hidden_states: Any, of_layer: tuple[Any, Any]) -> tuple[Any, None]:
        logits, weights = of_layer
        weights = weights if own else model.weights
        return step(hidden_states, logits, model.routing_bias, weights), None

    layers = (model.routing_logits, model.weights if own else None)
    return lax.scan(body, model.hidden_states, layers)[0]


def one_by_one(model: Model) -> BFloat16[Array, "T H"]:
    """The same, a call per layer."""
    own = model.weights.gemm1_weights.ndim == 4
    run, hidden_states = jax.jit(step), model.hidden_states
    for layer, logits in enumerate(model.routing_logits):
        weights = jax.tree.map(lambda w, i=layer: w[i], model.weights) if own else model.weights
        hidden_states = run(hidden_states, logits, model.routing_bias, weights)
    return hidden_states


def make_model(num_tokens: int, layers: int, sizes: Sizes, *, own: bool, seed: int = 0) -> Model:
    """Draws a model: Gaussian weights, hidden states and logits, from a seed alone."""
    keys = jax.random.split(jax.random.key(seed), 2)
    shape = (num_tokens, sizes.hidden_size)
    weights = inputs.draw_weights("realistic", sizes, seed)
    if own:
        weights = jax.tree.map(functools.partial(_stacked, layers=layers), weights)
    return Model(
        jax.random.normal(keys[0], shape, jnp.bfloat16),
        jax.random.normal(keys[1], (layers, num_tokens, sizes.num_experts), jnp.float32),
        jnp.zeros(sizes.num_experts, jnp.float32),
        weights,
    )


@functools.partial(jax.jit, static_argnames="layers")
def _stacked(array: Array, layers: int) -> Array:
    """Copies for all layers, each with its experts in another order, so that they differ."""

    def of_layer(layer: Array) -> Array:
        return jnp.roll(array, layer, axis=0)

    return lax.map(of_layer, jnp.arange(layers))


def layers_that_fit(layers: int, sizes: Sizes, memory: int | None) -> int:
    """How many layers' own weights a device holds beside one set and what a program needs.

    Args:
        layers: Those that are wanted.
        sizes: Of a layer.
        memory: Bytes of the device; None does not limit.

    Returns:
        At most `layers`, at least 1.
    """
    if memory is None:
        return layers
    values = 3 * sizes.num_local_experts * sizes.hidden_size * sizes.intermediate_size
    a_layer = values * (1 + 4 / 128**2)
    return max(1, min(layers, int((memory - _SPARE_BYTES) / a_layer) - 1))


class Measured(NamedTuple):
    """A row, and its program to be loaded again; None if there is none."""

    row: Row
    program: execution.Program | None


def measure(num_tokens: int, layers: int, sizes: Sizes, *, own: bool, iterations: int) -> Measured:
    """Checks and times one program by the host's clock; no profiler may be attached."""
    row, program = Row("own" if own else "one", layers, num_tokens), None
    try:
        model = make_model(num_tokens, layers, sizes, own=own)
        jitted = jax.jit(scanned)
        compiled = jitted.lower(model).compile()
        program = execution.compiled_program(compiled, jitted)
        found = np.asarray(compiled(model), np.float32)
        expected = np.asarray(one_by_one(model), np.float32)
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        row = row._replace(error=error, temporary_bytes=program.workspace_bytes)
        if not error <= _MOST_ERROR:
            return Measured(row._replace(problem="wrong"), None)  # a wrong result has no speed
        wall_us = _wall_us(lambda: compiled(model), iterations) / layers
        return Measured(row._replace(wall_us=wall_us), program)
    except Exception as problem:
        return Measured(row._replace(problem=one_line(problem)), None)


def _wall_us(call: Callable[[], Any], iterations: int) -> float:
    """Median over repeats of `iterations` calls after each other."""
    jax.block_until_ready(call())
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(iterations):
            out = call()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / iterations * 1e6)
    return float(np.median(found))


def with_kernels(measured: Measured, sizes: Sizes, clock: gpu_clock.GpuClock) -> Row:
    """The row with the parts of the median call, and the SM clock.

    The program is loaded again: a profiler sees into what was built while it was attached.
    """
    row, program = measured
    if program is None or row.wall_us is None:
        return row
    what, wall_us = f"{row.weights} weights, T={row.tokens}", row.wall_us
    try:
        model = make_model(row.tokens, row.layers, sizes, own=row.weights == "own")
        run = execution.load(program, scanned, reload=True)
        bound = Execution(lambda: run(model), jax.block_until_ready, "jit", None)
        warm_up(bound, 3)
        samples = clock.time(bound, 5, cold=False)
        sample = sorted(samples, key=lambda one: one.span_us)[len(samples) // 2]
        return row._replace(
            parts=scan_parts.parts_of(sample, row.layers, wall_us),
            kernels=kernel_times([sample]),
            launches=sample.launches,
            clock=sm_clock.unless_it_fails(
                what, lambda: sm_clock.sustained(bound, "jax", wall_us * row.layers)
            ),
        )
    except Exception as problem:
        return row._replace(problem=one_line(problem))


def write(rows: Sequence[Row], about: Mapping[str, Any], folder: Path) -> None:
    """`layers.json`: where the figures come from, and the rows."""
    path = folder / "layers.json"
    with writing(path), write_atomically(path, "w") as file:
        json.dump({"about": dict(about), "rows": [plain(row) for row in rows]}, file, indent=1)


def run(layers: int | None, tokens: Sequence[int], folder: Path) -> int:
    """Measures, prints and writes.

    Args:
        layers: L; None is `LAYERS`, or few without a GPU.
        tokens: The T's; empty for the usual ones.
        folder: Of `layers.json`.

    Returns:
        The exit code: 1 if a result is wrong or failed.
    """
    environment.enable_compilation_cache()
    on_gpu = environment.default_backend() == "gpu"
    sizes = FULL if on_gpu else REDUCED
    about = environment.about(sizes) | {"config": str(DEEPSEEK_V3)}
    layers = layers or (LAYERS if on_gpu else FEW_LAYERS)
    if not on_gpu:
        print(about["note"], flush=True)
    iterations = 10 if on_gpu else 1
    fitting = layers_that_fit(layers, sizes, about["device"]["memory_bytes"])
    found: list[Measured] = []
    rows: list[Row] = []
    with commands.shown_if_cut_short(lambda: scan_parts.table(rows)):
        for own, steps in ((False, layers), (True, fitting)):
            for num_tokens in tokens or (TOKENS if on_gpu else FEW_TOKENS):
                one = measure(num_tokens, steps, sizes, own=own, iterations=iterations)
                while own and _OUT_OF_MEMORY in one.row.problem and steps > 1:
                    steps -= max(1, steps // 10)  # what fits depends on what else the device holds
                    one = measure(num_tokens, steps, sizes, own=own, iterations=iterations)
                found.append(one)
                rows.append(one.row)
                print(f"{one.row.weights} weights, T={num_tokens}: timed", flush=True)
                write(rows, about | {"complete": False}, folder)
                interruption.check()
        if gpu_clock.unavailable_reason() is None:
            clock = gpu_clock.GpuClock()
            for place, one in enumerate(found):
                rows[place] = with_kernels(one, sizes, clock)
                print(f"{one.row.weights} weights, T={one.row.tokens}: profiled", flush=True)
                write(rows, about | {"complete": False}, folder)
                interruption.check()
        write(rows, about | {"complete": True}, folder)
    print("\n".join(scan_parts.table(rows)))
    print(f"wrote {shown(folder / 'layers.json')}")
    return 1 if any(row.problem for row in rows) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = commands.parser("bench.layers", __doc__)
    parser.add_argument("--layers", type=up_to(MOST_LAYERS), help=f"L; {LAYERS} on a GPU")
    parser.add_argument("--tokens", type=token_counts, default=(), help="T's, by commas")
    commands.add_output(parser, ROOT)
    args = parser.parse_args(argv)
    try:
        with commands.results(args.output, ROOT, FILES, overwrite=args.overwrite) as folder:
            return run(args.layers, args.tokens, folder)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    environment.prepare_process()
    interruption.exit_with(main)
