"""Random cases of the layer, each made from its number alone.

A number names a slot, the shapes and options that a program is compiled for, and the seed of all
data: routing pattern, spread and sign of scales, offset, factor, live rows, and a fault to inject.
`fuzz_checks` has what must hold.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_moe import DEEPSEEK_V3, LayerInputs, MoEConfig, buckets
from jax_moe.config import Precision
from tests import numpy_oracle
from tests.moe_inputs import E4M3, SMALL, replaced

BF16 = ml_dtypes.bfloat16


class Model(NamedTuple):
    """What is compiled for besides T: routing, sizes, dtypes, options."""

    config: MoEConfig
    num_experts: int
    num_local: int
    hidden: int
    intermediate: int
    dtype: Any = E4M3
    bias_dtype: Any = BF16
    precision: Precision = "fast"
    batch_invariant: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `apply`."""
        return {
            "config": self.config,
            "precision": self.precision,
            "batch_invariant": self.batch_invariant,
        }


_A = Model(SMALL, 32, 8, 256, 128)
_B = Model(DEEPSEEK_V3, 256, 32, 512, 256)
_C = Model(MoEConfig(2, 1, 1), 9, 9, 384, 256)  # an odd count of blocks, all experts local
_D = Model(MoEConfig(1, 1, 1), 8, 3, 128, 128, BF16, np.float32)
_E = Model(MoEConfig(6, 3, 2, swiglu_limit=2.5, scale_format="ue8m0"), 24, 24, 1024, 384)
_F_CONFIG = MoEConfig(8, 4, 2, swiglu_limit=0.5)  # as many experts as the kept groups hold
_F = Model(_F_CONFIG, 16, 5, 256, 512, np.float32)
_G = Model(MoEConfig(3, 3, 2), 72, 70, 256, 256, np.float16, np.float32)
_H = Model(SMALL, 32, 8, 3584, 256)  # a K that mosaic cuts
_I = Model(MoEConfig(10), 600, 512, 128, 128)  # many experts on one device
_J = _A._replace(precision="high", batch_invariant=True)
_K = _H._replace(batch_invariant=True)
_L = _D._replace(precision="high")
_M = _G._replace(precision="high", batch_invariant=True)
_N = _B._replace(batch_invariant=True)

SLOTS = (
    (_A, 16), (_H, 16), (_B, 256), (_C, 64), (_D, 1024), (_F, 256), (_E, 1024), (_A, 1), (_G, 64),
    (_B, 1024), (_A, 256), (_C, 1024), (_D, 16), (_A, 1024), (_E, 64), (_B, 16), (_G, 1024),
    (_I, 64), (_K, 16), (_J, 256), (_L, 1024), (_M, 64), (_N, 1024), (_J, 16),
)  # fmt: skip
"""Model and padded token count: one program each on every backend."""

INTERPRETED_SLOTS = (0, 7, 12)
"""Those small enough for the CPU interpreter."""

ROUTINGS = (
    "normal", "sharp", "grid", "one expert", "zipf", "nobody", "everybody", "subset", "equal",
    "extreme",
)  # fmt: skip
FAULTS = ("token", "scale", "logit", "logits", "expert", "dead rows", "huge", "tiny")


@dataclasses.dataclass
class Case:
    """One number's inputs.

    Attributes:
        number: What it was made from.
        model: Shapes and dtypes.
        padded: T that the program is compiled for.
        routing: One of `ROUTINGS`.
        fault: One of `FAULTS`, or None.
        num_tokens: Live rows, or None for all.
        inputs: The ten arguments, without the fault.
        spoiled: The same with it; `inputs` if there is none.
        touched: bool[T], tokens that the fault may reach.
        clear: bool[T], tokens whose experts do not hang on rounding.
        ids: i64[T, k], the experts by the float64 oracle.
    """

    number: int
    model: Model
    padded: int
    routing: str
    fault: str | None
    num_tokens: int | None
    inputs: LayerInputs
    spoiled: LayerInputs
    touched: np.ndarray
    clear: np.ndarray
    ids: np.ndarray

    def __str__(self) -> str:
        """For people who look at a failure."""
        return (
            f"case {self.number} ({label(slot_of(self.number))}): {len(self.ids)} tokens, "
            f"live {self.num_tokens}, offset {self.inputs.local_expert_offset}, factor "
            f"{self.inputs.routed_scaling_factor}, routing {self.routing!r}, fault {self.fault!r}"
        )


