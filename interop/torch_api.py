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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

import jax_moe
from interop import dlpack

_Scalars = tuple[np.int32, np.float32]


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
        RuntimeError: called while torch captures a CUDA graph.
    """
    device = _device_of("hidden_states", hidden_states)
    weights = TorchMoEWeights(
        gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale
    )
    activations = _named(routing_logits, routing_bias, hidden_states, hidden_states_scale)
    arrays = _import(activations | weights._asdict(), device)
    scalars = _scalars(arrays, local_expert_offset, routed_scaling_factor)
    return _run(_compiled(config, backend, device.type), arrays, scalars, num_tokens, out, device)


class TorchMoE:
    """`torch_moe` with the weights imported once.

    The handle keeps the weights' memory alive. They are shared, not copied, if row-major and
    aligned (else copied once, here): writing to them in place changes what later calls on the
    writing stream compute.
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
        named = TorchMoEWeights(*weights)._asdict()
        self._device = _device_of(*next(iter(named.items())))
        self._weights = _import(named, self._device)
        self._apply = _compiled(config, backend, self._device.type)
        self._uploaded: tuple[_Scalars, Sequence[jax.Array]] | None = None

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
        activations = _named(routing_logits, routing_bias, hidden_states, hidden_states_scale)
        arrays = [*_import(activations, self._device), *self._weights]
        scalars = self._on_device(_scalars(arrays, local_expert_offset, routed_scaling_factor))
        return _run(self._apply, arrays, scalars, num_tokens, out, self._device)

    def _on_device(self, scalars: _Scalars) -> Sequence[jax.Array]:
        """The two numbers on the device, uploaded again only when their values change."""
        if self._uploaded is None or self._uploaded[0] != scalars:
            where = dlpack.jax_device(self._device)
            self._uploaded = scalars, jax.device_put(scalars, where)
        return self._uploaded[1]


@functools.cache
def _compiled(config: jax_moe.MoEConfig, backend: str, device_type: str) -> Any:
    if backend == "auto" and device_type == "cpu":
        backend = "xla"  # "auto" looks at JAX's default device, which may be a GPU
    return jax.jit(functools.partial(jax_moe.apply, config=config, backend=backend))


def _run(
    apply: Any,
    arrays: Sequence[Any],
    scalars: Sequence[Any],
    num_tokens: int | None,
    out: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    shape = arrays[2].shape  # hidden_states
    if out is not None:
        _check_out(out, shape, device)
    live = {}
    if num_tokens is not None:
        live["num_tokens"] = np.int32(_integer("num_tokens", num_tokens, shape[0]))
    result = apply(*arrays, *scalars, **live)
    if out is None:
        return dlpack.to_torch(result)
    if result.size:
        out.copy_(dlpack.to_torch(result))
        dlpack.keep_while_read(result, device)
    return out


def _named(
    logits: torch.Tensor, bias: torch.Tensor, hidden: torch.Tensor, scale: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    names = ("routing_logits", "routing_bias", "hidden_states", "hidden_states_scale")
    return dict(zip(names, (logits, bias, hidden, scale), strict=True))


def _device_of(name: str, tensor: Any) -> torch.device:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    return tensor.device


def _import(tensors: Mapping[str, torch.Tensor | None], device: torch.device) -> list[Any]:
    """Imports all tensors after one hand-over between the streams; None stays None."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("JAX launches on its own stream: torch cannot capture it in a graph")
    ready = []
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")
        ready.append(None if tensor is None else dlpack.check_importable(tensor, name))
    target = dlpack.jax_device(device, next(iter(tensors)))
    stream = dlpack.order_after_torch(device, target)
    return [None if t is None else dlpack.import_buffer(t, target, stream) for t in ready]


def _scalars(arrays: Sequence[Any], offset: Any, factor: Any) -> _Scalars:
    """The two numbers, checked; a known offset must leave room for the local experts."""
    logits, gemm1_weights = arrays[0], arrays[4]
    last = (logits.shape or (0,))[-1] - (gemm1_weights.shape or (0,))[0]
    number = _number("routed_scaling_factor", factor)
    return np.int32(_integer("local_expert_offset", offset, last)), np.float32(number)


def _integer(name: str, value: Any, last: int) -> int:
    _check_on_host(name, value)
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if not 0 <= number <= last:
        raise ValueError(f"{name}: expected 0..{last}, got {number}")
    return number


def _number(name: str, value: Any) -> float:
    _check_on_host(name, value)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


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
