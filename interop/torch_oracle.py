"""The layer with every option in float32 PyTorch, self-contained, one formula per line.

A second oracle: it shares no code with the JAX packages and calls PyTorch's own sigmoid, softmax
and softplus. It is also the reference source of the definitions of flashinfer-bench that have no
published workloads; `torch_definition` is that of the one that has.
"""

from __future__ import annotations

import torch

BLOCK = 128


def layer(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    *,
    top_k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    scoring: str = "sigmoid",
    renormalize: bool = True,
    swiglu_limit: float | None = None,
) -> torch.Tensor:
    """The layer in float32, nothing rounded in between, one expert dequantized at a time.

    Args:
        routing_logits: f32, bf16 or f16[T,E].
        routing_bias: bf16[E] or f32[E], or None.
        hidden_states: e4m3[T,H], or bf16, f16 or f32[T,H] with a scale of None.
        hidden_states_scale: f32[H/128,T], or None.
        gemm1_weights: e4m3[E_local,2*I,H], up first.
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        local_expert_offset: Global id of the first local expert.
        routed_scaling_factor: Factor of all weights.
        top_k: Experts per token.
        n_group: Groups of experts.
        topk_group: Groups kept.
        scoring: "sigmoid", "softmax" or "sqrtsoftplus".
        renormalize: Whether a token's weights are divided by their sum.
        swiglu_limit: Clamp before the activation, or None.

    Returns:
        bf16[T,H].
    """
    topk_ids, topk_weights = route(
        routing_logits,
        routing_bias,
        routed_scaling_factor,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scoring=scoring,
        renormalize=renormalize,
    )
    x = hidden_states.float()
    if hidden_states_scale is not None:
        x = x * hidden_states_scale.t().repeat_interleave(BLOCK, dim=1)
    out = torch.zeros_like(x)
    for expert in range(gemm1_weights.shape[0]):
        token, choice = torch.nonzero(topk_ids == local_expert_offset + expert, as_tuple=True)
        if not len(token):
            continue
        w13 = dequantize(gemm1_weights[expert], gemm1_weights_scale[expert])
        w2 = dequantize(gemm2_weights[expert], gemm2_weights_scale[expert])
        up, gate = (x[token] @ w13.t()).chunk(2, dim=1)
        if swiglu_limit is not None:
            gate = gate.clamp(max=swiglu_limit)
            up = up.clamp(min=-swiglu_limit, max=swiglu_limit)
        rows = (torch.nn.functional.silu(gate) * up) @ w2.t()
        out.index_add_(0, token, rows * topk_weights[token, choice, None])
    return out.to(torch.bfloat16)


def route(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    *,
    top_k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    scoring: str = "sigmoid",
    renormalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router alone; arguments as in `layer`.

    Returns:
        `topk_ids` i64[T,k], best first, and `topk_weights` f32[T,k].
    """
    logits = routing_logits.float()
    if scoring == "softmax":
        scores = logits.softmax(dim=1)
    elif scoring == "sqrtsoftplus":
        scores = torch.nn.functional.softplus(logits, threshold=40).sqrt()
    else:
        scores = logits.sigmoid()
    added = scores if routing_bias is None else scores + routing_bias.float()
    keys = logits if routing_bias is None else added
    if topk_group < n_group:
        grouped = (len(logits), n_group, logits.shape[1] // n_group)
        best_two = added.view(grouped).gather(2, best(keys.view(grouped), 2))
        kept = best(best_two.sum(dim=2), topk_group)
        is_kept = torch.zeros(grouped[:2], dtype=torch.bool, device=logits.device)
        is_kept.scatter_(1, kept, True)
        others = ~is_kept.repeat_interleave(grouped[2], dim=1)
    else:
        others = torch.zeros_like(logits, dtype=torch.bool)
    topk_ids = best(keys, top_k, others)
    weights = scores.gather(1, topk_ids)
    if renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return topk_ids, weights * routed_scaling_factor


def best(keys: torch.Tensor, count: int, last: torch.Tensor | None = None) -> torch.Tensor:
    """Indices of the `count` largest along the last axis, best first, ties to the lowest index.

    Args:
        keys: Numbers; a NaN is below all of them.
        count: How many.
        last: What comes after everything else, NaN too.
    """
    is_nan = keys.isnan()
    order = keys.masked_fill(is_nan, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    for below in (is_nan, last):
        if below is not None:  # stable: what is equal here stays in its order
            moved = below.gather(-1, order).to(torch.uint8).sort(dim=-1, stable=True).indices
            order = order.gather(-1, moved)
    return order[..., :count]


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 of one expert's matrix [N, K] with a scale per block of 128x128."""
    n, k = scales.shape
    blocks = values.float().view(n, BLOCK, k, BLOCK)
    return (blocks * scales[:, None, :, None]).view(values.shape)
