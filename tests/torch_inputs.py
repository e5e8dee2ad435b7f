"""Torch views of the small inputs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from tests.moe_inputs import Inputs, make_inputs

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


def torch_inputs(num_tokens: int, device: str = "cpu", **sizes: Any) -> Inputs:
    """`make_inputs` for the published configuration (64 experts in 8 groups), as tensors.

    The logits lie on the bf16 grid, so that some scores tie.
    """
    sizes = {"num_experts": 64, "num_local_experts": 8, "offset": 8} | sizes
    inputs = make_inputs(num_tokens, **sizes)
    logits = inputs.routing_logits.astype(ml_dtypes.bfloat16).astype(np.float32)
    arrays = [logits, *inputs[1:8]]
    return Inputs(*(to_tensor(array, device) for array in arrays), *inputs[8:])


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The bit patterns of a tensor, to compare exactly, NaN included."""
    flat = tensor.detach().cpu().contiguous().view(torch.uint8)
    return flat.numpy()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Difference over expectation in the Frobenius norm."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())
