"""Zero-copy hand-over of arrays between PyTorch and JAX, ordered without a device-wide sync.

Ownership and order, the whole contract:

- An imported array shares memory with its tensor and keeps that storage alive: freeing the tensor
  and giving it another storage (`x.data = y`, `module.double()`, `x.set_()`) are safe. Moving the
  memory of the storage itself (`share_memory()`, `torch.multiprocessing`, `resize_`) frees it under
  JAX. Writing to the tensor afterwards is visible on the other side; the writer orders such writes
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
from collections.abc import Collection, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
from jaxlib import _jax
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from interop import lending

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
_NARROW_DTYPES = DTYPES.keys() - {torch.int64}
_SUPPORTED = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
_TORCH_DTYPES = {np.dtype(value): key for key, value in DTYPES.items()}

# XLA and TMA want aligned base addresses but accept others silently: we check. Both allocators give
# at least this much.
ALIGNMENT = {"cpu": 64, "cuda": 256}

_KDL_CPU, _KDL_CUDA = 1, 2  # DLDeviceType
_LEGACY_DEFAULT_STREAM = 1  # how DLPack spells CUDA's stream 0

# The cores of `from_dlpack` on both sides, which cost the host a fraction of the public calls.
_to_capsule, _from_capsule = torch.utils.dlpack.to_dlpack, torch._C._from_dlpack
_to_buffer, _from_buffer = (
    _jax.dlpack_managed_tensor_to_buffer,
    _jax.buffer_to_dlpack_managed_tensor,
)

type Stream = torch.cuda.Stream | None
"""Torch's current stream; None on a CPU, which has none."""


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
            other accelerators, a CUDA device that JAX does not see), a tensor that requires grad
            where grad mode is on, a dual one of forward-mode differentiation, or one whose storage
            lacks its elements (freed, shrunk, fake, lazy, wrapped by torch.func).
        RuntimeError: torch captures a CUDA graph.
    """
    bridge = bridge_of(tensor, name)
    return bridge.import_all({name: tensor}, bridge.current_stream())[name]


def to_torch(array: jax.Array, name: str = "array") -> torch.Tensor:
    """Exports a JAX array as a torch tensor on the same device, zero copy.

    Args:
        array: a concrete array on one device; dtypes as in `to_jax`.
        name: what to call the array in errors.

    Returns:
        The tensor. It shares the array's memory: JAX arrays are immutable, so do not write to it.

    Raises:
        TypeError: not a `jax.Array`.
        ValueError: traced, deleted or sharded over several devices, unsupported dtype or device.
    """
    if not isinstance(array, jax.Array):
        raise TypeError(f"{name}: expected a jax.Array, got {type(array).__name__}")
    if isinstance(array, jax.core.Tracer):
        raise ValueError(
            f"{name}: expected an array with memory to share, got a traced one; export it outside "
            "of jit"
        )
    if array.is_deleted():
        raise ValueError(f"{name}: expected an array with memory, got a deleted or donated one")
    if len(array.devices()) != 1:
        raise ValueError(f"{name}: expected one device, got {sorted(map(str, array.devices()))}")
    if array.dtype not in _TORCH_DTYPES:
        raise ValueError(f"{name}: expected {_SUPPORTED}, got {array.dtype}")
    (device,) = array.devices()
    if device.platform not in ("cpu", "gpu"):
        raise ValueError(f"{name}: expected an array on cpu or gpu, got {device.platform}")
    on_gpu, index = device.platform == "gpu", device.local_hardware_id
    if array.size == 0:
        where = f"cuda:{index}" if on_gpu else "cpu"
        return torch.empty(array.shape, dtype=_TORCH_DTYPES[array.dtype], device=where)
    return export_buffer(array, torch.cuda.current_stream(index) if on_gpu else None)


def _alignment(device: torch.device, name: str) -> int:
    if device.type not in ALIGNMENT:
        raise ValueError(f"{name}: expected a tensor on cpu or cuda, got device {device}")
    return ALIGNMENT[device.type]


def jax_device(device: torch.device, name: str = "tensor") -> jax.Device:
    """The JAX device that is torch's `device`; `ValueError` naming `name` where there is none."""
    index = 0
    if device.type != "cpu":
        index = torch.cuda.current_device() if device.index is None else device.index
    try:
        return _jax_device("cpu" if device.type == "cpu" else "cuda", index)
    except (AssertionError, RuntimeError, StopIteration):
        got = device if device.type == "cpu" else f"cuda:{index}"
        raise ValueError(f"{name}: expected a device that JAX sees, got {got}") from None


