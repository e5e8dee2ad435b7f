"""The layer as operators of torch: what `torch.compile`, `torch.export` and fake tensors see.

`torch.ops.jax_moe.moe` and `torch.ops.jax_moe.moe_routed` take tensors and numbers, so a graph or
an exported program holds the call; a process that loads one imports this module first. Torch
learns the shape of the result from a fake version. No CUDA graph of torch can hold them, since JAX
launches on a stream of its own: `torch.compile(mode="reduce-overhead")` leaves them out of its
graphs, a capture by hand raises `RuntimeError`.

A graph cannot read a number that it holds as a tensor: a 0-d tensor, or one of NumPy, which Dynamo
makes tensors of. Each number has a second argument for that, `NAME_tensor`, which the operator
reads when it runs; `NAME` is then passed over.

Eager calls do not pass here: the operator's dispatch would cost the host more than their checks.
"""

from typing import Any, cast

import jax
import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from interop import destination, dlpack, torch_call
from interop.torch_call import Inputs, Options
from jax_moe import LayerInputs, MoEConfig, RoutedInputs, backends
from jax_moe.config import (
    Precision,
    ScaleFormat,
    Scoring,
    checked_batch_invariant,
    checked_precision,
    checked_scale_format,
)

_NO_CUDA_GRAPH = (torch.Tag.cudagraph_unsafe,)
_STATIC = ("num_experts", "expected_rows", "swiglu_limit")  # eager calls take no tensor for them


