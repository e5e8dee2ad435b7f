"""One eager call of the layer on torch tensors: import, check, run, export."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

import jax_moe
from interop import destination, dlpack
from jax_moe import (
    ExpertWeights,
    LayerInputs,
    MoEConfig,
    RoutedInputs,
    backends,
    memory,
    transfers,
    validate,
)
from jax_moe.config import (
    Precision,
    ScaleFormat,
    checked_batch_invariant,
    checked_precision,
    checked_scale_format,
    checked_swiglu_limit,
)
from jax_moe.device import Device, describe_device, is_assumed
from jax_moe.transforms import is_tracing
from jax_moe.types import Routing

OPTIONAL = ("routing_bias", "hidden_states_scale")
"""Tensors that may be None."""

_LEADER = "hidden_states"  # no program of ours drops it
_ACCEPTED = {
    name: {ours for ours, theirs in dlpack.DTYPES.items() if np.dtype(theirs) in dtypes}
    for name, (_, dtypes) in validate.ARGUMENTS.items()
}

_QUANTIZED = (torch.float8_e4m3fn,)
_KEPT_NUMBERS = 1024
_KEPT_SHAPES = 1024
_ANY = 2**31 - 1

type Inputs = LayerInputs | RoutedInputs


class Options(NamedTuple):
    """What is static in a call.

    Attributes:
        backend: As in `jax_moe.apply`.
        expected_rows: As in `jax_moe.apply`.
        config: How experts are picked; None where the caller has picked them.
        num_experts: E; None where `routing_logits` tell it.
        scale_format: As in `jax_moe.apply`.
        swiglu_limit: As in `jax_moe.apply`.
        precision: As in `jax_moe.apply`.
        batch_invariant: As in `jax_moe.apply`.
    """

    backend: str = "auto"
    expected_rows: float | None = None
    config: MoEConfig | None = None
    num_experts: int | None = None
    scale_format: ScaleFormat | None = None
    swiglu_limit: float | None = None
    precision: Precision = "fast"
    batch_invariant: bool = False


class Layer(NamedTuple):
    """`jax_moe.apply` or `apply_routed`, jitted, with its options; the backend is a chosen one."""

    apply: Callable[..., jax.Array]
    options: Options


def layer_for(options: Options, device: jax.Device) -> Layer:
    """The layer on a device; checks the options as `jax_moe.apply` does."""
    if is_assumed():
        backends.select_for_call(options.backend, (), device)  # refuses what cannot run there
    # These checks cost the host a tenth of a call, so what passed them is kept.
    checked = _checked_layer if _is_hashable(options) else _checked_layer.__wrapped__
    return checked(describe_device(device), *options)


def _is_hashable(options: Options) -> bool:
    """Whether the options can be looked up; what cannot is refused by the checks."""
    try:
        hash(options)
    except (TypeError, ValueError):  # the latter: a timedelta of NumPy without a unit
        return False
    return True


@functools.lru_cache(_KEPT_SHAPES, typed=True)  # 1 equals True, and is refused
def _checked_layer(there: Device, *fields: Any) -> Layer:
    options = Options(*fields)
    if options.config is None:
        options = options._replace(num_experts=validate.num_experts(options.num_experts))
    if options.scale_format is not None:
        checked_scale_format(options.scale_format)
    options = options._replace(
        backend=backends.select(options.backend, there),
        expected_rows=validate.expected_rows(options.expected_rows),
        swiglu_limit=checked_swiglu_limit(options.swiglu_limit),
        precision=checked_precision(options.precision),
        batch_invariant=checked_batch_invariant(options.batch_invariant),
    )
    return _compiled(options)


@functools.cache
def _compiled(options: Options) -> Layer:
    static = {name: value for name, value in options._asdict().items() if value is not None}

    def layer(inputs: Inputs, num_tokens: Any) -> jax.Array:
        function = jax_moe.apply if isinstance(inputs, LayerInputs) else jax_moe.apply_routed
        return function(*inputs.arguments, num_tokens=num_tokens, **static)

    return Layer(jax.jit(layer), options)


def call(inputs: Inputs, options: Options, num_tokens: Any, out: Tensor | None = None) -> Tensor:
    """`torch_moe` or `torch_moe_routed` on inputs by name."""
    bridge = dlpack.bridge_of(inputs.hidden_states, "hidden_states")
    stream = bridge.current_stream()
    arrays = imported(bridge, tensors_of(inputs), stream)
    weights = ExpertWeights(**{name: arrays.pop(name) for name in ExpertWeights._fields})
    layer = layer_for(options, bridge.target)
    if isinstance(inputs, LayerInputs):
        num_experts = num_experts_of(arrays["routing_logits"])
        arrays["routed_scaling_factor"] = factor(inputs.routed_scaling_factor)
    else:
        num_experts = layer.options.num_experts or 0
        arrays["routing"] = Routing(**{name: arrays.pop(name) for name in Routing._fields})
    arrays["local_expert_offset"] = offset(
        inputs.local_expert_offset, num_experts, num_local_experts_of(weights)
    )
    given = type(inputs)(weights=weights, **arrays)
    live = None if num_tokens is None else live_tokens(num_tokens, rows_of(given.hidden_states))
    return run(layer, given, live, out, bridge, stream)


def imported(
    bridge: dlpack.Bridge, tensors: Mapping[str, Any], stream: dlpack.Stream
) -> dict[str, Any]:
    """The tensors of a call as JAX arrays, by name; their dtypes are checked first."""
    check_dtypes(tensors)
    rows = tensors["hidden_states"]
    if tensors["hidden_states_scale"] is None and getattr(rows, "dtype", None) in _QUANTIZED:
        raise TypeError(
            f"hidden_states_scale: expected a torch.Tensor, as hidden_states is {rows.dtype}, "
            "got NoneType"
        )
    return bridge.import_all(tensors, stream, OPTIONAL, _LEADER)


def check_dtypes(tensors: Mapping[str, Any]) -> None:
    """Refuses dtypes that an argument does not take; the bridge knows only which can cross.

    Args:
        tensors: By the names of their arguments; what is no tensor is left to the bridge.

    Raises:
        TypeError: A tensor is of another dtype; names it.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype in _ACCEPTED[name]:
            continue
        # These have no shape to tell, and the bridge refuses them.
        if not tensor.is_nested and not is_lazy(tensor):
            raise validate.wrong_dtype(name, f"{tensor.dtype} {list(tensor.shape)}")


