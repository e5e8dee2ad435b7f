"""The rate of FP8 matmuls with promotion, at the layer's own two shapes as dense matrices.

Block-scaled FP8 adds each 128 columns of K to float32 sums outside of the tensor cores. That costs
time which `torch._scaled_mm` with its scales per tensor does not pay, so its rate is out of reach
of any such layer. Here the same arithmetic is measured without all that makes a layer slower: one
expert, full tiles, whole rounds of SMs:

    [ROWS, H] x [2 I, H]^T   and   [ROWS, I] x [H, I]^T

by DeepGEMM where it is there, and by our own kernels; the faster one counts.
"""

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

import jax_moe
from bench import inputs
from bench.failures import one_line
from bench.gaussian import BLOCK, key_for, quantized_gaussian
from bench.gpu_clock import GpuClock, Sample
from bench.timers import Execution, no_wait
from bench.workloads import Sizes
from interop.solutions import deepgemm, deepgemm_dense
from jax_moe import ExpertWeights, Quantized, backends
from jax_moe.device import device_of

ROWS = 66 * 128  # DeepSeek-V3's tiles of 128 x 256 are 8 and 14 whole rounds of 132 SMs then
_CALLS = 20
_CHECKED_ROWS = 128
_MOST_ERROR = 0.05  # relative, Frobenius; requantized activations are within 0.03


class Operands(NamedTuple):
    """What both contenders multiply.

    Attributes:
        rows: e4m3[ROWS,H] with scales.
        activations: e4m3[ROWS,I] with scales.
        weights: Of one expert.
    """

    rows: Quantized
    activations: Quantized
    weights: ExpertWeights


class Probe(NamedTuple):
    """One matmul: what to time, and its first rows beside what they should be."""

    execution: Execution
    found: Float[Array, "rows columns"]
    expected: Float32[Array, "rows columns"]


class Rate(NamedTuple):
    """What was measured.

    Attributes:
        flops_per_s: Of both shapes together; None if no contender gave right results.
        probe: Which contender, how, and what became of the others.
    """

    flops_per_s: float | None
    probe: str


def measure(clock: GpuClock, sizes: Sizes) -> Rate:
    """Times all contenders on the GPU; what one of them raises is its line in `probe`."""
    operands = make_operands(sizes)
    times, said = {}, []
    for name, make in contenders().items():
        try:
            times[name] = sum(_time_us(clock, probe) for probe in make(operands))
            said.append(f"{name} {times[name]:.1f} us")
        except Exception as error:
            said.append(f"{name}: {one_line(error)}")
    hidden, intermediate = sizes.hidden_size, sizes.intermediate_size
    probe = (
        f"{ROWS} x {hidden} x {2 * intermediate} and {ROWS} x {intermediate} x {hidden} with "
        f"promotion, medians of {_CALLS}: {'; '.join(said)}"
    )
    if not times:
        return Rate(None, probe)
    flops = 2 * ROWS * 3 * hidden * intermediate
    return Rate(1e6 * flops / min(times.values()), probe)


def contenders() -> dict[str, Callable[[Operands], list[Probe]]]:
    """By name: a function that prepares both matmuls, the up-projection's first."""
    found: dict[str, Callable[[Operands], list[Probe]]] = {}
    if deepgemm.unavailable_reason() is None:
        found["DeepGEMM fp8_gemm_nt"] = of_deepgemm
    backend = backends.select("auto", device_of())
    if backend != "xla":
        ours = functools.partial(of_ours, backend=backend)
        found[f"jax_moe ({backend}) with one expert, its matmuls alone"] = ours
    return found


def make_operands(sizes: Sizes) -> Operands:
    """Gaussian rows and weights, quantized as everywhere."""
    draw = jax.jit(
        functools.partial(quantized_gaussian, block_rows=1, std=1.0), static_argnums=(1, 2)
    )

    def quantized(stream: int, columns: int) -> Quantized:
        values, scales = draw(key_for(0, stream), ROWS, columns)
        return Quantized(values, scales.T.copy())

    return Operands(
        rows=quantized(0, sizes.hidden_size),
        activations=quantized(1, sizes.intermediate_size),
        weights=inputs.draw_weights("realistic", sizes._replace(num_local_experts=1), seed=0),
    )


