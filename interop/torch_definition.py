"""The definition in float32 PyTorch, self-contained: the reference source of flashinfer-bench.

One expert at a time bounds the memory. As in the published reference every local expert is
dequantized, chosen or not, so that speedups over it have the same denominator. Routing follows
DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).
"""

import torch

TOP_K, N_GROUP, TOPK_GROUP, BLOCK = 8, 8, 4, 128


def run(
    routing_logits,
    routing_bias,
    hidden_states,
    hidden_states_scale,
    gemm1_weights,
    gemm1_weights_scale,
    gemm2_weights,
    gemm2_weights_scale,
    local_expert_offset,
    routed_scaling_factor,
):
    """Computes bf16[T, H]; arguments in the definition's order, tensors on one device."""
    topk_ids, topk_weights = route(routing_logits, routing_bias, routed_scaling_factor)
    num_tokens, hidden_size = hidden_states.shape
    intermediate_size = gemm2_weights.shape[2]
    blocks = hidden_states.float().view(num_tokens, hidden_size // BLOCK, BLOCK)
    x = (blocks * hidden_states_scale.t()[:, :, None]).view(num_tokens, hidden_size)
    out = torch.zeros(num_tokens, hidden_size, dtype=torch.float32, device=x.device)
    for expert in range(gemm1_weights.shape[0]):
        w13 = dequantize(gemm1_weights[expert], gemm1_weights_scale[expert])
        w2 = dequantize(gemm2_weights[expert], gemm2_weights_scale[expert])
        chosen = topk_ids == int(local_expert_offset) + expert
        tokens = chosen.any(dim=1).nonzero()[:, 0]
        if tokens.numel() == 0:
            continue
        gemm1 = x[tokens] @ w13.t()
        up, gate = gemm1[:, :intermediate_size], gemm1[:, intermediate_size:]
        weight = torch.where(chosen[tokens], topk_weights[tokens], 0.0).sum(dim=1)
        # A token picks an expert at most once, so no two rows of one index_add_ meet.
        out.index_add_(0, tokens, (gate * torch.sigmoid(gate) * up) @ w2.t() * weight[:, None])
    return out.to(torch.bfloat16)


def route(routing_logits, routing_bias, routed_scaling_factor):
    """Group-limited top-k, ties to the lowest id: ids i64[T, 8], best first, weights f32[T, 8]."""
    scores = 1.0 / (1.0 + torch.exp(-routing_logits.float()))
    ranks = rank(scores + routing_bias.float())
    num_tokens, num_experts = ranks.shape
    grouped = ranks.view(num_tokens, N_GROUP, num_experts // N_GROUP)
    biased = (scores + routing_bias.float()).view(grouped.shape)
    best_two = biased.gather(2, best(grouped, 2))
    kept = best(rank(best_two[..., 0] + best_two[..., 1]), TOPK_GROUP)
    is_kept = torch.zeros(num_tokens, N_GROUP, dtype=torch.bool, device=ranks.device)
    is_kept.scatter_(1, kept, True)
    lowest = torch.iinfo(torch.int32).min
    topk_ids = best(grouped.masked_fill(~is_kept[:, :, None], lowest).view(ranks.shape), TOP_K)
    chosen = scores.gather(1, topk_ids)
    total = chosen.sum(dim=1, keepdim=True) + 1e-20
    return topk_ids, chosen / total * routed_scaling_factor


def rank(scores):
    """Integers in the order of the scores; NaN lies below -inf, all above int32's minimum."""
    bits = scores.contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.masked_fill(torch.isnan(scores), torch.iinfo(torch.int32).min + 1)


def best(ranks, count):
    """Indices of the `count` largest along the last axis, best first, ties to the lowest index."""
    return torch.sort(ranks, dim=-1, descending=True, stable=True).indices[..., :count]


def dequantize(values, scales):
    """Float32 of one expert's matrix [N, K] with a scale per block of 128x128."""
    n, k = scales.shape
    blocks = values.float().view(n, BLOCK, k, BLOCK)
    return (blocks * scales[:, None, :, None]).view(values.shape)
