"""What the shared expert adds to the layer, beside two dense matmuls of its shapes.

    python bench_main.py --shared_expert
    python -m bench.shared_expert --model=kimi-k2 --tokens=64,4096

GPU time of the whole layer (`jax_moe.nn.moe_layer`: gate, router, routed experts) without its
shared expert, with it, and with it fused among the routed ones; of the shared expert alone on rows
that are quantized; and of two of DeepGEMM's `fp8_gemm_nt`. The cost is the difference to the layer
without.

The routed part is one rank's share: its experts, and as many pairs as T tokens bring it on average
(T of DeepSeek-V3). A layer of all experts would hide the shared one in its spread. L2 is cold; the
forms take turns, so that a drift of the clock meets all of them. On a CPU results are checked and
nothing is timed.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16

import jax_moe
from bench import commands, environment, execution, gpu_clock, inputs, tables, timers
from bench.failures import one_line, writing
from bench.timers import Execution
from bench.workloads import Sizes, sizes_of, token_counts
from interop.solutions import deepgemm_dense
from jax_moe import LayerInputs, LayerWeights, models
from jax_moe.io.files import shown, write_atomically
from jax_moe.models import Model
from jax_moe.nn import LayerConfig, fuse_shared, moe_layer
from pallas_kernels import interruption

TOKENS, FEW_TOKENS = (1, 16, 64, 256, 1024, 4096), (1, 7)
_ROUNDS, _CALLS = 5, 20
ROOT, FILES = "out/shared_expert", ("shared_expert.json",)
_MOST_ERROR = 0.01  # of forms against each other: bf16 sums are rounded at other places
_HEADER = (
    "T", "without us", "with", "fused", "alone", "2 GEMMs", "cost", "fused cost", "best / 2 GEMMs",
)  # fmt: skip


class Row(NamedTuple):
    """One token count; medians of GPU time in us, None where not measured.

    Attributes:
        tokens: T.
        without_us: The layer without its shared expert.
        with_us: The layer, the shared expert after the routed ones.
        fused_us: The layer, the shared expert as one more routed one.
        alone_us: The shared expert alone.
        gemms_us: Two DeepGEMM matmuls of its shapes.
        gemms_kernels: Kernels of these; more than two would be more than the matmuls.
        error: Relative, in the Frobenius norm: the worst of with, fused and the sum of without and
            alone against each other.
        problem: Why there are no times.
    """

    tokens: int
    without_us: float | None = None
    with_us: float | None = None
    fused_us: float | None = None
    alone_us: float | None = None
    gemms_us: float | None = None
    gemms_kernels: int | None = None
    error: float | None = None
    problem: str = ""

    @property
    def cost_us(self) -> float | None:
        """What the shared expert adds after the routed ones."""
        return _less(self.with_us, self.without_us)

    @property
    def fused_cost_us(self) -> float | None:
        """What it adds as one of them."""
        return _less(self.fused_us, self.without_us)

    @property
    def ratio(self) -> float | None:
        """The smaller cost over the two matmuls."""
        if self.cost_us is None or self.fused_cost_us is None or not self.gemms_us:
            return None
        return min(self.cost_us, self.fused_cost_us) / self.gemms_us


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


class Layer(NamedTuple):
    """A layer and its forms' configurations."""

    weights: LayerWeights
    fused: LayerWeights
    config: LayerConfig


def layer_config(model: Model, sizes: Sizes) -> LayerConfig:
    """One rank's share of a model's layer, as a layer of its own.

    Args:
        model: With shared experts.
        sizes: Of one rank.

    Raises:
        ValueError: The model has no shared experts.
    """
    if not model.num_shared_experts:
        raise ValueError(f"--model: expected one with shared experts, got {model.name}")
    experts = sizes.num_local_experts
    pairs = max(1, round(model.top_k * experts / sizes.num_experts))
    return LayerConfig(
        # Groups are of all E experts; a rank's share of them has none.
        router=dataclasses.replace(model.config, top_k=pairs, n_group=1, topk_group=1),
        num_experts=experts,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        routed_scaling_factor=model.routed_scaling_factor,
        has_routing_bias=model.has_routing_bias,
        shared_intermediate_size=model.num_shared_experts * sizes.intermediate_size,
        shared_swiglu_limit=model.swiglu_limit,
    )


def make_layer(config: LayerConfig, seed: int = 0) -> Layer:
    """Draws a layer's weights from a seed alone."""
    experts, hidden = config.num_experts, config.hidden_size
    draw = functools.partial(inputs.draw_weights, "realistic")
    shared = Sizes(1, 1, hidden, config.shared_intermediate_size)
    gate = jax.random.normal(jax.random.key(seed), (experts, hidden), jnp.bfloat16)
    weights = LayerWeights(
        experts=draw(Sizes(experts, experts, hidden, config.intermediate_size), seed),
        gate_weight=gate / hidden**0.5,
        e_score_correction_bias=jnp.zeros(experts, jnp.float32)
        if config.has_routing_bias
        else None,
        shared_experts=draw(shared, seed + 1),
    )
    return Layer(weights, fuse_shared(weights, config), config)


