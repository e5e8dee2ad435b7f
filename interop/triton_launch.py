"""Runs the launches of `pallas_kernels.triton` from PyTorch: the same kernel source as from JAX."""

import contextlib

import torch

from pallas_kernels.triton.launch import Launch


def launch_torch(launch: Launch) -> list[torch.Tensor]:
    """Runs a launch whose inputs are PyTorch tensors, on PyTorch's current stream.

    Args:
        launch: From a `launch` function of `pallas_kernels.triton`, called with contiguous tensors
            of one device.

    Returns:
        The outputs, on that device; padding holds anything.

    Raises:
        ValueError: A tensor is not contiguous, or not on the device of the first.
    """
    device = launch.inputs[0].device
    for position, tensor in enumerate(launch.inputs):
        if not tensor.is_contiguous():
            raise ValueError(
                f"input {position}: expected a contiguous tensor, got strides "
                f"{tensor.stride()} for shape {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(
                f"input {position}: expected a tensor on {device}, got one on {tensor.device}"
            )
    outputs = [
        torch.empty(out.shape, dtype=getattr(torch, out.dtype.name), device=device)
        for out in launch.outputs
    ]
    if 0 in launch.grid:
        return [out.zero_() for out in outputs]
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        launch.kernel[launch.grid](
            *launch.inputs,
            *launch.scalars,
            *outputs,
            **launch.constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=launch.fuse_products,
        )
    return outputs
