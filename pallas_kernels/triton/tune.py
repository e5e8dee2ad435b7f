"""Times candidate tilings on the GPU at hand: the measurements behind `configs`.

    python -m pallas_kernels.triton.tune --output triton_tuning.json

Weights and activations are random e4m3 numbers of DeepSeek-V3's sizes, routing is uniform with as
many local pairs as tokens. Times are of the kernel alone, by CUPTI; a candidate that fails or whose
result differs from the first one's is printed with the reason and no time.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels.shapes import QUANT_BLOCK
from pallas_kernels.triton import combine, dispatch, down_projection, routing, up_projection
from pallas_kernels.triton.launch import call
from pallas_kernels.triton.matmul import MatmulConfig

HIDDEN, INTERMEDIATE, EXPERTS, LOCAL_EXPERTS, TOP_K = 7168, 2048, 256, 32, 8
_SMEM_OF_PROGRAM = 227 * 1024  # Hopper
_SMEM_OF_SM = 228 * 1024  # each program takes 1 KiB more than it asks for


def swapped(block_m: int, *num_warps: int) -> tuple[MatmulConfig, ...]:
    """Tilings with the weights first: one program a tile, and as many as an SM holds, up to 2."""
    candidates = []
    for warps, stages in itertools.product(num_warps, range(3, 7)):
        smem_bytes = MatmulConfig(block_m, warps, stages, swap_ab=True).smem_bytes
        if smem_bytes <= _SMEM_OF_PROGRAM:
            residents = min(_SMEM_OF_SM // (smem_bytes + 1024), 2)
            candidates += [MatmulConfig(block_m, warps, stages, n, True) for n in (0, residents)]
    return tuple(candidates)


# By number of tokens. The first multiplies in f16 where there are fewer than 64 rows: it checks the
# others. 64 rows with the weights first spill registers with 4 warps.
CANDIDATES = {
    80: (MatmulConfig(16, 8, 4), *swapped(16, 4, 8)),
    384: (MatmulConfig(32, 4, 4), MatmulConfig(64, 4, 2, 2), *swapped(32, 4, 8)),
    901: (
        MatmulConfig(64, 4, 2),
        MatmulConfig(64, 4, 2, 2),
        *swapped(32, 8),
        *swapped(64, 8),
    ),
    14107: (
        MatmulConfig(128, 8, 4, 1),
        MatmulConfig(128, 8, 4),
        MatmulConfig(128, 8, 3, 1),
        MatmulConfig(64, 4, 2, 2),
        MatmulConfig(64, 4, 2),
        MatmulConfig(64, 4, 5, 1),
    ),
}


class Weights(NamedTuple):
    """Of the local experts, as the two matmuls take them."""

    gemm1: tuple[jax.Array, jax.Array]
    gemm2: tuple[jax.Array, jax.Array]


class Measured(NamedTuple):
    """Median kernel time and, to compare candidates, the rows of the live pairs in order."""

    microseconds: float
    rows: jax.Array


def random_e4m3(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Any finite e4m3 below 2: the highest bit of the exponent is cleared."""
    raw = jax.random.bits(jax.random.key(seed), shape, jnp.uint8) & np.uint8(0b10111111)
    return jax.lax.bitcast_convert_type(raw, jnp.float8_e4m3fn)