def forms(
    layer: Layer, hidden_states: BFloat16[Array, "T H"]
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Each form as a function to jit, and its arguments."""
    config, weights = layer.config, layer.weights
    plain = dataclasses.replace(config, shared_intermediate_size=0, shared_swiglu_limit=None)
    whole = functools.partial(moe_layer, config=config)
    rows = jax_moe.quantize(hidden_states, scale_format=config.router.scale_format)
    tokens = len(hidden_states)
    return {
        "without": (
            functools.partial(moe_layer, config=plain),
            (weights._replace(shared_experts=None), hidden_states),
        ),
        "with": (whole, (weights, hidden_states)),
        "fused": (whole, (layer.fused, hidden_states)),
        "alone": (
            functools.partial(
                jax_moe.apply_routed,
                num_experts=1,
                swiglu_limit=config.shared_swiglu_limit,
                scale_format=config.router.scale_format,
            ),
            (
                *rows,
                *(weights.shared_experts or ()),
                jnp.zeros((tokens, 1), jnp.int32),
                jnp.ones((tokens, 1), jnp.float32),
                jnp.int32(0),
            ),
        ),
    }


def measure(num_tokens: int, layer: Layer, clock: gpu_clock.GpuClock | None) -> Row:
    """Checks the forms against each other, and times them and the matmuls where there is a GPU."""
    row = Row(num_tokens)
    try:
        key = jax.random.key(num_tokens)
        x = jax.random.normal(key, (num_tokens, layer.config.hidden_size), jnp.bfloat16)
        executions, outputs = {}, {}
        for name, (function, arguments) in forms(layer, x).items():
            compiled = jax.jit(function).lower(*arguments).compile()
            call = functools.partial(compiled, *arguments)
            executions[name] = Execution(call, jax.block_until_ready, "jit", None)
            outputs[name] = np.asarray(call(), np.float32)
        error = _error(outputs)
        row = row._replace(error=error)
        if not error <= _MOST_ERROR:
            return row._replace(problem="wrong")  # a wrong result has no speed
        if clock is None:
            return row
        if deepgemm_dense.SOLUTION.unavailable_reason() is None:
            executions["gemms"] = _dense(x, layer)
        times, kernels = _times(executions, clock)
        return row._replace(
            without_us=times["without"],
            with_us=times["with"],
            fused_us=times["fused"],
            alone_us=times["alone"],
            gemms_us=times.get("gemms"),
            gemms_kernels=kernels.get("gemms"),
        )
    except Exception as problem:
        return row._replace(problem=one_line(problem))


def _error(outputs: dict[str, np.ndarray]) -> float:
    expected = outputs["without"] + outputs["alone"]
    norm = np.linalg.norm(expected)
    return max(float(np.linalg.norm(outputs[n] - expected) / norm) for n in ("with", "fused"))


def dense_inputs(hidden_states: BFloat16[Array, "T H"], layer: Layer) -> LayerInputs:
    """The shared expert as a layer of one expert, which `deepgemm_dense` takes."""
    assert layer.weights.shared_experts is not None
    values, scales = jax_moe.quantize(hidden_states)
    return LayerInputs(
        routing_logits=jnp.zeros((len(hidden_states), 1), jnp.float32),
        routing_bias=jnp.zeros(1, jnp.float32),
        hidden_states=values,
        hidden_states_scale=scales,
        weights=layer.weights.shared_experts,
        local_expert_offset=jnp.int32(0),
        routed_scaling_factor=jnp.float32(1),
    )


def _dense(hidden_states: BFloat16[Array, "T H"], layer: Layer) -> Execution:
    solution = deepgemm_dense.SOLUTION
    bound = execution.binder(solution, reload=False)(dense_inputs(hidden_states, layer))
    output = execution.to_jax(solution, bound.call())
    bound.block(output)
    check_dense(output, hidden_states, layer)
    return bound


def check_dense(
    output: BFloat16[Array, "T H"], hidden_states: BFloat16[Array, "T H"], layer: Layer
) -> None:
    """Compares what the matmuls left with a float32 product.

    Raises:
        ValueError: It is another.
    """
    given = dense_inputs(hidden_states, layer)
    assert given.hidden_states_scale is not None
    inner = given.weights.intermediate_size
    scales = jnp.repeat(given.hidden_states_scale[: inner // 128], 128, axis=0).T
    rows = given.hidden_states[:, :inner].astype(jnp.float32) * scales
    blocks = given.weights.gemm2_weights_scale[0]
    weights = jnp.repeat(jnp.repeat(blocks, 128, axis=0), 128, axis=1)
    weights = weights * given.weights.gemm2_weights[0].astype(jnp.float32)
    expected = jnp.matmul(rows, weights.T, precision="highest")
    error = jnp.linalg.norm(output.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    if not float(error) <= _MOST_ERROR:
        raise ValueError(f"deepgemm_dense: relative error {float(error):.3f}")


def _times(
    executions: dict[str, Execution], clock: gpu_clock.GpuClock
) -> tuple[dict[str, float], dict[str, int]]:
    """Median GPU time and kernels of a call of each, in turns."""
    spans: dict[str, list[float]] = {name: [] for name in executions}
    kernels: dict[str, int] = {}
    for one in executions.values():
        timers.warm_up(one, 3)
    for _ in range(_ROUNDS):
        for name, one in executions.items():
            samples = clock.time(one, _CALLS)
            spans[name] += [sample.span_us for sample in samples]
            kernels[name] = max(len(sample.kernels) for sample in samples)
    return {name: float(np.median(times)) for name, times in spans.items()}, kernels


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as text, then what went wrong."""
    cells = [list(_HEADER)]
    for row in rows:
        times = (
            *(row.without_us, row.with_us, row.fused_us, row.alone_us, row.gemms_us),
            *(row.cost_us, row.fused_cost_us),
        )
        cells.append(
            [
                str(row.tokens),
                *("-" if us is None else f"{us:.1f}" for us in times),
                "-" if row.ratio is None else f"{row.ratio:.2f}",
            ]
        )
    problems = [f"T={row.tokens}: {row.problem}" for row in rows if row.problem]
    return [*tables.aligned(cells, left=0), *problems]


def write(rows: Sequence[Row], about: Mapping[str, Any], folder: Path) -> None:
    """`shared_expert.json`: where the figures come from, the layer, and the rows."""
    found = [
        row._asdict()
        | {"cost_us": row.cost_us, "fused_cost_us": row.fused_cost_us, "ratio": row.ratio}
        for row in rows
    ]
    path = folder / "shared_expert.json"
    with writing(path), write_atomically(path, "w") as file:
        json.dump({"about": dict(about), "rows": found}, file, indent=1)


def run(model: str, tokens: Sequence[int], folder: Path) -> int:
    """Measures, prints and writes.

    Args:
        model: A name of `jax_moe.models` with shared experts.
        tokens: The T's; empty for the usual ones.
        folder: Of `shared_expert.json`.

    Returns:
        The exit code: 1 if a result is wrong or failed.

    Raises:
        ValueError: The model is unknown or has no shared experts.
    """
    environment.enable_compilation_cache()
    on_gpu = environment.default_backend() == "gpu"
    measured = models.get(model)
    sizes = sizes_of(measured, reduced=not on_gpu)
    config = layer_config(measured, sizes)
    of_layer = {"model": measured.name, "config": dataclasses.asdict(config)}
    about = environment.about(sizes) | of_layer
    if not on_gpu:
        about["note"] = f"{environment.reduced(sizes)}; results are checked, nothing is timed"
        print(about["note"], flush=True)
    clock = None if gpu_clock.unavailable_reason() else gpu_clock.GpuClock()
    if reason := deepgemm_dense.SOLUTION.unavailable_reason():
        print(f"{deepgemm_dense.SOLUTION.name}: {reason}", flush=True)
    layer = make_layer(config)
    rows: list[Row] = []
    tokens = tokens or (TOKENS if on_gpu else FEW_TOKENS)
    with commands.shown_if_cut_short(lambda: table(rows)):
        for num_tokens in tokens:
            rows.append(measure(num_tokens, layer, clock))
            print(f"T={num_tokens}: done", flush=True)
            write(rows, about | {"complete": len(rows) == len(tokens)}, folder)
            interruption.check()
    print("\n".join(table(rows)))
    print(f"wrote {shown(folder / 'shared_expert.json')}")
    return 1 if any(row.problem for row in rows) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = commands.parser("bench.shared_expert", __doc__)
    parser.add_argument("--model", default=models.DEEPSEEK_V3.name, help="of jax_moe.models")
    parser.add_argument("--tokens", type=token_counts, default=(), help="T's, by commas")
    commands.add_output(parser, ROOT)
    args = parser.parse_args(argv)
    try:
        model = models.get(args.model)
    except ValueError as error:
        parser.error(f"argument --{error}")
    try:
        layer_config(model, sizes_of(model))  # refused before a folder is made
        with commands.results(args.output, ROOT, FILES, overwrite=args.overwrite) as folder:
            return run(args.model, args.tokens, folder)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    environment.prepare_process()
    interruption.exit_with(main)
