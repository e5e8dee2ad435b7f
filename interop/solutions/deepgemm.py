"""DeepGEMM (PyPI sgl-deep-gemm), the strongest peer, on local pairs only, with Triton glue.

Six kernels and a memset, no host synchronization, buffers of the static worst case (every pair
local). Any sizes, and routers of sigmoid or softmax whose weights are renormalized.
"""

import functools
import math
from typing import Any

from interop.solutions.base import Solution
from interop.solutions.packages import hopper_unavailable, missing, nvcc_unavailable
from jax_moe import DEEPSEEK_V3, LayerInputs, MoEConfig

_FEW_TOKENS = 1000  # up to here 64-row tiles waste less padding than they cost, measured on an H100


def run(*arguments: Any, alignment: int | None = None, config: MoEConfig = DEEPSEEK_V3) -> Any:
    """The layer on the definition's ten arguments.

    Args:
        *arguments: CUDA tensors and two numbers in the definition's order; a bias, if only zeros.
        alignment: rows that each expert is padded to, 64 or 128; None picks by T.
        config: The router; `unsupported` says which are not computed.

    Returns:
        bf16[T, H].
    """
    import torch

    inputs: Any = LayerInputs.of(*arguments)  # of PyTorch's tensors
    hidden = inputs.hidden_states
    gemm1_weights, gemm1_scale, gemm2_weights, gemm2_scale = inputs.weights
    num_tokens, hidden_size = hidden.shape
    num_experts = inputs.routing_logits.shape[1]
    if num_tokens == 0:
        return torch.empty(0, hidden_size, dtype=torch.bfloat16, device=hidden.device)
    align = alignment or (64 if num_tokens <= _FEW_TOKENS else 128)
    gemm = functools.partial(_grouped_gemm, align, -(-num_tokens * config.top_k // num_experts))
    routing = route(
        inputs.routing_logits,
        inputs.routing_bias,
        inputs.local_expert_offset,
        inputs.routed_scaling_factor,
        inputs.weights.num_local_experts,
        config,
    )
    rows, row_scale, pair_row, ends = gather(hidden, inputs.hidden_states_scale, routing, align)
    activations = swiglu_quantize(
        gemm((rows, row_scale), (gemm1_weights, gemm1_scale), ends), ends, align
    )
    return unpermute(gemm(activations, (gemm2_weights, gemm2_scale), ends), routing[2], pair_row)


def route(
    logits: Any,
    bias: Any,
    offset: int,
    factor: float,
    num_local_experts: int,
    config: MoEConfig = DEEPSEEK_V3,
    out: tuple[Any, Any] | None = None,
) -> Any:
    """Routing of T tokens.

    Args:
        logits: f32[T, E].
        bias: bf16[E] or f32[E].
        offset: First local expert.
        factor: Multiplies the weights.
        num_local_experts: E_local.
        config: The router.
        out: Where pair_expert (i32 or i64) and weights go; None allocates them.

    Returns:
        pair_expert i32[T, k] (local expert or -1), pair_slot i32[T, k] (place in the expert),
        weights f32[T, k], counts i32[E_local].
    """
    import torch

    from interop.solutions.deepgemm_kernels import route_kernel

    num_tokens, num_experts = logits.shape
    shape, device = (num_tokens, config.top_k), logits.device
    pair_expert, weights = out or (
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )
    pair_slot = torch.empty(shape, dtype=torch.int32, device=device)
    counts = torch.zeros(num_local_experts, dtype=torch.int32, device=device)
    n_group, topk_group = groups_of(config, num_experts)
    route_kernel[(num_tokens,)](
        logits, bias, pair_expert, pair_slot, weights, counts, int(offset), float(factor),
        E=num_experts, E_LOCAL=num_local_experts, N_GROUP=n_group, TOPK_GROUP=topk_group,
        TOP_K=config.top_k, GROUP_BLOCK=block(num_experts // n_group),
        SOFTMAX=config.scoring == "softmax", num_warps=1,
    )  # fmt: skip
    return pair_expert, pair_slot, weights, counts


def groups_of(config: MoEConfig, num_experts: int) -> tuple[int, int]:
    """Groups that the kernel splits E experts into, and how many it keeps.

    Where the router keeps all, any even split into groups of two or more gives its choice; so does
    one group, which an odd E is.
    """
    if config.topk_group < config.n_group:
        return config.n_group, config.topk_group
    n_group = max(1, math.gcd(num_experts, 16) // 2)
    return n_group, n_group


def block(count: int) -> int:
    """The least power of two that holds so many."""
    return 1 << (count - 1).bit_length()


def gather(hidden: Any, hidden_scale: Any, routing: Any, align: int) -> Any:
    """Copies each local pair's activations to its row.

    Returns:
        rows e4m3[M, H], row_scale f32[H/128, M], pair_row i32[T, k] (-1 where not local), ends
        i32[E_local].
    """
    import torch

    from interop.solutions.deepgemm_kernels import gather_kernel

    pair_expert, pair_slot, _, counts = routing
    num_tokens, hidden_size = hidden.shape
    num_local_experts, top_k = counts.shape[0], pair_expert.shape[1]
    num_rows = max_rows(num_tokens, num_local_experts, align, top_k)
    num_scales = hidden_scale.shape[0]
    rows = hidden.new_empty(num_rows, hidden_size)
    row_scale = hidden_scale.new_empty(num_scales, num_rows)
    pair_row, ends = torch.empty_like(pair_expert), torch.empty_like(counts)
    gather_kernel[(num_tokens,)](
        hidden.view(torch.int32), hidden_scale, pair_expert, pair_slot, counts,
        rows.view(torch.int32), row_scale, pair_row, ends, num_tokens, num_rows,
        ALIGN=align, E_LOCAL=num_local_experts, E_BLOCK=block(num_local_experts), TOP_K=top_k,
        WORDS=hidden_size // 4, SCALES=num_scales, BLOCK=1024, SCALE_BLOCK=block(num_scales),
        num_warps=4,
    )  # fmt: skip
    return rows, row_scale, pair_row, ends


def swiglu_quantize(gemm1: Any, ends: Any, align: int) -> Any:
    """`silu(second half) * first half` to e4m3[M, I] and scales f32[I/128, M], live rows only."""
    import torch

    from interop.solutions.deepgemm_kernels import swiglu_quantize_kernel

    num_rows, intermediate_size = gemm1.shape[0], gemm1.shape[1] // 2
    values = gemm1.new_empty(num_rows, intermediate_size, dtype=torch.float8_e4m3fn)
    scales = gemm1.new_empty(intermediate_size // 128, num_rows, dtype=torch.float32)
    groups = 4 if intermediate_size % 512 == 0 else 1
    items = num_rows // 8 * (intermediate_size // (128 * groups))
    swiglu_quantize_kernel[(min(items, 132 * 8),)](
        gemm1, ends, values, scales, num_rows,
        ALIGN=align, E_LOCAL=ends.shape[0], E_BLOCK=block(ends.shape[0]),
        INTERMEDIATE=intermediate_size, ROWS=8, GROUPS=groups, num_warps=4,
    )  # fmt: skip
    return values, scales


def unpermute(expert_outputs: Any, weights: Any, pair_row: Any) -> Any:
    """bf16[T, H]: each token's weighted sum over its local pairs."""
    import torch

    from interop.solutions.deepgemm_kernels import unpermute_kernel

    num_tokens, hidden_size = pair_row.shape[0], expert_outputs.shape[1]
    out = torch.empty(num_tokens, hidden_size, dtype=torch.bfloat16, device=pair_row.device)
    unpermute_kernel[(num_tokens, -(-hidden_size // 1024))](
        expert_outputs, weights, pair_row, out,
        H=hidden_size, TOP_K=pair_row.shape[1], BLOCK_H=1024, num_warps=4,
    )  # fmt: skip
    return out


def max_rows(
    num_tokens: int, num_local_experts: int, align: int, top_k: int = DEEPSEEK_V3.top_k
) -> int:
    """Rows of the worst case: every pair local, every expert that can be hit padded."""
    pairs = num_tokens * min(top_k, num_local_experts)
    padding = min(num_local_experts, pairs) * (align - 1)
    return -(-(pairs + padding) // align) * align


def _grouped_gemm(align: int, expected_rows: int, a: Any, weights: Any, ends: Any) -> Any:
    """bf16[M, N]: `a[rows of e] @ weights[e].T`, block scales applied; live tiles only."""
    import deep_gemm
    import torch

    values, scales = a
    out = values.new_empty(values.shape[0], weights[0].shape[1], dtype=torch.bfloat16)
    deep_gemm.set_mk_alignment_for_contiguous_layout(align)
    if hasattr(deep_gemm, "set_pdl"):
        deep_gemm.set_pdl(True)  # off by default: its launch then overlaps the previous kernel
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (values, scales.t()),
        weights,
        out,
        ends,
        use_psum_layout=True,
        expected_m_for_psum_layout=expected_rows,
    )
    return out


def unavailable_reason() -> str | None:
    """Why DeepGEMM cannot be used here, or None."""
    packages = (("deep_gemm", "sgl-deep-gemm"), ("tvm_ffi", "apache-tvm-ffi"), ("triton", "triton"))
    for package, distribution in packages:
        if reason := missing(package, distribution):
            return reason
    return nvcc_unavailable() or hopper_unavailable()


def unsupported(config: MoEConfig) -> str | None:
    """Why the glue does not compute a layer, or None; any sizes that `MoEConfig` allows are taken.

    Args:
        config: Of the layer.
    """
    if config.scoring not in ("sigmoid", "softmax") or not config.renormalize:
        return f"routes by renormalized sigmoid or softmax scores only, got {config}"
    if config.top_k & (config.top_k - 1):
        return f"takes a power of two of experts per token only, got {config.top_k}"
    if config.swiglu_limit is not None or config.scale_format != "f32":
        return f"has no clamp and scales of any size only, got {config}"
    return None


def solutions(config: MoEConfig = DEEPSEEK_V3) -> tuple[Solution, ...]:
    """The three of them, for a router.

    Args:
        config: Of the layer.
    """
    return (
        _solution("deepgemm", None, "64-row tiles up to T=1000, 128-row tiles above", config),
        _solution("deepgemm64", 64, "64-row tiles", config),
        _solution("deepgemm128", 128, "128-row tiles", config),
    )


def _solution(name: str, alignment: int | None, detail: str, config: MoEConfig) -> Solution:
    reason = unsupported(config)
    return Solution(
        name=name,
        framework="torch",
        description=f"DeepGEMM grouped GEMMs with Triton glue, local pairs only; {detail}",
        run=functools.partial(run, alignment=alignment, config=config),
        unavailable_reason=(lambda: reason) if reason else unavailable_reason,
        design={
            "Rows computed": "local pairs only",
            "SwiGLU": "Triton, fused with the quantization",
            "Intermediate quantization": "Triton, fused with SwiGLU",
            "GEMM workspace": "none",
        },
    )
