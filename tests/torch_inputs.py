"""Torch views of the small inputs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from interop.workloads import Workload, captured_routing
from jax_moe import LayerInputs
from tests.moe_inputs import array_arguments, make_inputs, scalar_arguments

_AS_BYTES = {
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
}


def to_tensor(array: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """A torch copy of a NumPy array, ml_dtypes included."""
    carrier, dtype = _AS_BYTES.get(array.dtype, (None, None))
    if carrier is None:
        return torch.tensor(array, device=device)
    return torch.tensor(array.view(carrier), device=device).view(dtype)


def torch_inputs(num_tokens: int, device: str = "cpu", **sizes: Any) -> LayerInputs:
    """`make_inputs` for the published configuration (64 experts in 8 groups), as tensors.

    The logits lie on the bf16 grid, so that some scores tie.
    """
    sizes = {"num_experts": 64, "num_local_experts": 8, "offset": 8} | sizes
    inputs = make_inputs(num_tokens, **sizes)
    logits = inputs.routing_logits.astype(ml_dtypes.bfloat16).astype(np.float32)
    arrays = [*array_arguments(inputs._replace(routing_logits=logits))]
    return LayerInputs.of(
        *(to_tensor(array, device) for array in arrays), *scalar_arguments(inputs)
    )


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The bit patterns of a tensor, to compare exactly, NaN included."""
    flat = tensor.detach().cpu().contiguous().view(torch.uint8)
    return flat.numpy()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Difference over expectation in the Frobenius norm; 0 where both are all zeros."""
    found, expected = found.double().cpu(), expected.double().cpu()
    error, norm = float((found - expected).norm()), float(expected.norm())
    return error / norm if norm else (0.0 if error == 0 else float("inf"))


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of `jax_moe.quantize` in PyTorch: e4m3[R,C] and f32[C/128,R]."""
    tiny = torch.finfo(torch.float32).tiny
    blocks = x.float().view(len(x), -1, 128)
    blocks = torch.where(blocks.abs() < tiny, 0.0, blocks)
    largest = torch.tensor(448.0, device=x.device)  # CUDA turns a Python divisor into a product
    scales = blocks.abs().amax(dim=2).clamp(min=448 * tiny) / largest
    values = (blocks / scales[:, :, None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return values.view(x.shape), scales.t().contiguous()


def matched_ratio(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of elements within the published tolerance, by flashinfer-bench's formula."""
    error = (found.float() - expected.float()).abs()
    relative = error / (expected.float().abs() + 1e-8)
    return 1.0 - float(((error > 0.1) & (relative > 0.2)).double().mean())


def full_size_weights(seed: int = 0) -> list[torch.Tensor]:
    """The definition's four weight tensors on the GPU: Gaussian, quantized by 128x128 blocks."""
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors: list[torch.Tensor] = []
    for n, k, size in ((4096, 7168, 2 / 7168**0.5), (7168, 2048, 4 / 2048**0.5)):
        values = torch.empty(32, n, k, dtype=torch.float8_e4m3fn, device="cuda")
        scales = torch.empty(32, n // 128, k // 128, device="cuda")
        for expert in range(32):
            dense = torch.randn(n, k, generator=generator, device="cuda") * size
            blocks = dense.view(n // 128, 128, k // 128, 128)
            scales[expert] = blocks.abs().amax(dim=(1, 3)) / 448.0
            blocks = (blocks / scales[expert][:, None, :, None]).clamp(-448.0, 448.0)
            values[expert] = blocks.view(n, k).to(torch.float8_e4m3fn)
        tensors += [values, scales]
    return tensors


def full_size_inputs(row: Workload, weights: list[torch.Tensor], seed: int = 0) -> LayerInputs:
    """A published workload at full size on the GPU, with captured-like routing."""
    logits, bias = captured_routing(row.num_tokens, np.random.default_rng([seed, row.num_tokens]))
    generator = torch.Generator("cuda").manual_seed(seed + row.num_tokens)
    x = torch.randn(row.num_tokens, 7168, generator=generator, device="cuda")
    activations = quantize(x)
    routing = to_tensor(logits, "cuda"), to_tensor(bias, "cuda")
    return LayerInputs.of(*routing, *activations, *weights, row.local_expert_offset, 2.5)
