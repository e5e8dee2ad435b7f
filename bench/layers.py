"""The layer inside a model: L times in one `lax.scan`, hidden states carried from one to the next.

    python bench_main.py --layers=61
    python -m bench.layers --layers=61 --tokens=1,16,64,256

Each step quantizes bf16 hidden states, runs the whole layer on them and adds its result, as a
residual connection does. Twice: with one set of weights for all steps, and with a set for each of
as many layers as the memory holds. Every step has a routing of its own.

Wall time is the host's, of the whole program, per step; L2 is as the step before left it. On a GPU
with torch its profiler adds where the time of a step goes: our kernels, others (the residual's sum,
the loop's bookkeeping), and the time in which none runs. On a CPU times mean nothing.
"""

import argparse
import functools
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
from jaxtyping import Array, BFloat16, Float32

import jax_moe
from bench import environment, gpu_clock, inputs, tables
from bench.failures import one_line
from bench.timers import Execution
from bench.workloads import FULL, REDUCED, Sizes
from interop.workloads import ROUTED_SCALING_FACTOR
from jax_moe import DEEPSEEK_V3, ExpertWeights
from jax_moe.io.files import write_atomically

TOKENS, FEW_TOKENS = (1, 16, 64, 256), (1, 7)
LAYERS, FEW_LAYERS = 61, 3
_OFFSET = 0
_REPEATS = 5
_MOST_ERROR = 0.01  # of a scan against the same steps one by one; XLA may fuse the sums otherwise
_SPARE_BYTES = 6 * 2**30  # for what the program needs besides the weights
_OURS = "moe_"  # what the names of all kernels of the Mosaic backend begin with
_HEADER = (
    "weights", "layers", "T", "us per layer", "of it: our kernels", "others", "no kernel", "error",
)  # fmt: skip


class Row(NamedTuple):
    """One measurement, times in us per layer.

    Attributes:
        weights: "one" set for all layers, or "own" sets.
        layers: L, the steps of the scan.
        tokens: T.
        wall_us: Median of the host's time.
        kernels_us: In which kernels of ours ran, by the profiler; None without one.
        others_us: In which only other kernels ran.
        idle_us: In which none ran.
        launches: Launch calls by the host per program; a CUDA graph counts once.
        temporary_bytes: Of the compiled program, if XLA says.
        error: Against the steps one by one, relative, in the Frobenius norm.
        problem: Why there are no times.
    """

    weights: str
    layers: int
    tokens: int
    wall_us: float | None = None
    kernels_us: float | None = None
    others_us: float | None = None
    idle_us: float | None = None
    launches: int | None = None
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
    out = layer(
        routing_logits, routing_bias, hidden_states, None, *weights, _OFFSET, ROUTED_SCALING_FACTOR
    )
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
        jax.random.normal(keys[1], (layers, num_tokens, sizes.num_experts)),
        jnp.zeros(sizes.num_experts),
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


def measure(
    num_tokens: int,
    layers: int,
    sizes: Sizes,
    *,
    own: bool,
    clock: gpu_clock.GpuClock | None,
    iterations: int,
) -> Row:
    """Checks and times one program."""
    row = Row("own" if own else "one", layers, num_tokens)
    try:
        model = make_model(num_tokens, layers, sizes, own=own)
        compiled = jax.jit(scanned).lower(model).compile()
        memory = compiled.memory_analysis()
        row = row._replace(temporary_bytes=getattr(memory, "temp_size_in_bytes", None))
        found = np.asarray(compiled(model), np.float32)
        expected = np.asarray(one_by_one(model), np.float32)
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        row = row._replace(error=error)
        if not error <= _MOST_ERROR:
            return row._replace(problem="wrong")  # a wrong result has no speed
        row = row._replace(wall_us=_wall_us(lambda: compiled(model), iterations) / layers)
        return _with_kernels(row, clock, lambda: compiled(model)) if clock else row
    except Exception as problem:
        return row._replace(problem=one_line(problem))


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


def _with_kernels(row: Row, clock: gpu_clock.GpuClock, call: Callable[[], Any]) -> Row:
    """The row with the median call's kernels by whose they are."""
    samples = clock.time(Execution(call, jax.block_until_ready, "jit", None), 5, cold=False)
    sample = sorted(samples, key=lambda one: one.span_us)[len(samples) // 2]
    ours = sample._replace(kernels=tuple(k for k in sample.kernels if _OURS in k.name))
    busy, of_ours = gpu_clock.busy_us(sample), gpu_clock.busy_us(ours)
    return row._replace(
        kernels_us=of_ours / row.layers,
        others_us=(busy - of_ours) / row.layers,
        idle_us=(sample.span_us - busy) / row.layers,
        launches=sample.launches,
    )


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as text, then what went wrong."""
    cells = [list(_HEADER)]
    for row in rows:
        times = (row.wall_us, row.kernels_us, row.others_us, row.idle_us)
        cells.append(
            [
                row.weights,
                str(row.layers),
                str(row.tokens),
                *("-" if us is None else f"{us:.1f}" for us in times),
                "-" if row.error is None else f"{row.error:.5f}",
            ]
        )
    problems = [f"{row.weights} T={row.tokens}: {row.problem}" for row in rows if row.problem]
    return [*tables.aligned(cells), *problems]


def write(rows: Sequence[Row], folder: Path) -> None:
    """`layers.json`: device, versions, commit, and the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    about = environment.about() | {"config": str(DEEPSEEK_V3)}
    with write_atomically(folder / "layers.json", "w") as file:
        json.dump({"about": about, "rows": [row._asdict() for row in rows]}, file, indent=1)


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
    on_gpu = jax.default_backend() == "gpu"
    sizes = FULL if on_gpu else REDUCED
    layers = layers or (LAYERS if on_gpu else FEW_LAYERS)
    if not on_gpu:
        print("CPU at reduced size: results are checked, times mean nothing", flush=True)
    clock = None if gpu_clock.unavailable_reason() else gpu_clock.GpuClock()
    fitting = layers_that_fit(layers, sizes, environment.device()["memory_bytes"])
    rows: list[Row] = []
    for own, steps in ((False, layers), (True, fitting)):
        for num_tokens in tokens or (TOKENS if on_gpu else FEW_TOKENS):
            rows.append(
                measure(
                    num_tokens, steps, sizes, own=own, clock=clock, iterations=3 if on_gpu else 1
                )
            )
            print(f"{rows[-1].weights} weights, T={num_tokens}: done", flush=True)
            write(rows, folder)
    print("\n".join(table(rows)))
    print(f"wrote {folder / 'layers.json'}")
    return 1 if any(row.problem for row in rows) else 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.layers")
    parser.add_argument("--layers", type=_positive, help=f"L; {LAYERS} on a GPU")
    parser.add_argument(
        "--tokens",
        type=lambda text: tuple(_positive(part) for part in text.split(",")),
        default=(),
        help="T's, separated by commas",
    )
    parser.add_argument("--output", type=Path, default=Path("out/layers"))
    args = parser.parse_args(argv)
    return run(args.layers, args.tokens, args.output)


if __name__ == "__main__":
    environment.prepare_process()
    sys.exit(main())