def of_deepgemm(operands: Operands) -> list[Probe]:
    """Plain dense matmuls."""
    w13, s13, w2, s2 = operands.weights
    return [_dense(operands.rows, w13, s13), _dense(operands.activations, w2, s2)]


def _dense(rows: Quantized, weights: Array, weights_scale: Array) -> Probe:
    from interop import dlpack

    jax.block_until_ready((rows, weights, weights_scale))
    values, scales, *right = map(dlpack.to_torch, (*rows, weights, weights_scale))
    dense = tuple(one[0] for one in right)
    call = functools.partial(deepgemm_dense.gemm, values, scales.t(), *dense)
    execution = _warmed(Execution(call, no_wait, "eager", None))
    found = dlpack.to_jax(call())[:_CHECKED_ROWS]
    return Probe(execution, found, _product(rows, weights, weights_scale))


def of_ours(operands: Operands, *, backend: str) -> list[Probe]:
    """The layer's two stages with every row on the only expert."""
    ids = jnp.zeros((ROWS, 1), jnp.int32)
    plan = jax_moe.plan_groups(
        ids, 0, num_local_experts=1, num_experts=1, expected_rows=ROWS, backend=backend
    )
    w13, s13, w2, s2 = operands.weights
    up = jax.jit(functools.partial(jax_moe.up_project, backend=backend))
    down = jax.jit(functools.partial(jax_moe.down_project, backend=backend))
    probes = []
    for call, expected in (
        (lambda: up(*operands.rows, w13, s13, plan), _swiglu(_product(operands.rows, w13, s13))),
        (lambda: down(operands.activations, w2, s2, plan), _product(operands.activations, w2, s2)),
    ):
        execution = _warmed(Execution(call, jax.block_until_ready, "jit", None))
        output = execution.call()
        found = _dequantized(output) if isinstance(output, Quantized) else output[:_CHECKED_ROWS]
        probes.append(Probe(execution, found, expected))
    return probes


def _dequantized(rows: Quantized) -> Float32[Array, "rows columns"]:
    """The rows that are checked."""
    values = rows.values[:_CHECKED_ROWS].astype(jnp.float32)
    return values * jnp.repeat(rows.scales[:, :_CHECKED_ROWS].T, BLOCK, axis=1)


def _product(
    rows: Quantized, weights: Array, weights_scale: Array
) -> Float32[Array, "rows columns"]:
    """The first rows of `rows @ weights[0].T`, in float32."""
    scales = jnp.repeat(jnp.repeat(weights_scale[0], BLOCK, axis=0), BLOCK, axis=1)
    return _dequantized(rows) @ (weights[0].astype(jnp.float32) * scales).T


def _swiglu(product: Float32[Array, "rows columns"]) -> Float32[Array, "rows columns"]:
    up, gate = jnp.split(product, 2, axis=1)
    return jax.nn.silu(gate) * up


def _time_us(clock: GpuClock, probe: Probe) -> float:
    difference = jnp.linalg.norm(probe.found.astype(jnp.float32) - probe.expected)
    error = float(difference / jnp.linalg.norm(probe.expected))
    if not error <= _MOST_ERROR:  # a wrong result has no speed
        raise ValueError(f"expected a relative error up to {_MOST_ERROR}, got {error:.3g}")
    samples = clock.time(probe.execution, _CALLS, cold=False)
    return statistics.median(map(matmul_us, samples))


def matmul_us(sample: Sample) -> float:
    """Time of our matmul alone (a stage may permute rows first); of other calls all of it."""
    named = [one.duration_us for one in sample.kernels if "projection" in one.name]
    return sum(named) if named else sample.span_us


def _warmed(execution: Execution) -> Execution:
    for _ in range(3):
        execution.block(execution.call())
    return execution
