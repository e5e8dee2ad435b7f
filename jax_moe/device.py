"""Which device a call is for: found from its arrays, or assumed for compilation and tests.

Both contexts are part of JAX's compilation cache keys: entering one retraces, it never reuses a
program made outside of it.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import jax

from jax_moe.scalars import quoted, quoted_with_type

_INTERPRETER_THREADS = 16
_LEAST_INTERPRETER_THREADS = 8


class Device(NamedTuple):
    """What the choice of a backend depends on.

    Attributes:
        platform: "cpu", "gpu" or "tpu", as JAX names it.
        compute_capability: Of an NVIDIA GPU, "9.0" for Hopper; None elsewhere.
        interpreted: Pallas GPU kernels run in the CPU interpreter.
    """

    platform: str
    compute_capability: str | None = None
    interpreted: bool = False

    @classmethod
    def of(cls, device: jax.Device) -> Self:
        """What counts of a device."""
        capability = getattr(device, "compute_capability", None)
        return cls(device.platform, None if capability is None else str(capability))

    def __str__(self) -> str:
        """For messages: "gpu with compute capability 9.0"."""
        if self.compute_capability is None:
            return self.platform
        text = f"{self.platform} with compute capability {self.compute_capability}"
        return f"{text} (interpreted)" if self.interpreted else text


_assumed = jax.make_user_context(None)
_interpret_params = jax.make_user_context(None)


def device_of(*arrays: Any) -> Device:
    """The device that a call with these arrays runs on.

    Args:
        *arrays: Arguments of the call; tracers, NumPy arrays and JAX arrays that nobody put on a
            device carry none.

    Returns:
        What `assume_device` or `interpret_mode` set, else the device of the first committed JAX
        array, else JAX's default device. A jitted function that is to run elsewhere than on the
        default device needs an explicit `backend`.
    """
    return describe_device(jax_device_of(arrays))


def jax_device_of(*arrays: Any) -> jax.Device:
    """The device of the first committed JAX array, JAX's default device where there is none.

    That is where JAX runs a program of them: uncommitted ones go wherever the others are.

    Raises:
        RuntimeError: There is no device of those that `JAX_PLATFORMS` allows.
    """
    for array in jax.tree.leaves(arrays):
        if isinstance(array, jax.Array) and is_committed(array):
            return next(iter(array.devices()))
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        try:
            return jax.local_devices(backend=default)[0]
        except (AssertionError, RuntimeError) as error:
            raise RuntimeError(no_device(error)) from None
    return default


def no_device(error: Exception) -> str:
    """What is said where JAX starts with no device at all, in words that JAX does not use."""
    allowed = os.environ.get("JAX_PLATFORMS")
    said = str(error).partition("\n")[0]
    return f"JAX_PLATFORMS={allowed}: JAX finds no such device{said and f': {said}'}"


def is_committed(array: jax.Array) -> bool:
    """Whether an array has values on a device that somebody chose, so that it stays there."""
    return not isinstance(array, jax.core.Tracer) and array.committed


def describe_device(device: jax.Device) -> Device:
    """What counts of a device, or what `assume_device` or `interpret_mode` set instead."""
    if _assumed.value is not None:
        return _assumed.value
    return _description(device)


@functools.cache
def _description(device: jax.Device) -> Device:
    return Device.of(device)


@contextlib.contextmanager
def assume_device(name: str) -> Iterator[None]:
    """Traces as if for another device, for ahead-of-time compilation where it is not present.

    Within it programs are traced, lowered and exported. They cannot run on this device: eager calls
    that would are refused.

    Examples:
        >>> with jax_moe.assume_device("sm_90"):
        ...     lowered = jax.jit(step).trace(*h100_shapes).lower(lowering_platforms=("cuda",))

    Args:
        name: "sm_90" for a GPU of compute capability 9.0 and so on, or "cpu".

    Raises:
        TypeError: The name is no string.
        ValueError: It is neither.
    """
    if not isinstance(name, str):
        raise TypeError(f'name: expected "cpu" or "sm_<capability>", got {quoted(name)}')  # type: ignore[unreachable]
    match = re.fullmatch("sm_([1-9][0-9]?)([0-9])[af]?", name)
    if name != "cpu" and match is None:
        raise ValueError(f'name: expected "cpu" or "sm_<capability>" ("sm_90"), got {quoted(name)}')
    with _assumed(Device("gpu", f"{match[1]}.{match[2]}") if match else Device("cpu")):
        yield


@contextlib.contextmanager
def interpret_mode(params: Any = None) -> Iterator[None]:
    """Runs Pallas Mosaic GPU kernels in JAX's CPU interpreter, so `backend="mosaic"` needs no GPU.

    Slow: meant for tests at toy sizes. The interpreter blocks one thread of XLA's CPU pool for each
    simulated warpgroup, so the pool must be larger than a small machine's default: where JAX has
    not made its CPU client yet this sets `NPROC=16`, later it can only check.

    Args:
        params: A `jax.experimental.pallas.mosaic_gpu.InterpretGPUParams`; None is its default.
            `InterpretGPUParams(detect_races=True)` looks for races as well.

    Raises:
        TypeError: `params` is none.
        RuntimeError: JAX's CPU client already runs with too few threads; says what to set.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams() if params is None else params
    if not isinstance(params, plgpu.InterpretGPUParams):
        raise TypeError(
            "params: expected a jax.experimental.pallas.mosaic_gpu.InterpretGPUParams or None, got "
            f"{quoted_with_type(params)}"
        )
    _ensure_interpreter_threads()
    with (
        _assumed(Device("gpu", "9.0", interpreted=True)),
        _interpret_params(params),
        plgpu.force_gpu_interpret_mode(params),
    ):
        yield


def _ensure_interpreter_threads() -> None:
    """A pool smaller than the simulated warpgroups deadlocks, so refuse it."""
    from jax._src.xla_bridge import backends_are_initialized

    if not backends_are_initialized():
        os.environ.setdefault("NPROC", str(_INTERPRETER_THREADS))
    threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
    if threads < _LEAST_INTERPRETER_THREADS:
        raise RuntimeError(
            f"interpret_mode: expected XLA's CPU pool to have at least "
            f"{_LEAST_INTERPRETER_THREADS} threads, got {threads}; set the environment variable "
            f"NPROC={_INTERPRETER_THREADS} before JAX is first used"
        )


def is_assumed() -> bool:
    """Whether `assume_device` surrounds the caller, and no interpreter that runs the kernels."""
    return _assumed.value is not None and not _assumed.value.interpreted


def has_context() -> bool:
    """Whether `assume_device` or `interpret_mode` surrounds the caller."""
    return _assumed.value is not None or _interpret_params.value is not None


def interpret_params() -> Any:
    """The `InterpretGPUParams` of the surrounding `interpret_mode`, None outside of one."""
    return _interpret_params.value