@functools.cache
def _jax_device(platform: str, index: int) -> jax.Device:
    devices = jax.local_devices(backend=platform)
    return next(d for d in devices if platform == "cpu" or d.local_hardware_id == index)


class Bridge:
    """The way into JAX on one device; `bridge_of` makes one a device.

    `jax.dlpack.from_dlpack` looks up backend, device and stream and copies the array object on
    every call; here the look-ups are made once and many imports share one hand-over.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        self._alignment = _alignment(device, name)
        self._on_cpu = device.type == "cpu"
        if not self._on_cpu:
            _refuse_capture()  # JAX may have to make its client
        self.device, self.target = device, jax_device(device, name)
        if not self._on_cpu:
            self._address = self.target.get_stream_for_external_ready_events()
            self._stream = torch.cuda.ExternalStream(self._address, device=device)
            self._event = torch.cuda.Event()
            self._lock = threading.Lock()

    def current_stream(self) -> Stream:
        """Torch's current stream.

        Raises:
            RuntimeError: torch captures a CUDA graph on it.
        """
        if self._on_cpu:
            return None
        _refuse_capture()
        return torch.cuda.current_stream(self.device.index)

    def import_all(
        self,
        tensors: Mapping[str, torch.Tensor | None],
        stream: Stream,
        optional: Collection[str] = (),
        leader: str | None = None,
    ) -> dict[str, Any]:
        """Imports tensors as `to_jax` does, after one hand-over.

        Args:
            tensors: On this bridge's device, by the names that errors call them.
            stream: Torch's current stream.
            optional: The names of those that may be None, and then stay None.
            leader: The only tensor whose array carries an event to wait for, each of which costs
                the host an event, a wait and a callback. For arrays that nothing but one compiled
                program reads, the leader among them: a program starts when all of its arguments
                are there. None: all arrays carry one.

        Returns:
            The arrays by name.
        """
        ready = self.ready(tensors, optional)
        address = self.order_after_torch(stream)
        if jax.config.jax_disable_jit:  # then many programs read them
            leader = None
        # A capsule holds its tensor, whose storage can be exchanged: only an alias keeps this one.
        # `detach` costs twice as much and has no memory inside of torch.func's transforms.
        aliases = {name: tensor.data for name, tensor in ready.items() if tensor is not None}
        lending.note(aliases.values())
        arrays: dict[str, Any] = dict.fromkeys(ready)
        for name, alias in aliases.items():
            arrays[name] = self._imported(alias, address if leader in (None, name) else None)
        return arrays

    def ready(
        self, tensors: Mapping[str, torch.Tensor | None], optional: Collection[str] = ()
    ) -> dict[str, Any]:
        """The tensors, checked as `to_jax` promises; copies of those that cannot be shared."""
        is_quick = forward_ad._current_level < 0  # else each is asked for its tangent
        return {
            name: tensor
            if (is_quick and self._crosses(tensor)) or (tensor is None and name in optional)
            else self._made_ready(tensor, name, tensors)
            for name, tensor in tensors.items()
        }

    def _crosses(self, tensor: Any) -> bool:
        """Whether the tensor crosses as it is, in one quick look; others are copied or refused."""
        try:
            return (
                isinstance(tensor, torch.Tensor)
                and tensor.device == self.device
                and tensor.layout is torch.strided
                and tensor.dtype in _NARROW_DTYPES
                and not tensor.is_nested
                and not (tensor.requires_grad and torch.is_grad_enabled())
                and not tensor.is_neg()
                and tensor.is_contiguous()
                and (address := tensor.data_ptr()) != 0
                and address % self._alignment == 0
                and tensor.storage_offset() * tensor.itemsize + tensor.nbytes
                <= tensor.untyped_storage().nbytes()
                and not (self._on_cpu and tensor.is_pinned())
            )
        except (RuntimeError, ValueError):  # torch.func's wrappers, lazy modules' tensors
            return False

    def _made_ready(self, tensor: Any, name: str, beside: Mapping[str, Any]) -> torch.Tensor:
        """The tensor, checked as `to_jax` promises, or its row-major copy if one is due."""
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        refuse_lazy(name, tensor)
        if tensor.device != self.device:
            here = [n for n, t in beside.items() if getattr(t, "device", None) == self.device]
            wanted = f"{self.device}, where {here[0]} is" if here else self.device
            raise ValueError(f"{name}: expected a tensor on {wanted}, got {tensor.device}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
        if tensor.is_nested:
            raise ValueError(f"{name}: expected a dense tensor, got a nested tensor")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: expected {_SUPPORTED}, got {tensor.dtype}")
        if tensor.dtype == torch.int64 and not jax.config.jax_enable_x64:
            raise ValueError(
                f"{name}: expected int32, got torch.int64, which needs JAX_ENABLE_X64: JAX would "
                "keep 32 bits"
            )
        refuse_grad(name, tensor)
        check_memory(tensor, name)
        if tensor.is_cpu and tensor.is_pinned():
            raise ValueError(
                f"{name}: pinned host memory is not supported; got device cpu (pinned)"
            )
        if tensor.is_neg():
            tensor = tensor.resolve_neg()
        if not tensor.is_contiguous():
            return tensor.contiguous()
        return tensor.clone() if tensor.data_ptr() % self._alignment else tensor

    def order_after_torch(self, stream: Stream) -> int | None:
        """Makes JAX's hand-over stream wait for `stream`; returns its address, None on a CPU.

        One call orders any number of imports that get the address and follow before other torch
        work.
        """
        if stream is None:
            return None
        # A wait takes what the event holds at that moment, so one event serves all calls, in turn.
        with self._lock:
            self._event.record(stream)
            self._stream.wait_event(self._event)
        return self._address

    def _imported(self, alias: torch.Tensor, address: int | None) -> jax.Array:
        if not alias.numel():
            return jax.device_put(np.zeros(alias.shape, DTYPES[alias.dtype]), self.target)
        kind = _KDL_CPU if self._on_cpu else _KDL_CUDA
        return _to_buffer(_to_capsule(alias), self.target, address, None, kind)


def refuse_grad(name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor whose gradient would be lost; where grad mode is off there is none.

    The tangent of a dual tensor would be lost as well, whatever the grad mode.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires grad, which does not cross the bridge; pass {name}.detach(), or "
            "call under torch.no_grad()"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise ValueError(
            f"{name}: expected a tensor without a tangent of forward-mode differentiation, which "
            f"does not cross the bridge, got a dual tensor; pass unpack_dual({name}).primal"
        )


def refuse_lazy(name: str, tensor: torch.Tensor) -> None:
    """Refuses a lazy module's tensor that has no shape yet: torch's own error names none."""
    if is_lazy(tensor):
        raise ValueError(f"{name}: expected a tensor with memory, got {type(tensor).__name__}")


def check_memory(tensor: torch.Tensor, name: str) -> None:
    """Refuses a strided tensor whose storage does not hold all of its elements."""
    try:
        address = tensor.data_ptr()
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected a tensor with memory of its own, got one without, as inside of "
            f"torch.func's transforms: {error}"
        ) from None
    if not tensor.numel():
        return
    if not address:
        raise ValueError(
            f"{name}: expected a tensor with memory, got a null pointer (a freed storage, a fake "
            "tensor, a torch.func transform, a masked tensor)"
        )
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in strides)
    needed, held = (last + 1) * tensor.itemsize, tensor.untyped_storage().nbytes()
    if needed > held:
        raise ValueError(f"{name}: expected a storage of {needed} bytes or more, got {held} bytes")


def _refuse_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("JAX launches on its own stream: torch cannot capture it in a graph")


_bridges: dict[torch.device, Bridge] = {}


def bridge_of(tensor: Any, name: str) -> Bridge:
    """The bridge of a tensor's device.

    Raises:
        TypeError: not a `torch.Tensor`.
        ValueError: neither CPU nor CUDA, or JAX does not see the device; names `name`.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    device = tensor.device
    if device not in _bridges:
        _bridges[device] = Bridge(device, name)
    return _bridges[device]


def export_buffer(array: jax.Array, stream: Stream) -> torch.Tensor:
    """The bare export of a non-empty array, ordered before torch's current stream."""
    if stream is None:
        return _from_capsule(_from_buffer(array, stream=None))
    return _from_capsule(_from_buffer(array, stream=stream.cuda_stream or _LEGACY_DEFAULT_STREAM))


_in_flight: collections.deque[tuple[torch.cuda.Event, jax.Array]] = collections.deque()
_in_flight_lock = threading.Lock()


def keep_while_read(array: jax.Array, stream: Stream) -> None:
    """Keeps `array` from JAX's allocator until torch's current stream has passed this point.

    For views that die in our own hands while torch still reads them. What is done by then is
    dropped on the way, so at most the last ones are kept.
    """
    if stream is None:
        return
    event = stream.record_event()
    with _in_flight_lock:
        _in_flight.append((event, array))
        while _in_flight and _in_flight[0][0].query():
            _in_flight.popleft()