def slot_of(number: int) -> int:
    """Index of a case's slot."""
    return number % len(SLOTS)


def label(slot: int) -> str:
    """A slot in words."""
    model, padded = SLOTS[slot]
    config = model.config
    return (
        f"T={padded} top {config.top_k} of {model.num_experts} in {config.topk_group}/"
        f"{config.n_group} groups, {model.num_local} local, H={model.hidden} "
        f"I={model.intermediate} {np.dtype(model.dtype).name}"
        f"{', high' * (model.precision == 'high')}{', batch invariant' * model.batch_invariant}"
    )


def draw(number: int) -> Case:
    """Makes a case from its number."""
    model, padded = SLOTS[slot_of(number)]
    rng = np.random.default_rng([number, 5])
    tokens = int(rng.choice(_token_counts(padded)))
    x, x_scale = _activations(rng, tokens, model)
    w13, s13, w2, s2 = _weights(slot_of(number), int(rng.integers(2)))
    offset = int(rng.integers(model.num_experts - model.num_local + 1))
    routing = str(rng.choice(ROUTINGS))
    logits = _logits(rng, routing, tokens, model, offset)
    bias = rng.standard_normal(model.num_experts) * rng.choice([0.0, 0.1, 10.0])
    inputs = LayerInputs.of(
        logits,
        bias.astype(model.bias_dtype),
        x,
        x_scale,
        w13,
        _spread(rng, s13),
        w2,
        _spread(rng, s2),
        offset,
        float(rng.choice([2.5, 1.0, -1.5, 1e-6, 1e4, 0.0])),
    )
    live = None if rng.random() < 0.75 else int(rng.integers(tokens + 1))
    ids, _ = numpy_oracle.route(inputs.routing_logits, inputs.routing_bias, 1.0, model.config)
    largest = 1 + np.abs(inputs.routing_bias.astype(np.float64)).max()
    gaps = numpy_oracle.routing_gaps(inputs.routing_logits, inputs.routing_bias, model.config)
    fault = str(rng.choice(FAULTS)) if rng.random() < 0.6 else None
    spoiled, touched = _spoil(rng, fault, inputs, ids, live)
    clear = gaps > 2.0**-20 * largest
    return Case(
        number, model, padded, routing, fault, live, inputs, spoiled, touched, clear, ids
    )  # fmt: skip


