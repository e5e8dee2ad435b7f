"""Zero-copy hand-over of arrays between PyTorch and JAX, ordered without a device-wide sync.

Ownership and order, the whole contract:

- An imported array shares memory with its tensor and keeps that memory alive: freeing the tensor is
  safe. Writing to the tensor afterwards is visible on the other side; the writer orders such writes
  itself.
- `to_jax`: JAX's kernels wait for what was enqueued before the call on torch's *current* stream of
  the tensor's device.
- An imported array must outlive the kernels that read it: drop it when they are done
  (`block_until_ready`) or when torch's current stream waits for their result (`to_torch`).
- `to_torch`: torch's current stream waits for the array. JAX gets the memory back when the last
  torch view dies, so a view that another stream than the current one still reads must outlive that
  work (synchronize, or keep the tensor).
- Host threads never wait for the device, except that arrays on the CPU are complete when they are
  handed over.
"""

import collections
import functools
import threading
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
from jaxlib import _jax

# Types whose bits are the same in both frameworks. int64 needs JAX_ENABLE_X64; without it JAX would
# keep 32 bits.
DTYPES: dict[torch.dtype, Any] = {
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.int64: np.int64,
}
_TORCH_DTYPES = {np.dtype(value): key for key, value in DTYPES.items()}

# XLA and TMA want aligned base addresses but accept others silently: we check. Both allocators give
# at least this much.
ALIGNMENT = {"cpu": 64, "cuda": 256}

_KDL_CPU, _KDL_CUDA = 1, 2  # DLDeviceType
_LEGACY_DEFAULT_STREAM = 1  # how DLPack spells CUDA's stream 0


def to_jax(tensor: torch.Tensor, name: str = "tensor") -> jax.Array:
    """Imports a torch tensor as a JAX array on the same device.

    Zero copy for a row-major tensor at an aligned address. One copy, made by torch on its current
    stream, where the tensor is non-contiguous (transposed, strided, expanded), misaligned
    (`ALIGNMENT` bytes), or has the negative bit set.

    Args:
        tensor: any shape; float8_e4m3fn, bfloat16, float16, float32, int32, uint8 (int64 under
            JAX_ENABLE_X64); on the CPU or on a CUDA device that JAX sees.
        name: what to call the tensor in errors.

    Returns:
        The array, same shape and bits. It shares memory unless a copy was due.

    Raises:
        TypeError: not a `torch.Tensor`.
        ValueError: unsupported dtype, layout (sparse, ...) or device (meta, pinned host memory,
            other accelerators, a CUDA device that JAX does not see), or a tensor that requires
            grad.
    """
    ready = check_importable(tensor, name)
    device = jax_device(ready.device, name)
    return import_buffer(ready, device, order_after_torch(ready.device, device))


def to_torch(array: jax.Array, name: str = "array") -> torch.Tensor:
    """Exports a JAX array as a torch tensor on the same device, zero copy.

    Args:
        array: a concrete array on one device; dtypes as in `to_jax`.
        name: what to call the array in errors.

    Returns:
        The tensor. It shares the array's memory: JAX arrays are immutable, so do not write to it.

    Raises:
        TypeError: not a `jax.Array`.
        ValueError: traced or sharded over several devices, unsupported dtype or device.
    """
    if not isinstance(array, jax.Array):
        raise TypeError(f"{name}: expected a jax.Array, got {type(array).__name__}")
    if isinstance(array, jax.core.Tracer):
        raise ValueError(f"{name}: a traced array has no memory to share; export it outside of jit")
    if len(array.devices()) != 1:
        raise ValueError(f"{name}: expected one device, got {sorted(map(str, array.devices()))}")
    if array.dtype not in _TORCH_DTYPES:
        raise ValueError(f"{name}: unsupported dtype {array.dtype}; supported: {_supported()}")
    (device,) = array.devices()
    if device.platform not in ("cpu", "gpu"):
        raise ValueError(f"{name}: expected an array on cpu or gpu, got {device.platform}")
    if array.size == 0:
        where = f"cuda:{device.local_hardware_id}" if device.platform == "gpu" else "cpu"
        return torch.empty(array.shape, dtype=_TORCH_DTYPES[array.dtype], device=where)
    return export_buffer(array, device)


