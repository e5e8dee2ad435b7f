"""The layer for PyTorch users: torch tensors in, a torch tensor out, our JAX kernels in between.

`torch_moe` is a plain function of the definition's ten arguments. `TorchMoE` is the same for a
server that calls it often: the weights are imported once, a call then costs three or four imports
and one jit dispatch on the host.

Calls behave like any torch operation on the current stream: they start after what was enqueued
there, later work on that stream sees the result, and the host does not wait. Nothing is looked up
by address and no result is kept.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

import jax_moe
from interop import dlpack
from jax_moe import memory

_ACTIVATIONS = ("routing_logits", "routing_bias", "hidden_states", "hidden_states_scale")
_OPTIONAL, _LEADER = "hidden_states_scale", "hidden_states"  # no program of ours drops the latter
_KEPT_SCALARS = _KEPT_SHAPES = 1024
_MAX_FACTOR = float(np.finfo(np.float32).max)


class TorchMoEWeights(NamedTuple):
    """The expert weights of one layer, as torch tensors on one device.

    Attributes:
        gemm1_weights: e4m3[E_local, 2*I, H], up projection first, then gate.
        gemm1_weights_scale: f32[E_local, 2*I/128, H/128], multiplies the weights.
        gemm2_weights: e4m3[E_local, H, I].
        gemm2_weights_scale: f32[E_local, H/128, I/128].
    """

    gemm1_weights: torch.Tensor
    gemm1_weights_scale: torch.Tensor
    gemm2_weights: torch.Tensor
    gemm2_weights_scale: torch.Tensor


def torch_moe(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    *,
    num_tokens: int | None = None,
    out: torch.Tensor | None = None,
    config: jax_moe.MoEConfig = jax_moe.DEEPSEEK_V3,
    backend: str = "auto",
) -> torch.Tensor:
    """`jax_moe.apply` on torch tensors; see there for the mathematics and its source.

    Args:
        routing_logits: f32[T, E].
        routing_bias: bf16[E].
        hidden_states: e4m3[T, H], or bf16/f16/f32[T, H] with `hidden_states_scale=None`.
        hidden_states_scale: f32[H/128, T] or None.
        gemm1_weights: e4m3[E_local, 2*I, H].
        gemm1_weights_scale: f32[E_local, 2*I/128, H/128].
        gemm2_weights: e4m3[E_local, H, I].
        gemm2_weights_scale: f32[E_local, H/128, I/128].
        local_expert_offset: global id of the first local expert; an int or a 0-d integer tensor on
            the CPU.
        routed_scaling_factor: factor of all weights; a float or a 0-d tensor on the CPU.
        num_tokens: live rows of the T; the rest costs no matrix work and comes out as zeros. A
            server pads T to few sizes with it, since each new T compiles. None means all.
        out: bf16[T, H] on the same device to write to (destination passing), of any strides; it
            costs one copy.
        config: routing configuration.
        backend: as for `jax_moe.apply`.

    Returns:
        bf16[T, H]: `out` if given, else a tensor that shares the memory of a JAX array
        (`interop.dlpack.to_torch`).

    Raises:
        TypeError: an argument that should be a tensor or a number is not.
        ValueError: a tensor on another device than `hidden_states`, one that the bridge refuses, a
            scalar out of range; also whatever `jax_moe.apply` refuses.
        MemoryError: the device has less memory than the call may need, where that is 256 MiB or
            more; nothing has been launched.
        RuntimeError: called while torch captures a CUDA graph.
    """
    bridge = dlpack.bridge_of(hidden_states, "hidden_states")
    weights = TorchMoEWeights(
        gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale
    )
    stream = bridge.current_stream()
    activations = (routing_logits, routing_bias, hidden_states, hidden_states_scale)
    names = _ACTIVATIONS + TorchMoEWeights._fields
    arrays = bridge.import_all(names, (*activations, *weights), stream, _OPTIONAL, _LEADER)
    scalars = _scalars(arrays, local_expert_offset, routed_scaling_factor, num_tokens, _on_host)
    layer = _compiled(config, backend, bridge.device.type)
    return _run(layer, arrays, scalars, out, bridge, stream)


class TorchMoE:
    """`torch_moe` with the weights imported once.

    The handle keeps the weights' memory alive. They are shared, not copied, if row-major and
    aligned (else copied once, here): writing to them in place changes what later calls on the
    writing stream compute. Of a call it keeps no more than the scalars' values, on the device.
    """

    def __init__(
        self,
        weights: TorchMoEWeights,
        *,
        config: jax_moe.MoEConfig = jax_moe.DEEPSEEK_V3,
        backend: str = "auto",
    ) -> None:
        """Imports the weights.

        Args:
            weights: the layer's weights, all on one device.
            config: routing configuration.
            backend: as for `jax_moe.apply`.

        Raises:
            TypeError, ValueError: a weight that the bridge refuses or on another device than the
                first.
        """
        weights = TorchMoEWeights(*weights)
        self._bridge = dlpack.bridge_of(weights[0], weights._fields[0])
        stream = self._bridge.current_stream()
        self._weights = self._bridge.import_all(weights._fields, weights, stream)
        self._layer = _compiled(config, backend, self._bridge.device.type)
        # An upload is a transfer of its own: once a value is enough.
        upload = functools.partial(_upload, self._bridge.target)
        self._on_device = functools.lru_cache(_KEPT_SCALARS)(upload)

    def __call__(
        self,
        routing_logits: torch.Tensor,
        routing_bias: torch.Tensor,
        hidden_states: torch.Tensor,
        hidden_states_scale: torch.Tensor | None,
        local_expert_offset: int,
        routed_scaling_factor: float,
        *,
        num_tokens: int | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the layer; arguments, result and errors as for `torch_moe`."""
        stream = self._bridge.current_stream()
        activations = (routing_logits, routing_bias, hidden_states, hidden_states_scale)
        arrays = self._bridge.import_all(_ACTIVATIONS, activations, stream, _OPTIONAL, _LEADER)
        arrays += self._weights
        scalars = _scalars(
            arrays, local_expert_offset, routed_scaling_factor, num_tokens, self._on_device
        )
        return _run(self._layer, arrays, scalars, out, self._bridge, stream)


