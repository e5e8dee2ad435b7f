"""What the two tuners share: inputs, times, the search, the command line.

Weights and activations are random e4m3 numbers of DeepSeek-V3's sizes, routing is uniform with as
many local pairs as tokens. Times are of the kernel alone, by CUPTI.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler
from tqdm import tqdm

from pallas_kernels import device
from pallas_kernels.shapes import QUANT_BLOCK, cdiv, even_rows, max_rows, round_up
from pallas_kernels.tuning import cache
from pallas_kernels.tuning.cache import Pair, Table

_TOKENS = (80, 901, 14107, 400, 200, 32, 1, 3000, 60000)
_MAX_DIFFERENCE = 0.02
_GAIN = 0.99  # a change must make the kernel 1 % faster, or it is noise


class Sizes(NamedTuple):
    """Of the layer that is measured."""

    hidden: int = 7168
    intermediate: int = 2048
    experts: int = 256
    local_experts: int = 32
    top_k: int = 8


DEEPSEEK_V3 = Sizes()


class Weights(NamedTuple):
    """Of the local experts, as the two matmuls take them: values and scales."""

    up_projection: tuple[jax.Array, jax.Array]
    down_projection: tuple[jax.Array, jax.Array]


class Plan(NamedTuple):
    """The fields of a group plan that the matmuls read."""

    group_sizes: np.ndarray
    group_offsets: np.ndarray
    row_token: np.ndarray
    tile_expert: np.ndarray
    num_tiles: np.ndarray


class Case(NamedTuple):
    """One matmul with one routing."""

    role: str
    block_m: int
    num_tokens: int


class Prepared(NamedTuple):
    """A case with its inputs.

    Attributes:
        arrays: What the kernel takes.
        build: A configuration's kernel, as a function of `arrays`.
        rows: Of the kernel's result, what must not depend on the configuration.
    """

    arrays: tuple[Any, ...]
    build: Callable[[Any], Callable[..., Any]]
    rows: Callable[[Any], jax.Array]


class Tuner(NamedTuple):
    """A set of kernels to tune.

    Attributes:
        kernels: Its name in the cache.
        shipped: Its table; the search starts there.
        choices: Of a configuration, the values to try for some of its fields.
        block_m: The class of so many rows per expert.
        prepare: Makes a case's inputs.
        check: As for `cache.choose`.
        tokens: A class is measured at the first of these that belongs to it.
    """

    kernels: str
    shipped: Table[Any]
    choices: Callable[[Any], Mapping[str, Sequence[Any]]]
    block_m: Callable[[float], int]
    prepare: Callable[[Case, Weights, Sizes], Prepared]
    check: cache.Check[Any]
    tokens: tuple[int, ...] = _TOKENS


type Timer = Callable[[Callable[..., Any], tuple[Any, ...]], float]
"""Time of a jitted function on some arrays, in us."""


def random_e4m3(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Any finite e4m3 below 2: the highest bit of the exponent is cleared."""
    raw = jax.random.bits(jax.random.key(seed), shape, jnp.uint8) & np.uint8(0b10111111)
    return jax.lax.bitcast_convert_type(raw, jnp.float8_e4m3fn)