def tensors_of(inputs: Inputs) -> dict[str, Any]:
    """All tensors of a call by name."""
    tensors: dict[str, Any] = {}
    if isinstance(inputs, LayerInputs):
        tensors["routing_logits"] = inputs.routing_logits
        tensors["routing_bias"] = inputs.routing_bias
    tensors["hidden_states"] = inputs.hidden_states
    tensors["hidden_states_scale"] = inputs.hidden_states_scale
    if isinstance(inputs, RoutedInputs):
        tensors |= inputs.routing._asdict()
    return tensors | inputs.weights._asdict()


def num_experts_of(routing_logits: jax.Array) -> int:
    """E; of logits that are no matrix anything, as `jax_moe.apply` refuses them by name."""
    return (routing_logits.shape or (0,))[-1]


def num_local_experts_of(weights: ExpertWeights) -> int:
    """E_local; of weights of another rank anything, as for `num_experts_of`."""
    return (weights.gemm1_weights.shape or (0,))[0]


def rows_of(hidden_states: jax.Array) -> int:
    """T; of a scalar anything."""
    return hidden_states.shape[0] if hidden_states.shape else _ANY


class Numbers:
    """Checked numbers on a device. An upload is a transfer of its own: once a value is enough."""

    def __init__(self, device: jax.Device) -> None:
        """Of a handle."""
        keep = functools.lru_cache(_KEPT_NUMBERS, typed=True)  # types tell 8 from 8.0
        self._put = functools.partial(jax.device_put, device=device)
        self._upload = keep(self._put)
        self._kept = keep(functools.partial(_uploaded, self._upload))

    def __call__(self, check: Callable[..., Any], value: Any, *sizes: int) -> jax.Array:
        """What `check` makes of a value, uploaded; a tensor is read at every call.

        Args:
            check: `offset`, `factor` or `live_tokens`.
            value: The caller's.
            *sizes: What else `check` takes.
        """
        if type(value) is int or (type(value) is float and value):
            return self._kept(check, value, *sizes)
        checked = check(value, *sizes)
        if isinstance(checked, float | np.floating) and not checked:
            return self._put(checked)  # 0.0 equals -0.0, and would stand for it
        return self._upload(checked)


def _uploaded(
    upload: Callable[[Any], jax.Array], check: Callable[..., Any], *arguments: Any
) -> jax.Array:
    return upload(check(*arguments))


def offset(value: Any, num_experts: int, num_local_experts: int) -> Any:
    """The offset, checked: it leaves room for the local experts.

    Where shapes leave no room at all, `jax_moe.apply` refuses them by name.
    """
    last = num_experts - num_local_experts
    return _integer("local_expert_offset", value, _ANY if last < 0 else last)


def factor(value: Any) -> Any:
    """The routed scaling factor, checked."""
    return validate.real("routed_scaling_factor", host_number("routed_scaling_factor", value))


