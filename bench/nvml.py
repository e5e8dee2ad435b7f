"""What NVIDIA's management library says of the GPU that torch uses, asked without a process."""

import ctypes
import functools
from typing import Any

_SW_POWER_CAP = 0x4  # nvmlClocksEventReasonSwPowerCap


def power_capped() -> bool | None:
    """Whether the driver holds the clocks down to keep the power limit; None if nobody can say."""
    reasons = ctypes.c_ulonglong()
    try:
        library, handle = _device()
        status = library.nvmlDeviceGetCurrentClocksEventReasons(handle, ctypes.byref(reasons))
    except (OSError, AttributeError):  # no library, or one that does not know the question
        return None
    return bool(reasons.value & _SW_POWER_CAP) if status == 0 else None


@functools.cache
def _device() -> tuple[Any, ctypes.c_void_p]:
    import torch

    library, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
    name = f"GPU-{torch.cuda.get_device_properties('cuda').uuid}".encode()
    status = library.nvmlInit_v2()
    status = status or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle))
    if status != 0:
        raise OSError(f"NVML error {status}")
    return library, handle