def check_importable(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Checks what `to_jax` promises; returns the tensor, or its row-major copy where one is due."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: unsupported dtype {tensor.dtype}; supported: {_supported()}")
    if tensor.dtype == torch.int64 and not jax.config.jax_enable_x64:
        raise ValueError(f"{name}: int64 needs JAX_ENABLE_X64 (JAX would keep 32 bits); pass int32")
    if tensor.requires_grad:
        raise ValueError(
            f"{name}: requires grad, which does not cross the bridge; pass {name}.detach()"
        )
    kind = tensor.device.type
    if kind not in ALIGNMENT:
        raise ValueError(f"{name}: expected a tensor on cpu or cuda, got device {tensor.device}")
    if kind == "cpu" and tensor.is_pinned():
        raise ValueError(f"{name}: pinned host memory is not supported; got device cpu (pinned)")
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if not tensor.is_contiguous():
        return tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT[kind] else tensor


def jax_device(device: torch.device, name: str = "tensor") -> jax.Device:
    """The JAX device that is torch's `device`; `ValueError` naming `name` where there is none."""
    if device.type == "cpu":
        return _jax_device("cpu", 0)
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        return _jax_device("cuda", index)
    except (RuntimeError, StopIteration):
        raise ValueError(f"{name}: JAX does not see device cuda:{index}") from None


@functools.cache
def _jax_device(platform: str, index: int) -> jax.Device:
    devices = jax.local_devices(backend=platform)
    return next(d for d in devices if platform == "cpu" or d.local_hardware_id == index)


@functools.cache
def _ready_stream(device: jax.Device, index: int) -> tuple[int, torch.cuda.ExternalStream]:
    """The stream on which JAX takes over external memory, as an address and as torch sees it."""
    address = device.get_stream_for_external_ready_events()
    return address, torch.cuda.ExternalStream(address, device=index)


def order_after_torch(device: torch.device, target: jax.Device) -> int | None:
    """Makes JAX's hand-over stream wait for torch's current one; returns its address, None on CPU.

    One call orders any number of `import_buffer` calls that get the address and follow before other
    torch work.
    """
    if device.type == "cpu":
        return None
    address, stream = _ready_stream(target, target.local_hardware_id)
    stream.wait_stream(torch.cuda.current_stream(device))
    return address


def import_buffer(tensor: torch.Tensor, device: jax.Device, stream: int | None) -> jax.Array:
    """The bare import of a tensor that `check_importable` returned.

    `jax.dlpack.from_dlpack` looks up backend, device and stream and copies the array object on
    every call; these are the two calls at its core.
    """
    if tensor.numel() == 0:
        return jax.device_put(np.zeros(tensor.shape, DTYPES[tensor.dtype]), device)
    kind = _KDL_CPU if tensor.device.type == "cpu" else _KDL_CUDA
    capsule = torch._C._to_dlpack(tensor)
    return _jax.dlpack_managed_tensor_to_buffer(capsule, device, stream, None, kind)


def export_buffer(array: jax.Array, device: jax.Device) -> torch.Tensor:
    """The bare export of a non-empty array on `device`, ordered before torch's current stream."""
    stream = None
    if device.platform == "gpu":
        current = torch.cuda.current_stream(device.local_hardware_id).cuda_stream
        stream = current or _LEGACY_DEFAULT_STREAM
    return torch._C._from_dlpack(_jax.buffer_to_dlpack_managed_tensor(array, stream=stream))


_in_flight: collections.deque[tuple[torch.cuda.Event, jax.Array]] = collections.deque()
_in_flight_lock = threading.Lock()


def keep_while_read(array: jax.Array, device: torch.device) -> None:
    """Keeps `array` from JAX's allocator until torch's current stream has passed this point.

    For views that die in our own hands while torch still reads them. What is done by then is
    dropped on the way, so at most the last ones are kept.
    """
    if device.type == "cpu":
        return
    event = torch.cuda.current_stream(device).record_event()
    with _in_flight_lock:
        _in_flight.append((event, array))
        while _in_flight and _in_flight[0][0].query():
            _in_flight.popleft()


def _supported() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