def _token_counts(padded: int) -> list[int]:
    """A few token counts that are padded to the same size: each costs a small program on a GPU."""
    fitting = [n for n in range(padded // 2, padded + 1) if buckets.bucket(n) == padded]
    return [fitting[0], fitting[len(fitting) // 3], fitting[-1], fitting[-1]]


@functools.cache
def _weights(slot: int, kind: int) -> tuple[Any, Any, Any, Any]:
    """Gaussian values, or any finite ones, on the device, and even scales for outputs near one."""
    model = SLOTS[slot][0]
    rng = np.random.default_rng([slot, kind])
    arrays: list[Any] = []
    for n, k in ((2 * model.intermediate, model.hidden), (model.hidden, model.intermediate)):
        shape = (model.num_local, n, k)
        if kind:
            values, size = _any_finite(rng, shape), 64.0
        else:
            values, size = rng.standard_normal(shape, np.float32).astype(E4M3), 1.0
        scales = np.full((model.num_local, n // 128, k // 128), 1 / size / k**0.5, np.float32)
        arrays += [jnp.asarray(values), scales]
    return tuple(arrays)  # type: ignore[return-value]


def _any_finite(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    raw = rng.integers(0, 256, shape, np.uint8)
    raw[raw & 0x7F == 0x7F] = 0x7E  # NaN becomes 448
    return raw.view(E4M3)


def _spread(rng: np.random.Generator, scales: np.ndarray) -> np.ndarray:
    """Scales that differ by block, some negative, some zero."""
    decades = rng.choice([0.0, 0.5, 2.0])
    spread = scales * 10 ** rng.uniform(-decades, decades, scales.shape)
    if rng.random() < 0.3:
        spread *= rng.choice([-1, 1], scales.shape)
    if rng.random() < 0.2:
        spread *= rng.random(scales.shape) < 0.8
    return spread.astype(np.float32)


def _activations(
    rng: np.random.Generator, tokens: int, model: Model
) -> tuple[np.ndarray, np.ndarray | None]:
    shape = (tokens, model.hidden)
    x = rng.standard_normal(shape, np.float32)
    if rng.random() < 0.3:  # outliers
        x *= np.where(rng.random(shape) < 0.01, 100, 1).astype(np.float32)
    if rng.random() < 0.3:  # groups of zeros, of either sign
        zero = rng.random((tokens, model.hidden // 128)) < 0.2
        x *= np.where(zero.repeat(128, axis=1), rng.choice([-0.0, 0.0]), 1).astype(np.float32)
    decades = rng.choice([0.0, 2.0] if model.dtype == np.float16 else [0.0, 2.0, 6.0])
    rows = 10 ** rng.uniform(-decades, decades, (tokens, 1))
    if model.dtype != E4M3:
        return (x * rows).astype(model.dtype), None
    values, scales = numpy_oracle.quantize(x)
    if rng.random() < 0.2:
        values, scales = _any_finite(rng, shape), scales / 64
    return values, _spread(rng, scales * rows.T.astype(np.float32))


def _logits(
    rng: np.random.Generator, routing: str, tokens: int, model: Model, offset: int
) -> np.ndarray:
    shape = (tokens, model.num_experts)
    logits = rng.standard_normal(shape)
    local = np.arange(model.num_experts) - offset
    is_local = (local >= 0) & (local < model.num_local)
    if routing == "sharp":
        logits *= 4
    elif routing == "grid":
        logits = np.round(logits * 4) / 4
    elif routing == "one expert":
        logits[:, offset + rng.integers(model.num_local)] += 12
    elif routing == "zipf":
        order = rng.permutation(model.num_experts)
        logits = logits - 2 * np.log1p(order)
    elif routing in ("nobody", "everybody"):
        logits += np.where(is_local, -15 if routing == "nobody" else 15, 0)
    elif routing == "subset":
        logits += np.where(is_local & (rng.random(model.num_experts) < 0.5), -15, 0)
    elif routing == "equal":
        logits[:] = rng.choice([0.0, 3.25, 1e4, -1e4])
    elif routing == "extreme":
        logits = rng.choice([-1e4, -60.0, -20.0, 0.0, 5.0, 1e4], shape)
    return logits.astype(np.float32)


def _spoil(
    rng: np.random.Generator,
    fault: str | None,
    inputs: LayerInputs,
    ids: np.ndarray,
    live: int | None,
) -> tuple[LayerInputs, np.ndarray]:
    """The inputs with a fault in them, and which tokens it may reach."""
    tokens = len(ids)
    touched = np.zeros(tokens, bool)
    if fault is None:
        return inputs, touched
    logits, x = inputs.routing_logits.copy(), inputs.hidden_states.copy()
    scale = None if inputs.hidden_states_scale is None else inputs.hidden_states_scale.copy()
    s13, s2 = inputs.weights.gemm1_weights_scale.copy(), inputs.weights.gemm2_weights_scale.copy()
    poison = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32))
    victims = rng.random(tokens) < rng.choice([0.02, 0.5])
    victims[rng.integers(tokens)] = True
    if fault == "expert":
        expert = int(rng.integers(len(s2)))
        (s13 if rng.random() < 0.5 else s2)[expert] = poison
        touched = (ids == inputs.local_expert_offset + expert).any(axis=1)
    elif fault == "dead rows":
        victims = np.arange(tokens) >= (tokens if live is None else live)
        logits[victims], x[victims] = poison, np.nan
    else:
        touched = victims
        if fault == "logits":
            logits[victims] = poison
        elif fault == "logit":
            logits[victims, rng.integers(logits.shape[1])] = poison
        elif fault == "token" or scale is None:
            x[victims, rng.integers(x.shape[1])] = np.nan
        else:
            value = {"scale": poison, "huge": 1e30, "tiny": 1e-30}[fault]
            scale[rng.integers(len(scale)), victims] = value
    spoiled = replaced(
        inputs,
        routing_logits=logits,
        hidden_states=x,
        hidden_states_scale=scale,
        gemm1_weights_scale=s13,
        gemm2_weights_scale=s2,
    )
    return spoiled, touched