def make_weights() -> Weights:
    """All experts' weights, 1.4 GB, with one scale for every block."""

    def expert_weights(seed: int, n: int, k: int) -> tuple[jax.Array, jax.Array]:
        scales = jnp.full((LOCAL_EXPERTS, n // QUANT_BLOCK, k // QUANT_BLOCK), k**-0.5)
        return random_e4m3(seed, (LOCAL_EXPERTS, n, k)), scales

    return Weights(
        expert_weights(1, 2 * INTERMEDIATE, HIDDEN), expert_weights(2, HIDDEN, INTERMEDIATE)
    )


def draw_local_ids(num_tokens: int) -> np.ndarray:
    """i32[T,k]: each token goes to each local expert with the odds of uniform routing; -1 pads."""
    chosen = np.random.default_rng(0).random((num_tokens, LOCAL_EXPERTS)) < TOP_K / EXPERTS
    ids = np.where(chosen, np.arange(LOCAL_EXPERTS), LOCAL_EXPERTS)
    ids = np.sort(ids, axis=1)[:, :TOP_K]
    return np.where(ids < LOCAL_EXPERTS, ids, -1).astype(np.int32)


def microseconds(function: Callable[..., Any], *arrays: Any, iterations: int) -> float:
    """Median GPU time of the kernels of a jitted function."""
    times: Any = profiler.measure(jax.jit(function), iterations=iterations)(*arrays)[1]
    return statistics.median(times if isinstance(times, list) else [times]) * 1e3


def make_plan(topk_ids: jax.Array, block_m: int) -> list[jax.Array]:
    """The fields of `DispatchPlan`, made by the kernels."""
    sizes = {"num_local_experts": LOCAL_EXPERTS, "num_experts": EXPERTS}
    offset, counts = jnp.int32(0), None
    if not dispatch.is_one_block(len(topk_ids), LOCAL_EXPERTS):
        (counts,) = call(dispatch.count_launch(topk_ids, offset, **sizes))
    return call(dispatch.plan_launch(topk_ids, offset, counts, block_m=block_m, **sizes))


def measure_pair(
    config: MatmulConfig, num_tokens: int, weights: Weights, num_sms: int, iterations: int
) -> tuple[Measured, Measured]:
    """Times both matmuls with one tiling."""
    topk_ids = jnp.asarray(draw_local_ids(num_tokens))
    plan = jax.jit(make_plan, static_argnums=1)(topk_ids, config.block_m)
    _, _, row_token, _, tile_expert, num_tiles = plan
    live = np.flatnonzero(np.asarray(row_token) >= 0)

    @jax.jit
    def up(*arrays: Any) -> list[jax.Array]:
        return call(up_projection.launch(*arrays, config=config, num_sms=num_sms))

    @jax.jit
    def down(*arrays: Any) -> list[jax.Array]:
        return call(down_projection.launch(*arrays, config=config, num_sms=num_sms))

    scales = jnp.ones((HIDDEN // QUANT_BLOCK, num_tokens))
    tokens = (random_e4m3(3, (num_tokens, HIDDEN)), scales)
    up_arrays = (*tokens, *weights.gemm1, row_token, tile_expert, num_tiles)
    values, value_scales = up(*up_arrays)
    down_arrays = (values, value_scales, *weights.gemm2, tile_expert, num_tiles)
    (outputs,) = down(*down_arrays)
    activations = values[live].astype(jnp.float32) * jnp.repeat(
        value_scales[:, live].T, QUANT_BLOCK, axis=1
    )
    return (
        Measured(microseconds(up, *up_arrays, iterations=iterations), activations),
        Measured(microseconds(down, *down_arrays, iterations=iterations), outputs[live]),
    )


def difference(found: jax.Array, expected: jax.Array) -> float:
    """Relative, in the Frobenius norm; NaN where either is not finite."""
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def measure_glue(num_tokens: int, iterations: int) -> dict[str, float]:
    """Median times of routing, plan and combine, in us."""
    topk_ids = jnp.asarray(draw_local_ids(num_tokens))
    logits = jax.random.normal(jax.random.key(4), (num_tokens, EXPERTS))
    bias, factor = jnp.zeros((EXPERTS,), jnp.bfloat16), jnp.float32(2.5)
    groups = {"top_k": TOP_K, "n_group": 8, "topk_group": 4}
    plan = jax.jit(make_plan, static_argnums=1)(topk_ids, 64)
    outputs = jnp.ones((plan[2].shape[0], HIDDEN), jnp.bfloat16)
    weights = jnp.ones(topk_ids.shape, jnp.float32)
    return {
        "routing": microseconds(
            lambda *a: call(routing.launch(*a, **groups)),
            logits,
            bias,
            factor,
            iterations=iterations,
        ),
        "plan": microseconds(lambda ids: make_plan(ids, 64), topk_ids, iterations=iterations),
        "combine": microseconds(
            lambda *a: call(combine.launch(*a)), outputs, weights, plan[3], iterations=iterations
        ),
    }


def tune(token_counts: list[int], iterations: int) -> list[dict[str, Any]]:
    """Measures and prints every candidate; one row each, failures with their reason."""
    num_sms = jax.devices("gpu")[0].core_count
    weights, rows = make_weights(), []
    for num_tokens in token_counts:
        glue = {k: round(v, 1) for k, v in measure_glue(num_tokens, iterations).items()}
        print(f"T={num_tokens} glue us {glue}", flush=True)
        rows.append({"num_tokens": num_tokens, "glue_us": glue})
        first: tuple[Measured, Measured] | None = None
        for config in CANDIDATES[num_tokens]:
            row = {"num_tokens": num_tokens, **dataclasses.asdict(config)}
            try:
                pair = measure_pair(config, num_tokens, weights, num_sms, iterations)
                first = first or pair
                errors = [difference(a.rows, b.rows) for a, b in zip(pair, first, strict=True)]
                if not all(error < 0.02 for error in errors):
                    raise ValueError(f"differs from the first candidate by {errors}")
                row["up_us"], row["down_us"] = (round(m.microseconds, 1) for m in pair)
            except Exception as error:  # a candidate may fail in any layer; the others go on
                row["failure"] = f"{type(error).__name__}: {str(error)[:300]}"
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
    return rows


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.triton.tune")
    parser.add_argument("--tokens", type=int, nargs="+", choices=list(CANDIDATES))
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)
    rows = tune(args.tokens or list(CANDIDATES), args.iterations)
    if args.output:
        device = str(jax.devices("gpu")[0].device_kind)
        folder = os.path.dirname(os.path.abspath(args.output))
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump({"device": device, "jax": jax.__version__, "rows": rows}, file, indent=1)
        os.replace(file.name, args.output)
    return 1 if any("failure" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
