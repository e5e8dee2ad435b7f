"""The layer once more in NumPy, float64, token by token: shares no code with what it checks."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from scipy import special

TINY = np.finfo(np.float32).tiny  # 2**-126


def quantize(x: np.ndarray, scale_format: str = "f32") -> tuple[np.ndarray, np.ndarray]:
    """Rows to e4m3 values [R,C] and f32 scales [C/128,R]."""
    blocks = np.asarray(x, np.float32).reshape(len(x), x.shape[1] // 128, 128)
    blocks = np.where(np.abs(blocks) < TINY, np.float32(0), blocks)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        scales = np.maximum(np.abs(blocks).max(axis=2), 448 * TINY) / np.float32(448)
        if scale_format == "ue8m0":
            mantissa, exponent = np.frexp(scales)  # mantissa in [0.5, 1)
            power = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
            scales = np.where(np.isfinite(scales), power, scales).astype(np.float32)
        values = np.clip(blocks / scales[:, :, None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return values.reshape(x.shape), np.ascontiguousarray(scales.T)


def route(logits: Any, bias: Any, factor: float, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T,k], best first, and weights [T,k]; stable sorts send ties to the lowest id."""
    scores, keys, _, kept = _scores(logits, bias, config)
    ids = _argsort(np.where(kept, keys, -np.inf))[:, : config.top_k]
    weights = np.take_along_axis(scores, ids, axis=1)
    if config.renormalize:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return ids, weights * factor


def routing_gaps(logits: Any, bias: Any, config: Any) -> np.ndarray:
    """Per token, the narrowest gap that decides: how far what is chosen last lies from what is left
    first, of experts and of groups. Ties of equal numbers are settled by a rule: where these two
    are such a tie, the gap is that to the nearest other candidate. A tie of sums, 0.25 + 0.75 and
    0.5 + 0.5, is none, since float32 may round them apart."""
    scores, keys, biased, kept = _scores(logits, bias, config)
    added = np.broadcast_to(np.asarray(0 if bias is None else bias, np.float64), keys.shape)
    summands = np.stack([keys if bias is None else scores, added], axis=2)
    gaps = [_gap(np.where(kept, keys, -np.inf), summands, config.top_k)]
    best_two = _best_two(biased, config)
    gaps.append(_gap(best_two.sum(axis=2), best_two, config.topk_group))
    return np.minimum(*gaps)


def layer(
    logits: Any, bias: Any, x: Any, x_scale: Any, w13: Any, s13: Any, w2: Any, s2: Any,
    offset: int, factor: float, *, config: Any, requantize: bool = False, staged: Any = np.float32,
) -> np.ndarray:  # fmt: skip
    """float64 [T,H]; with `requantize` activations go through e4m3 wherever the layer does that,
    between the matmuls through `staged` first."""
    ids, weights = route(logits, bias, factor, config)
    if x_scale is None and requantize:
        x, x_scale = quantize(np.asarray(x), config.scale_format)
    x = np.asarray(x, np.float64)
    if x_scale is not None:
        x = x * np.repeat(np.asarray(x_scale, np.float64).T, 128, axis=1)
    out = np.zeros(x.shape)
    for local in range(len(w13)):
        token, choice = np.nonzero(ids == offset + local)
        if not len(token):
            continue
        g = x[token] @ _dequantize(w13[local], s13[local]).T
        up, gate = np.split(g, 2, axis=1)
        if config.swiglu_limit is not None:
            limit = config.swiglu_limit
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        hidden = gate * special.expit(gate) * up
        if requantize:
            values, scales = quantize(hidden.astype(np.float32).astype(staged), config.scale_format)
            hidden = values.astype(np.float64) * np.repeat(scales.T, 128, axis=1)
        out[token] += hidden @ _dequantize(w2[local], s2[local]).T * weights[token, choice, None]
    return out


def _scores(logits: Any, bias: Any, config: Any) -> tuple[np.ndarray, ...]:
    """Scores, what experts are compared by, what groups are made of, and whose group is kept."""
    logits = np.asarray(logits, np.float64)
    if config.scoring == "softmax":
        scores = special.softmax(logits, axis=1)
    elif config.scoring == "sqrtsoftplus":
        scores = np.sqrt(np.logaddexp(0, logits))
    else:
        scores = special.expit(logits)
    biased = scores if bias is None else scores + np.asarray(bias, np.float64)
    best = _argsort(_best_two(biased, config).sum(axis=2))[:, : config.topk_group]
    kept = (best[:, None, :] == np.arange(config.n_group)[:, None]).any(axis=2)
    kept = np.repeat(kept, biased.shape[1] // config.n_group, axis=1)
    return scores, logits if bias is None else biased, biased, kept


def _best_two(biased: np.ndarray, config: Any) -> np.ndarray:
    return np.sort(biased.reshape(len(biased), config.n_group, -1), axis=2)[:, :, -2:]


def _argsort(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")


def _gap(totals: np.ndarray, summands: np.ndarray, chosen: int) -> np.ndarray:
    if chosen == totals.shape[1]:
        return np.full(len(totals), np.inf)
    order = _argsort(totals)
    token = np.arange(len(totals))
    last, left = order[:, chosen - 1], order[:, chosen]
    boundary = totals[token, last][:, None]
    same = (summands == summands[token, last][:, None]).all(axis=2)
    others = np.abs(np.where(same, np.inf, totals) - boundary).min(axis=1)
    return np.where(same[token, left], others, boundary[:, 0] - totals[token, left])


def _dequantize(values: Any, scales: Any) -> np.ndarray:
    scales = np.asarray(scales, np.float64)
    return np.asarray(values, np.float64) * np.repeat(np.repeat(scales, 128, 0), 128, 1)
