"""Whether a call fits into its device's memory, asked before anything is launched.

XLA would find out by itself, but only after waiting for memory that nobody frees, and with a page
of log instead of a number.
"""

import ctypes
from typing import Any

import jax

LEAST_ASKED = 2**28
"""Calls that need less are not asked about: to ask costs host time."""


def require(device: jax.Device, needed: int, what: str) -> None:
    """Refuses what cannot fit.

    Args:
        device: Where the call will run.
        needed: Bytes that it may allocate there.
        what: Who asks, for the message.

    Raises:
        MemoryError: The device has less; states both numbers. Nothing has been allocated.
    """
    if needed < LEAST_ASKED:
        return
    available = available_bytes(device)
    if available is not None and needed > available:
        raise MemoryError(
            f"{what}: needs up to {needed:,} bytes of memory on {device}, got {available:,} "
            "available"
        )


def available_bytes(device: jax.Device) -> int | None:
    """Bytes that JAX can still allocate on a device, None where that is not known (a CPU).

    It is what is free in JAX's own pool, and what the pool can still grow by: up to its limit
    (`XLA_PYTHON_CLIENT_MEM_FRACTION`), as far as other processes and frameworks leave it room.
    """
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    limit, used = stats["bytes_limit"], stats["bytes_in_use"]
    pool = stats.get("pool_bytes")
    free = None if pool is None else free_bytes(device)
    if pool is None or free is None:
        return limit - used
    return pool - used + min(limit - pool, free)


def free_bytes(device: jax.Device) -> int | None:
    """Bytes of an NVIDIA GPU that no process holds, None where the driver does not tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuDeviceGet(ctypes.byref(handle), ctypes.c_int(device.local_hardware_id)):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle):
        return None
    try:
        return _free_in_context(driver, context)
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(handle)


def _free_in_context(driver: Any, context: ctypes.c_void_p) -> int | None:
    if driver.cuCtxPushCurrent_v2(context):
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    return None if failed else free.value
