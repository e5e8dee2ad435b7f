"""Which experts a routing chooses, in NumPy: to draw inputs, with or without torch."""

import numpy as np
from jaxtyping import BFloat16, Float32, Int

from jax_moe import DEEPSEEK_V3, MoEConfig


def topk_ids(
    logits: Float32[np.ndarray, "T E"],
    bias: BFloat16[np.ndarray, " E"],
    config: MoEConfig = DEEPSEEK_V3,
) -> Int[np.ndarray, "T k"]:
    """Group-limited top-k on the host, ties to the lowest id; for finite logits only.

    Scores are taken in f64 and rounded once, so that all machines count the same experts.
    """
    exact = logits.astype(np.float64)
    if config.scoring == "sigmoid":
        exact = 1.0 / (1.0 + np.exp(-exact))
    elif config.scoring == "softmax":
        exact = np.exp(exact - exact.max(axis=1, keepdims=True))
        exact /= exact.sum(axis=1, keepdims=True)
    else:
        exact = np.sqrt(np.logaddexp(0.0, exact))  # of the softplus
    scores = exact.astype(np.float32)
    scores = scores + bias.astype(np.float32)
    grouped = scores.reshape(len(scores), config.n_group, -1)
    best_two = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
    kept_groups = np.argsort(-best_two, axis=-1, kind="stable")[:, : config.topk_group]
    kept = np.zeros(best_two.shape, bool)
    np.put_along_axis(kept, kept_groups, True, axis=-1)
    masked = np.where(kept[..., None], grouped, -np.inf).reshape(scores.shape)
    return np.argsort(-masked, axis=-1, kind="stable")[:, : config.top_k]