def random_weights(sizes: Sizes) -> Weights:
    """All experts' weights (DeepSeek-V3: 1.4 GB), with one scale for every block."""

    def of_experts(seed: int, n: int, k: int) -> tuple[jax.Array, jax.Array]:
        blocks = (sizes.local_experts, n // QUANT_BLOCK, k // QUANT_BLOCK)
        return random_e4m3(seed, (sizes.local_experts, n, k)), jnp.full(blocks, k**-0.5)

    return Weights(
        of_experts(1, 2 * sizes.intermediate, sizes.hidden),
        of_experts(2, sizes.hidden, sizes.intermediate),
    )


def unit_rows(seed: int, rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Random quantized rows: e4m3[rows, columns] and scales of one, f32[columns/128, rows]."""
    return random_e4m3(seed, (rows, columns)), jnp.ones((columns // QUANT_BLOCK, rows))


def draw_plan(num_tokens: int, block_m: int, sizes: Sizes) -> Plan:
    """Each token goes to each local expert with the odds of uniform routing, but to top_k at most.

    As everywhere the arrays have the length of the worst case, all pairs local.
    """
    odds = sizes.top_k / sizes.experts
    drawn = np.random.default_rng(0).random((num_tokens, sizes.local_experts)) < odds
    chosen = drawn & (np.cumsum(drawn, axis=1) <= sizes.top_k)
    group_sizes = chosen.sum(axis=0, dtype=np.int32)
    tiles = np.array([cdiv(int(size), block_m) for size in group_sizes], np.int32)
    group_offsets = (np.cumsum(tiles) - tiles).astype(np.int32) * block_m
    rows = round_up(max_rows(num_tokens, sizes.top_k, sizes.local_experts, block_m), 32)
    row_token = np.full(rows, -1, np.int32)
    for expert, (offset, size) in enumerate(zip(group_offsets, group_sizes, strict=True)):
        row_token[offset : offset + size] = np.flatnonzero(chosen[:, expert])
    tile_expert = np.zeros(cdiv(rows, block_m), np.int32)
    tile_expert[: tiles.sum()] = np.repeat(np.arange(len(tiles)), tiles)
    return Plan(group_sizes, group_offsets, row_token, tile_expert, tiles.sum(keepdims=True))


def dequantized(values: jax.Array, scales: jax.Array, rows: np.ndarray) -> jax.Array:
    """Some rows of a quantized array in f32."""
    return values[rows].astype(jnp.float32) * jnp.repeat(scales[:, rows].T, QUANT_BLOCK, axis=1)


def cupti_timer(iterations: int) -> Timer:
    """Median GPU time of the kernels of a function."""

    def timer(function: Callable[..., Any], arrays: tuple[Any, ...]) -> float:
        times: Any = profiler.measure(function, iterations=iterations)(*arrays)[1]
        return statistics.median(times if isinstance(times, list) else [times]) * 1e3

    return timer


def difference(found: jax.Array, expected: jax.Array) -> float:
    """Relative, in the Frobenius norm; NaN where either is not finite."""
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def tune(
    tuner: Tuner, timer: Timer, sizes: Sizes, progress: Any
) -> tuple[Table[Any], list[dict[str, Any]]]:
    """Measures every class and matmul.

    Args:
        tuner: What to tune.
        timer: How to time.
        sizes: Of the layer.
        progress: A `tqdm` bar, or whatever has its `total`, `update` and `write`.

    Returns:
        The table, and a row for each measurement, failures with their reason.
    """
    cases = [
        Case(role, block_m, tokens_of(block_m, tuner, sizes))
        for block_m in tuner.shipped
        for role in Pair._fields
    ]
    weights, found, rows = random_weights(sizes), {}, []
    progress.total = sum(
        1 + sum(map(len, tuner.choices(getattr(tuner.shipped[case.block_m], case.role)).values()))
        for case in cases
    )
    for case in cases:
        attempt = _Attempts(case, tuner.prepare(case, weights, sizes), timer, progress)
        shipped = getattr(tuner.shipped[case.block_m], case.role)
        found[case.block_m, case.role] = search(shipped, tuner.choices(shipped), attempt)
        rows += attempt.rows
    table = {
        block_m: Pair(*(found[block_m, role] for role in Pair._fields)) for block_m in tuner.shipped
    }
    return table, rows


def tokens_of(block_m: int, tuner: Tuner, sizes: Sizes) -> int:
    """The token count at which a class is measured."""
    for num_tokens in tuner.tokens:
        if tuner.block_m(even_rows(num_tokens, sizes.top_k, sizes.experts)) == block_m:
            return num_tokens
    raise ValueError(f"block_m={block_m}: expected one of T={tuner.tokens} in this class")


def search[C](
    start: C, choices: Mapping[str, Sequence[Any]], attempt: Callable[[C, dict[str, Any]], float]
) -> C:
    """Changes one field at a time and keeps what is at least 1 % faster.

    Args:
        start: Where to start.
        choices: Values to try for some of the fields, in this order.
        attempt: Time of a configuration with some fields replaced, infinite if it fails.
    """
    best, least = start, attempt(start, {})
    for field, values in choices.items():
        for value in values:
            time = attempt(best, {field: value})
            if time < least * _GAIN:
                best, least = dataclasses.replace(best, **{field: value}), time  # type: ignore[type-var]
    return best


class _Attempts:
    """Times the configurations of one case; each must give the result of the first one."""

    def __init__(self, case: Case, prepared: Prepared, timer: Timer, progress: Any) -> None:
        self.rows: list[dict[str, Any]] = []
        self._case, self._prepared, self._timer, self._progress = case, prepared, timer, progress
        self._expected: jax.Array | None = None
        self._known: dict[Any, float] = {}

    def __call__(self, config: Any, changes: dict[str, Any]) -> float:
        self._progress.update(1)
        row = self._case._asdict() | {**dataclasses.asdict(config), **changes}
        try:
            config = dataclasses.replace(config, **changes)
            if config in self._known:
                return self._known[config]
            row["us"] = self._known[config] = round(self._time(config), 1)
        except Exception as error:  # a candidate may fail in any layer; the others go on
            row["failure"] = f"{type(error).__name__}: {error!s:.300}"
        self._progress.write("  ".join(f"{name} {value}" for name, value in row.items()))
        self.rows.append(row)
        return row.get("us", float("inf"))

    def _time(self, config: Any) -> float:
        function = jax.jit(self._prepared.build(config))
        rows = self._prepared.rows(function(*self._prepared.arrays))
        if self._expected is None:
            self._expected = rows
        error = difference(rows, self._expected)
        if not error < _MAX_DIFFERENCE:
            raise ValueError(f"differs from the first candidate by {error}")
        return self._timer(function, self._prepared.arrays)


def main(
    argv: list[str],
    module: str,
    tuners: Callable[[jax.Device], Tuner | str],
    sizes: Sizes = DEEPSEEK_V3,
) -> int:
    """The command line of a tuner; returns the exit code.

    Args:
        argv: Arguments.
        module: What `python -m` runs.
        tuners: The tuner for a GPU, or why there is none, in a few words.
        sizes: Of the layer that is measured.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description="Measures tilings on this GPU and keeps the best ones in the cache folder.",
    )
    parser.add_argument("--iterations", type=int, default=10, help="calls of each candidate")
    parser.add_argument("--output", type=Path, help="file to write instead of the cache")
    args = parser.parse_args(argv)
    gpu = device.local_gpu()
    tuner = tuners(gpu) if gpu is not None else "needs an NVIDIA GPU, and JAX sees none"
    if gpu is None or isinstance(tuner, str):
        return _failed(f"{module}: {tuner}")
    try:
        path = args.output or cache.path_of(tuner.kernels, gpu.device_kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # asked now, not after minutes
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        return _failed(f"{module}: cannot write the table: {error}")
    with tqdm(unit="tiling") as progress:
        table, rows = tune(tuner, cupti_timer(args.iterations), sizes, progress)
    try:
        cache.write(path, tuner.kernels, gpu.device_kind, table, rows)
    except OSError as error:
        return _failed(f"{module}: cannot write the table: {error}")
    for line in _summary(tuner.shipped, table):
        print(line)
    print(f"{path}: written{'' if args.output else '; programs started from now on use it'}")
    return 0


def _failed(line: str) -> int:
    print(line, file=sys.stderr)
    return 1


def _summary(shipped: Table[Any], table: Table[Any]) -> Iterator[str]:
    for block_m, pair in table.items():
        for role, config in pair._asdict().items():
            same = config == getattr(shipped[block_m], role)
            yield f"{role} {config}{' (as shipped)' if same else ''}"