def live_tokens(value: Any, rows: int) -> Any:
    """The number of live rows, checked."""
    return _integer("num_tokens", value, rows)


def _integer(name: str, value: Any, last: int) -> Any:
    return validate.integer(name, host_number(name, value), 0, last)


def run(
    layer: Layer,
    inputs: Inputs,
    num_tokens: Any,
    out: Tensor | None,
    bridge: dlpack.Bridge,
    stream: dlpack.Stream,
) -> Tensor:
    """Runs the layer on imported arrays and hands the result to torch.

    Args:
        layer: From `layer_for`.
        inputs: JAX arrays and checked numbers.
        num_tokens: The live rows, checked; None for all.
        out: The caller's destination, unchecked, or None.
        bridge: That the arrays came over.
        stream: Torch's current stream.

    Returns:
        `out`, or a tensor that shares the memory of the result.
    """
    if out is not None:
        destination.check(out, inputs.hidden_states.shape, bridge.device)
    _require_memory(layer.options, inputs, bridge.target)
    with _surroundings(bridge.target):
        result = layer.apply(*transfers.upload_numbers((inputs, num_tokens)))
    _refuse_traced("torch tensors have no values while JAX traces", result)
    if not result.size:
        return dlpack.to_torch(result) if out is None else out
    exported = dlpack.export_buffer(result, stream)
    if out is None:
        return exported
    out.copy_(exported)
    dlpack.keep_while_read(result, stream)
    return out


def _refuse_traced(why: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        raise RuntimeError(
            f"{why}: call this outside of jax.jit and the like, or jax_moe.apply on arrays inside"
        )


def _surroundings(device: jax.Device) -> contextlib.AbstractContextManager[object]:
    """Leaves what was set around the call for arrays of JAX; tensors are where they are.

    In the mesh of a `jax.set_mesh` JAX refuses arrays of one device, and a backend is looked for
    on that of `jax.default_device`.
    """
    is_elsewhere = jax.config.jax_default_device not in (None, device)
    in_mesh = not jax.sharding.get_abstract_mesh().empty and not is_tracing()
    if not (is_elsewhere or in_mesh):
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if is_elsewhere:
        stack.enter_context(jax.default_device(device))
    if in_mesh:
        stack.enter_context(jax.set_mesh(None))
    return stack


def host_number(name: str, value: Any) -> Any:
    """A torch scalar as Python's; other things stay as they are."""
    if type(value) in (int, float):  # which is quick
        return value
    _refuse_traced(f"{name}: expected a number, got one that JAX traces, without a value", value)
    if not isinstance(value, Tensor):
        return value
    dlpack.refuse_lazy(name, value)
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else "sparse"
        raise ValueError(f"{name}: expected a number, got a {kind} tensor")
    check_scalar(name, value)
    dlpack.check_memory(value, name)
    return value.item()


def check_scalar(name: str, value: Tensor) -> None:
    """Refuses what cannot be read at once; `torch.compile` traces this, so it stays plain."""
    if value.device.type != "cpu":  # to read it would make the host wait
        raise ValueError(f"{name}: expected a number, got a tensor on {value.device}")
    dlpack.refuse_grad(name, value)
    if value.ndim:
        kind = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected a scalar, got {kind} {list(value.shape)}")


def _require_memory(options: Options, inputs: Inputs, device: jax.Device) -> None:
    """Raises MemoryError if a large call cannot fit, as an eager `jax_moe.apply` does."""
    if isinstance(inputs, RoutedInputs):
        top_k = (inputs.routing.topk_ids.shape or (0,))[-1]
    else:
        top_k = options.config.top_k if options.config else 0
    shapes = inputs.hidden_states.shape, inputs.weights.gemm1_weights.shape
    needed = _bytes_of(options.backend, options.precision, top_k, *shapes)
    if needed is not None:
        memory.require(device, needed, "torch_moe")


@functools.lru_cache(_KEPT_SHAPES)
def _bytes_of(
    backend: str,
    precision: Precision,
    top_k: int,
    hidden_states: tuple[int, ...],
    gemm1_weights: tuple[int, ...],
) -> int | None:
    """Workspace and result of a call; None for shapes that `apply` refuses by name."""
    if len(hidden_states) != 2 or len(gemm1_weights) != 3 or not top_k:
        return None
    num_tokens, hidden_size = hidden_states
    num_local_experts, rows, _ = gemm1_weights
    workspace = backends.load(backend).workspace_bytes(
        num_tokens, top_k, num_local_experts, hidden_size, rows // 2, precision
    )
    return workspace + 2 * num_tokens * hidden_size
