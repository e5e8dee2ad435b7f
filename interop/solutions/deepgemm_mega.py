"""DeepGEMM's fused layer for Hopper, `fp8_mega_moe` (PyPI sgl-deep-gemm), on a group of one rank.

One persistent kernel dispatches tokens, runs both matmuls with SwiGLU between them and adds up. Its
ranks meet in a buffer of symmetric memory. Of one rank all addresses are its own, so plain memory
does and no process group is needed; what routes to other ranks is left out with the id -1.

Its own steps are the rest: our router (`deepgemm.route`) writes ids and weights into the buffer,
and a kernel copies the activations there. In practice the router's and the quantization's kernels
would write them.
"""

from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from interop.solutions import deepgemm
from interop.solutions.base import Solution
from jax_moe import DEEPSEEK_V3, ExpertWeights, LayerInputs

_KERNEL = Path("include", "deep_gemm", "impls", "sm90_fp8_mega_moe.cuh")


def prepare(inputs: LayerInputs) -> tuple[Any, ...]:
    """Puts the weights' rows in the kernel's order and makes its buffer.

    Args:
        inputs: CUDA tensors and two numbers.

    Returns:
        The ten arguments with other weights, and the buffer.
    """
    import deep_gemm

    # `from_gate_up` swaps the halves: here from up first to gate first.
    w13, w13_scale, w2, w2_scale = ExpertWeights.from_gate_up(*inputs.weights)
    (w13, w13_scale), (w2, w2_scale) = deep_gemm.transform_weights_for_mega_moe_sm90(
        (w13, w13_scale), (w2, w2_scale)
    )
    weights = ExpertWeights(w13, w13_scale, w2, w2_scale)
    return (*inputs._replace(weights=weights).arguments, buffer_for(inputs))


def buffer_for(inputs: LayerInputs) -> Any:
    """What DeepGEMM's `SM90SymmBuffer` is, of one rank and in plain memory.

    Args:
        inputs: CUDA tensors; only their shapes and the device count.

    Returns:
        `tensor` u8 of all of it, zeroed, and views of where a call puts its inputs, for
        `max_tokens` tokens: `words` i32[max,H/4], `scales` f32[max,H/128], `ids` i64[max,k],
        `topk_weights` f32[max,k]; and the attributes that `fp8_mega_moe` reads.
    """
    import deep_gemm
    import torch

    num_tokens, hidden_size = inputs.hidden_states.shape
    num_experts, top_k = inputs.weights.num_local_experts, DEEPSEEK_V3.top_k
    multiple = deep_gemm._C.get_token_alignment_for_mega_moe()
    max_tokens = -(-max(num_tokens, 1) // multiple) * multiple
    num_bytes, views = deep_gemm._C.get_symm_buffer_size_for_sm90_mega_moe(
        1, num_experts, max_tokens, top_k, hidden_size, inputs.weights.intermediate_size, True,
        "swiglu",
    )  # fmt: skip
    hidden: Any = inputs.hidden_states
    # Zeros are the state that a call expects and leaves behind.
    tensor = torch.zeros(num_bytes, dtype=torch.int8, device=hidden.device)
    x, scales, ids, topk_weights = (
        one if isinstance(one, torch.Tensor) else torch.from_dlpack(one)
        for one in tuple(views(tensor))[:4]
    )
    return SimpleNamespace(
        words=x.view(torch.int32),
        scales=scales,
        ids=ids,
        topk_weights=topk_weights,
        buffer=tensor,
        handle=SimpleNamespace(buffer_ptrs=[tensor.data_ptr()]),
        group=SimpleNamespace(rank=lambda: 0, size=lambda: 1),
        num_max_tokens_per_rank=max_tokens,
        num_experts=num_experts,
        num_topk=top_k,
    )


def run(*arguments: Any) -> Any:
    """The layer on what `prepare` returns; bf16[T, H]."""
    import deep_gemm
    import torch

    *ten, buffer = arguments
    inputs: Any = LayerInputs.of(*ten)  # of PyTorch's tensors
    hidden = inputs.hidden_states
    num_tokens, hidden_size = hidden.shape
    out = torch.empty(num_tokens, hidden_size, dtype=torch.bfloat16, device=hidden.device)
    if num_tokens == 0:
        return out
    deepgemm.route(
        inputs.routing_logits,
        inputs.routing_bias,
        inputs.local_expert_offset,
        inputs.routed_scaling_factor,
        inputs.weights.num_local_experts,
        out=(buffer.ids[:num_tokens], buffer.topk_weights[:num_tokens]),
    )
    stage(hidden, inputs.hidden_states_scale, buffer)
    # Launched early it would read the buffer before it is written: it waits for no kernel.
    deep_gemm.set_pdl(False)
    weights = inputs.weights
    deep_gemm.fp8_mega_moe(out, tuple(weights[:2]), tuple(weights[2:]), buffer)
    return out


def stage(hidden: Any, hidden_scale: Any, buffer: Any) -> None:
    """Copies activations and their scales, transposed, to where the kernel fetches them."""
    import torch

    from interop.solutions.deepgemm_kernels import stage_kernel

    num_tokens, hidden_size = hidden.shape
    num_scales = hidden_scale.shape[0]
    stage_kernel[(num_tokens,)](
        hidden.view(torch.int32), hidden_scale, buffer.words, buffer.scales, num_tokens,
        WORDS=hidden_size // 4, SCALES=num_scales, BLOCK=1024,
        SCALE_BLOCK=deepgemm.block(num_scales), num_warps=4,
    )  # fmt: skip


def unavailable_reason() -> str | None:
    """Why the kernel cannot be used here, or None."""
    if reason := deepgemm.unavailable_reason():
        return reason
    package = util.find_spec("deep_gemm")
    for folder in (package.submodule_search_locations or ()) if package else ():
        if (Path(folder) / _KERNEL).is_file():
            return None
    return "package sgl-deep-gemm has no fp8_mega_moe for Hopper: needs 0.1.4 or newer"


SOLUTION = Solution(
    name="deepgemm_mega",
    framework="torch",
    description="DeepGEMM's fused layer fp8_mega_moe, one rank, with a Triton router",
    run=run,
    unavailable_reason=unavailable_reason,
    prepare=prepare,
    caveat=(
        "weights interleaved beforehand; its buffer (184 MB up to T=384, 3.5 GB at T=14107) is "
        "made and zeroed beforehand and is not in the temporary memory; chooses its tiles as if "
        "all T x top_k pairs were local"
    ),
    design={
        "Rows computed": "local pairs only",
        "SwiGLU": "in the layer's kernel",
        "Intermediate quantization": "in the layer's kernel, a power of two per (row, 64)",
        "GEMM workspace": "a buffer that is kept between calls",
    },
)
