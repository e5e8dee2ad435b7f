"""What the two tuners share: inputs, times, the search.

Weights and activations are random e4m3 numbers, routing is uniform. Times are of the kernel alone,
by CUPTI.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import interruption
from pallas_kernels.shapes import QUANT_BLOCK, cdiv, even_rows, max_rows, round_up
from pallas_kernels.tuning import table_format
from pallas_kernels.tuning.cache import Gpu
from pallas_kernels.tuning.table_format import Kernels, Pair, Table
from pallas_kernels.types import GroupPlan, Quantized

_TOKENS = (80, 901, 14107, 400, 200, 32, 1, 3000, 60000)
_MAX_TOKENS = 2**20
_MAX_DIFFERENCE = 0.02
_GAIN = 0.99  # a change must make the kernel 1 % faster, or it is noise


class Sizes(NamedTuple):
    """Of the layer that is measured; the defaults are DeepSeek-V3's, on one rank of eight."""

    hidden_size: int = 7168
    intermediate_size: int = 2048
    num_experts: int = 256
    num_local_experts: int = 32
    top_k: int = 8

    @property
    def of_table(self) -> table_format.Sizes:
        """What its table is found by."""
        return table_format.Sizes(self.hidden_size, self.intermediate_size, self.num_local_experts)


DEEPSEEK_V3 = Sizes()