def is_traced(tensor: Any) -> bool:
    """Whether a call on this tensor has to be one that torch can see."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx, counters of FLOPs
        or type(tensor) is FakeTensor
        or torch._C._get_tracing_state() is not None  # torch.jit.trace would keep a constant
    )


@torch.library.custom_op("jax_moe::moe", mutates_args=(), tags=_NO_CUDA_GRAPH)
def _moe(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    gemm1_weights: Tensor,
    gemm1_weights_scale: Tensor,
    gemm2_weights: Tensor,
    gemm2_weights_scale: Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    local_expert_offset_tensor: Tensor | None = None,
    routed_scaling_factor_tensor: Tensor | None = None,
    num_tokens_tensor: Tensor | None = None,
    expected_rows_tensor: Tensor | None = None,
    swiglu_limit_tensor: Tensor | None = None,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    scoring: str,
    renormalize: bool,
    swiglu_limit: float | None,
    scale_format: str,
    backend: str,
    num_tokens: int | None,
    expected_rows: float | None,
    precision: str = "fast",
    batch_invariant: bool = False,
) -> Tensor:
    inputs = LayerInputs.of(
        routing_logits,
        routing_bias,
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        _either(local_expert_offset, local_expert_offset_tensor),
        _either(routed_scaling_factor, routed_scaling_factor_tensor),
    )
    config = MoEConfig(
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scoring=cast(Scoring, scoring),
        renormalize=renormalize,
        swiglu_limit=swiglu_limit,
        scale_format=cast(ScaleFormat, scale_format),
    )
    options = Options(
        backend=backend,
        expected_rows=_read("expected_rows", expected_rows, expected_rows_tensor),
        config=config,
        swiglu_limit=_read("swiglu_limit", None, swiglu_limit_tensor),
        precision=cast(Precision, precision),
        batch_invariant=batch_invariant,
    )
    return torch_call.call(inputs, options, _either(num_tokens, num_tokens_tensor))


@torch.library.custom_op("jax_moe::moe_routed", mutates_args=(), tags=_NO_CUDA_GRAPH)
def _moe_routed(
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    gemm1_weights: Tensor,
    gemm1_weights_scale: Tensor,
    gemm2_weights: Tensor,
    gemm2_weights_scale: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    local_expert_offset: int,
    local_expert_offset_tensor: Tensor | None = None,
    num_experts_tensor: Tensor | None = None,
    num_tokens_tensor: Tensor | None = None,
    expected_rows_tensor: Tensor | None = None,
    swiglu_limit_tensor: Tensor | None = None,
    *,
    num_experts: int,
    swiglu_limit: float | None,
    scale_format: str,
    backend: str,
    num_tokens: int | None,
    expected_rows: float | None,
    precision: str = "fast",
    batch_invariant: bool = False,
) -> Tensor:
    inputs = RoutedInputs.of(
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        topk_ids,
        topk_weights,
        _either(local_expert_offset, local_expert_offset_tensor),
    )
    options = Options(
        backend=backend,
        expected_rows=_read("expected_rows", expected_rows, expected_rows_tensor),
        num_experts=_read("num_experts", num_experts, num_experts_tensor),
        swiglu_limit=_read("swiglu_limit", swiglu_limit, swiglu_limit_tensor),
        scale_format=cast(ScaleFormat, scale_format),
        precision=cast(Precision, precision),
        batch_invariant=batch_invariant,
    )
    return torch_call.call(inputs, options, _either(num_tokens, num_tokens_tensor))


def _either(number: Any, tensor: Tensor | None) -> Any:
    """The number as an eager call takes it, which reads and checks tensors."""
    return number if tensor is None else tensor


def _read(name: str, number: Any, tensor: Tensor | None) -> Any:
    """The number, where an eager call takes no tensor."""
    return number if tensor is None else torch_call.host_number(name, tensor)


@_moe.register_fake
def _fake(
    routing_logits: Tensor, routing_bias: Tensor | None, hidden_states: Tensor, *_: Any, **__: Any
) -> Tensor:
    return _result_like(hidden_states)


@_moe_routed.register_fake
def _fake_routed(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return _result_like(hidden_states)


def _result_like(hidden_states: Tensor) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape, dtype=torch.bfloat16)


def _refuse(context: Any, *gradients: Any) -> None:
    raise NotImplementedError("jax_moe is forward only: there is no gradient through it")


_moe.register_autograd(_refuse)
_moe_routed.register_autograd(_refuse)


def call(inputs: Inputs, options: Options, num_tokens: Any, out: Tensor | None = None) -> Tensor:
    """`torch_call.call` as an operator. Torch traces this function, so it stays plain.

    Args:
        inputs: Torch tensors and numbers.
        options: As the caller passed them; the operator checks their values when it runs.
        num_tokens: The live rows, None for all.
        out: The caller's destination, or None.

    Returns:
        `out`, or the operator's result.
    """
    for name, tensor in torch_call.tensors_of(inputs).items():
        if isinstance(tensor, Tensor):
            dlpack.refuse_grad(name, tensor)
        elif tensor is not None or name not in torch_call.OPTIONAL:
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    rows: Any = inputs.hidden_states
    if out is not None:
        destination.check_form(out, rows.shape, rows.device)
    tensors: dict[str, Tensor] = {}
    offset = _integer("local_expert_offset", inputs.local_expert_offset, tensors, stand_in=0)
    keywords: dict[str, Any] = {
        "backend": backends.checked(options.backend),
        "num_tokens": None if num_tokens is None else _integer("num_tokens", num_tokens, tensors),
        "expected_rows": _real_or_none("expected_rows", options.expected_rows, tensors),
        "precision": checked_precision(options.precision),
        "batch_invariant": checked_batch_invariant(options.batch_invariant),
    }
    limit = _real_or_none("swiglu_limit", options.swiglu_limit, tensors, "a number or None")
    if isinstance(inputs, LayerInputs):
        config = options.config
        assert config is not None  # checked by the callers
        form, limit = config.merged(options.scale_format, limit)
        factor = _real("routed_scaling_factor", inputs.routed_scaling_factor, tensors, stand_in=1.0)
        result = torch.ops.jax_moe.moe(
            inputs.routing_logits,
            inputs.routing_bias,
            rows,
            inputs.hidden_states_scale,
            *inputs.weights,
            offset,
            factor,
            **config.routing_options,
            swiglu_limit=limit,
            scale_format=form,
            **keywords,
            **tensors,
        )
    else:
        form = "f32" if options.scale_format is None else options.scale_format
        result = torch.ops.jax_moe.moe_routed(
            rows,
            inputs.hidden_states_scale,
            *inputs.weights,
            *inputs.routing,
            offset,
            num_experts=_integer("num_experts", options.num_experts, tensors, stand_in=0),
            swiglu_limit=limit,
            scale_format=checked_scale_format(form),
            **keywords,
            **tensors,
        )
    return result if out is None else out.copy_(result)


def _integer(name: str, value: Any, tensors: dict[str, Tensor], stand_in: int | None = None) -> Any:
    """An integer as the operator takes it; see `_plain`."""
    return _plain(name, value, "an integer", (int, torch.SymInt), tensors, stand_in)


def _real(
    name: str,
    value: Any,
    tensors: dict[str, Tensor],
    wanted: str = "a real number",
    stand_in: float | None = None,
) -> Any:
    """A real number as the operator takes it; see `_plain`."""
    kinds = (int, float, torch.SymInt, torch.SymFloat)
    return _plain(name, value, wanted, kinds, tensors, stand_in)


def _real_or_none(
    name: str, value: Any, tensors: dict[str, Tensor], wanted: str = "a real number"
) -> Any:
    return None if value is None else _real(name, value, tensors, wanted)


def _plain(
    name: str,
    value: Any,
    wanted: str,
    kinds: tuple[type, ...],
    tensors: dict[str, Tensor],
    stand_in: float | None,
) -> Any:
    """A number without NumPy, torch and JAX; torch would take a bool for one.

    Its range is checked when the operator runs, with that of the shapes.

    Args:
        name: The argument's.
        value: As the caller passed it.
        wanted: What is expected, for errors.
        kinds: The types of plain numbers.
        tensors: Gets what a graph holds as a tensor, by the name of the operator's argument.
        stand_in: What the operator's own argument of that name is then.
    """
    if isinstance(value, Tensor):
        if name in _STATIC:
            raise TypeError(f"{name}: expected {wanted}, got a torch.Tensor")
        torch_call.check_scalar(name, value)
        tensors[f"{name}_tensor"] = value
        return stand_in
    is_dynamo = torch.compiler.is_dynamo_compiling()
    is_of_numpy = isinstance(value, np.ndarray | np.generic)
    if is_of_numpy or (not is_dynamo and isinstance(value, jax.Array)):
        if value.ndim:
            raise ValueError(f"{name}: expected a scalar, got {list(value.shape)}")
        if is_dynamo:  # has made a tensor of it
            tensors[f"{name}_tensor"] = value
            return stand_in
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = type(value).__name__
        if is_dynamo and not isinstance(value, bool | int | float | str | None):
            raise TypeError(f"{name}: expected {wanted}, of Python or NumPy in a graph, got {kind}")
        raise TypeError(f"{name}: expected {wanted}, got {value!r} ({kind})")
    return value
