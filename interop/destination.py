"""`out=`: the tensor that a caller wants the result in."""

import torch
from torch import Tensor

from interop import dlpack


def check(out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Checks that the result can be copied there.

    Args:
        out: The caller's.
        shape: Of the result.
        device: The layer's.

    Raises:
        TypeError: It is no tensor of bf16.
        ValueError: Its shape, its device or its memory does not fit, or it asks for a gradient.
    """
    if isinstance(out, Tensor):
        dlpack.refuse_lazy("out", out)  # which has no shape yet
    check_form(out, shape, device)
    dlpack.check_memory(out, "out")
    if _may_overlap(out):
        raise ValueError(
            f"out: expected memory of its own for each element, got strides {list(out.stride())}, "
            "as of an expanded tensor"
        )
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            "out: expected a tensor that torch lets be changed here, got one of inference mode"
        )


def check_form(out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """`check` of what torch knows while it traces, which is all but the memory; raises as that."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
    if out.is_nested:
        raise ValueError("out: expected a dense tensor, got a nested tensor")
    if out.shape != shape or out.dtype != torch.bfloat16 or out.device != device:
        error = TypeError if out.dtype != torch.bfloat16 else ValueError
        raise error(
            f"out: expected bfloat16 {list(shape)} on {device}, got {out.dtype} {list(out.shape)} "
            f"on {out.device}"
        )
    if out.layout != torch.strided:
        raise ValueError(f"out: expected a dense tensor, got layout {out.layout}")
    dlpack.refuse_grad("out", out)


def _may_overlap(out: Tensor) -> bool:
    """Whether rows or columns may lie over each other: none does that torch itself made."""
    extent = 1  # what the smaller strides span
    for step, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and step < extent:
            return True
        extent += step * (size - 1)
    return False