class Weights(NamedTuple):
    """Of the local experts, as the two matmuls take them: values and scales."""

    up_projection: tuple[jax.Array, jax.Array]
    down_projection: tuple[jax.Array, jax.Array]


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
        kernels: What has tables.
        gpu: Whose tables.
        choices: Of a configuration, and the number of 128-column steps along K, the values to try
            for some of its fields.
        block_m: The class of so many rows per expert.
        prepare: Makes a case's inputs.
        tokens: A class is measured at the first of these that belongs to it, else at the least
            number that does.
    """

    kernels: Kernels[Any]
    gpu: Gpu
    choices: Callable[[Any, int], Mapping[str, Sequence[Any]]]
    block_m: Callable[[float], int]
    prepare: Callable[[Case, Weights, Sizes], Prepared]
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
        blocks = (sizes.num_local_experts, n // QUANT_BLOCK, k // QUANT_BLOCK)
        return random_e4m3(seed, (sizes.num_local_experts, n, k)), jnp.full(blocks, k**-0.5)

    return Weights(
        of_experts(1, 2 * sizes.intermediate_size, sizes.hidden_size),
        of_experts(2, sizes.hidden_size, sizes.intermediate_size),
    )


def unit_rows(seed: int, rows: int, columns: int) -> Quantized:
    """Random quantized rows: e4m3[rows, columns] and scales of one, f32[columns/128, rows]."""
    scales = jnp.ones((columns // QUANT_BLOCK, rows))
    return Quantized(random_e4m3(seed, (rows, columns)), scales)


def draw_plan(num_tokens: int, block_m: int, sizes: Sizes) -> GroupPlan:
    """Each token goes to each local expert with the odds of uniform routing, but to top_k at most.

    As everywhere the arrays have the length of the worst case, all pairs local.
    """
    odds = sizes.top_k / sizes.num_experts
    drawn = np.random.default_rng(0).random((num_tokens, sizes.num_local_experts)) < odds
    chosen = drawn & (np.cumsum(drawn, axis=1) <= sizes.top_k)
    group_sizes = chosen.sum(axis=0, dtype=np.int32)
    tiles = np.array([cdiv(int(size), block_m) for size in group_sizes], np.int32)
    group_offsets = (np.cumsum(tiles) - tiles).astype(np.int32) * block_m
    rows = round_up(max_rows(num_tokens, sizes.top_k, sizes.num_local_experts, block_m), 32)
    row_token = np.full(rows, -1, np.int32)
    pair_row = np.full((num_tokens, sizes.top_k), -1, np.int32)
    choice = np.cumsum(chosen, axis=1) - 1
    for expert, (offset, size) in enumerate(zip(group_offsets, group_sizes, strict=True)):
        tokens = np.flatnonzero(chosen[:, expert])
        row_token[offset : offset + size] = tokens
        pair_row[tokens, choice[tokens, expert]] = np.arange(offset, offset + size)
    tile_expert = np.zeros(cdiv(rows, block_m), np.int32)
    tile_expert[: tiles.sum()] = np.repeat(np.arange(len(tiles)), tiles)
    num_tiles = tiles.sum(dtype=np.int32, keepdims=True)
    plan: tuple[Any, ...] = group_sizes, group_offsets, row_token, pair_row, tile_expert, num_tiles
    return GroupPlan(*plan)


def dequantized(values: jax.Array, scales: jax.Array, rows: np.ndarray) -> jax.Array:
    """Some rows of a quantized array in f32."""
    return values[rows].astype(jnp.float32) * jnp.repeat(scales[:, rows].T, QUANT_BLOCK, axis=1)


def cupti_timer(iterations: int) -> Timer:
    """Median GPU time of the kernels of a function."""

    def timer(function: Callable[..., Any], arrays: tuple[Any, ...]) -> float:
        times: Any = profiler.measure(function, iterations=iterations)(*arrays)[1]
        return statistics.median(times if isinstance(times, list) else [times]) * 1e3

    return timer


def difference(result: jax.Array, expected: jax.Array) -> float:
    """Relative, in the Frobenius norm; NaN where either is not finite."""
    result, expected = result.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(result - expected) / jnp.linalg.norm(expected))


def tune(
    tuner: Tuner, start: Table[Any], timer: Timer, sizes: Sizes, progress: Any
) -> tuple[Table[Any], list[dict[str, Any]]]:
    """Measures every class and matmul.

    Args:
        tuner: What to tune.
        start: Where the search starts, a row per class.
        timer: How to time.
        sizes: Of the layer.
        progress: A `tqdm` bar, or whatever has its `total`, `update` and `write`.

    Returns:
        The table, and a row for each measurement, failures with their reason.
    """
    cases = [
        Case(role, block_m, tokens_of(block_m, tuner, sizes))
        for block_m in start
        for role in Pair._fields
    ]
    weights, best, rows = random_weights(sizes), {}, []
    steps = Pair(sizes.hidden_size // QUANT_BLOCK, sizes.intermediate_size // QUANT_BLOCK)
    firsts = [getattr(start[case.block_m], case.role) for case in cases]
    choices = [
        tuner.choices(first, getattr(steps, case.role))
        for first, case in zip(firsts, cases, strict=True)
    ]
    progress.total = len(cases) + sum(sum(map(len, values.values())) for values in choices)
    for case, first, values in zip(cases, firsts, choices, strict=True):
        attempt = _Attempts(case, tuner.prepare(case, weights, sizes), timer, progress)
        best[case.block_m, case.role] = search(first, values, attempt)
        rows += attempt.rows
    table = {block_m: Pair(*(best[block_m, role] for role in Pair._fields)) for block_m in start}
    return table, rows


def tokens_of(block_m: int, tuner: Tuner, sizes: Sizes) -> int:
    """The token count at which a class is measured.

    Raises:
        ValueError: No token count belongs to it.
    """
    for num_tokens in itertools.chain(tuner.tokens, range(1, _MAX_TOKENS)):
        if tuner.block_m(even_rows(num_tokens, sizes.top_k, sizes.num_experts)) == block_m:
            return num_tokens
    raise ValueError(f"block_m={block_m}: expected a token count of this class, got none")


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
        interruption.check()
        self._progress.update(1)
        row = self._case._asdict() | {**dataclasses.asdict(config), **changes}
        try:
            config = dataclasses.replace(config, **changes)
            if config in self._known:
                return self._known[config]
            row["us"] = self._known[config] = round(self._time(config), 1)
        except Exception as error:  # a candidate may fail in any layer; the others go on
            interruption.check()  # it may also be what a signal was turned into
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