def _upload(target: jax.Device, kind: Any, value: float) -> jax.Array:
    return jax.device_put(kind(value), target)


def _on_host(kind: Any, value: float) -> np.generic:
    return kind(value)


class _Layer(NamedTuple):
    """`jax_moe.apply`, jitted, with what is fixed in it."""

    apply: Callable[..., jax.Array]
    config: jax_moe.MoEConfig
    backend: str


@functools.cache
def _compiled(config: jax_moe.MoEConfig, backend: str, device_type: str) -> _Layer:
    if backend == "auto" and device_type == "cpu":
        backend = "xla"  # "auto" looks at JAX's default device, which may be a GPU

    def layer(*arguments: Any) -> jax.Array:
        live = arguments[10] if len(arguments) > 10 else None
        return jax_moe.apply(*arguments[:10], num_tokens=live, config=config, backend=backend)

    return _Layer(jax.jit(layer), config, backend)


def _require_memory(layer: _Layer, arrays: Sequence[Any], device: jax.Device) -> None:
    """Raises MemoryError if a large call cannot fit, as an eager `jax_moe.apply` does."""
    needed = _bytes_of(layer, arrays[2].shape, arrays[4].shape)
    if needed is not None:
        memory.require(device, needed, "torch_moe")


@functools.lru_cache(_KEPT_SHAPES)
def _bytes_of(layer: _Layer, tokens: tuple[int, ...], gemm1: tuple[int, ...]) -> int | None:
    """Workspace and result of a call; None for shapes that `apply` refuses by name."""
    if len(tokens) != 2 or len(gemm1) != 3 or tokens[1] % 128 or gemm1[1] % 256 or not all(gemm1):
        return None
    workspace = jax_moe.workspace_bytes(
        tokens[0],
        num_local_experts=gemm1[0],
        hidden_size=tokens[1],
        intermediate_size=gemm1[1] // 2,
        config=layer.config,
        backend=layer.backend,
    )
    return workspace + 2 * tokens[0] * tokens[1]


def _run(
    layer: _Layer,
    arrays: list[Any],
    scalars: list[Any],
    out: torch.Tensor | None,
    bridge: dlpack.Bridge,
    stream: dlpack.Stream,
) -> torch.Tensor:
    if out is not None:
        _check_out(out, arrays[2].shape, bridge.device)  # hidden_states
    _require_memory(layer, arrays, bridge.target)
    result = layer.apply(*arrays, *scalars)
    if not result.size:
        return dlpack.to_torch(result) if out is None else out
    exported = dlpack.export_buffer(result, stream)
    if out is None:
        return exported
    out.copy_(exported)
    dlpack.keep_while_read(result, stream)
    return out


def _scalars(
    arrays: Sequence[Any],
    offset: Any,
    factor: Any,
    num_tokens: Any,
    make: Callable[[Any, float], Any],
) -> list[Any]:
    """The two or three numbers, checked; an offset must leave room for the local experts."""
    logits, hidden_states, gemm1_weights = arrays[0], arrays[2], arrays[4]
    last = (logits.shape or (0,))[-1] - (gemm1_weights.shape or (0,))[0]
    scalars = [
        make(np.int32, _integer("local_expert_offset", offset, last)),
        make(np.float32, _number("routed_scaling_factor", factor)),
    ]
    if num_tokens is not None:
        rows = (hidden_states.shape or (0,))[0]
        scalars.append(make(np.int32, _integer("num_tokens", num_tokens, rows)))
    return scalars


def _integer(name: str, value: Any, last: int) -> int:
    if type(value) is not int:
        _check_on_host(name, value)
        try:
            value = operator.index(value)
        except (TypeError, RuntimeError):
            raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if not 0 <= value <= last:
        raise ValueError(f"{name}: expected 0..{last}, got {value}")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) is not float:
        _check_on_host(name, value)
        try:
            value = float(value)
        except OverflowError:  # a Python integer, perhaps of more digits than Python would print
            raise ValueError(
                f"{name}: expected a finite float32, got a number beyond float64"
            ) from None
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not abs(value) <= _MAX_FACTOR:
        raise ValueError(f"{name}: expected a finite float32, got {value}")
    return value


def _check_on_host(name: str, value: Any) -> None:
    """Reading a scalar from the device would make the host wait for it."""
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        raise ValueError(f"{name}: expected a number, got a tensor on {value.device}")


def _check_out(out: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
    if out.shape != shape or out.dtype != torch.bfloat16 or out.device != device:
        raise ValueError(
            f"out: expected bfloat16 {list(shape)} on {device}, got "
            f"{str(out.dtype).removeprefix('torch.')} {list(out.shape)} on {out.device}"
        )
