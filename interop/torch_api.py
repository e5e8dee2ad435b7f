"""The layer for PyTorch users: torch tensors in, a torch tensor out, our JAX kernels in between.

`torch_moe` and `torch_moe_routed` are plain functions. `TorchMoE` is the same for a server that
calls it often: the weights are imported once, a call then costs three or four imports and one jit
dispatch on the host.

Calls behave like any torch operation on the current stream: they start after what was enqueued
there, later work on that stream sees the result, and the host does not wait. Nothing is looked up
by address and no result is kept. Under `torch.compile`, `torch.export` and fake tensors they are
the custom operators of `interop.torch_ops`.
"""

from typing import Any

import jax
import torch
from jaxtyping import BFloat16, Float, Float8e4m3fn, Float32, Int32
from torch import Tensor

from interop import dlpack, lending, torch_call, torch_ops
from interop.torch_call import Inputs, Options
from jax_moe import DEEPSEEK_V3, ExpertWeights, LayerInputs, MoEConfig, RoutedInputs, validate
from jax_moe.config import Precision, ScaleFormat
from jax_moe.types import Routing


def torch_moe(
    routing_logits: Float[Tensor, "T E"],
    routing_bias: Float[Tensor, " E"] | None,
    hidden_states: Float[Tensor, "T H"],
    hidden_states_scale: Float32[Tensor, "H//128 T"] | None,
    gemm1_weights: Float8e4m3fn[Tensor, "E_local 2*I H"],
    gemm1_weights_scale: Float32[Tensor, "E_local 2*I//128 H//128"],
    gemm2_weights: Float8e4m3fn[Tensor, "E_local H I"],
    gemm2_weights_scale: Float32[Tensor, "E_local H//128 I//128"],
    local_expert_offset: int,
    routed_scaling_factor: float,
    *,
    config: MoEConfig = DEEPSEEK_V3,
    backend: str = "auto",
    num_tokens: int | None = None,
    expected_rows: float | None = None,
    scale_format: ScaleFormat | None = None,
    swiglu_limit: float | None = None,
    precision: Precision = "fast",
    batch_invariant: bool = False,
    out: BFloat16[Tensor, "T H"] | None = None,
) -> BFloat16[Tensor, "T H"]:
    """`jax_moe.apply` on torch tensors; see there for the mathematics and its source.

    Forward only. A tensor that requires grad is refused where grad mode is on, a dual tensor of
    forward-mode differentiation always.

    Args:
        routing_logits: f32, bf16 or f16[T,E].
        routing_bias: bf16[E] or f32[E], added for the selection only; or None.
        hidden_states: e4m3[T,H], or bf16, f16 or f32[T,H], which is then quantized here.
        hidden_states_scale: f32[H/128,T]; None exactly if `hidden_states` is not e4m3.
        gemm1_weights: e4m3[E_local,2*I,H]; rows 0..I-1 make the up half, rows I..2*I-1 the gate.
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        local_expert_offset: Global id of the first local expert; an int or a 0-d integer tensor on
            the CPU.
        routed_scaling_factor: Factor of all weights; a float or a 0-d tensor on the CPU.
        config: How experts are picked.
        backend: As in `jax_moe.apply`; "auto" is the best for the tensors' device.
        num_tokens: Live rows of the T; the rest costs no matrix work and comes out as zeros. A
            server pads T to few sizes with it, since each new T compiles. None means all.
        expected_rows: As in `jax_moe.apply`.
        scale_format: As in `jax_moe.apply`.
        swiglu_limit: As in `jax_moe.apply`.
        precision: As in `jax_moe.apply`.
        batch_invariant: As in `jax_moe.apply`.
        out: bf16[T,H] on the same device to write to (destination passing), of any strides
            that give each element memory of its own; it costs one copy.

    Returns:
        bf16[T,H]: `out` if given, else a tensor that shares the memory of a JAX array
        (`interop.dlpack.to_torch`).

    Raises:
        TypeError: An argument that should be a tensor or a number is not, or is of another dtype.
        ValueError: A tensor on another device than `hidden_states`, one that the bridge refuses, a
            scalar out of range; also whatever `jax_moe.apply` refuses.
        NotImplementedError: The backend does not run on the tensors' device.
        MemoryError: The device has less memory than the call may need, where that is 256 MiB or
            more; nothing has been launched.
        RuntimeError: Called while torch captures a CUDA graph; of a `TorchMoE` also if memory of
            its weights was moved or freed.
    """
    validate.moe_config(config)
    inputs = LayerInputs.of(
        routing_logits,
        routing_bias,
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        local_expert_offset,
        routed_scaling_factor,
    )
    options = Options(
        backend=backend,
        expected_rows=expected_rows,
        config=config,
        scale_format=scale_format,
        swiglu_limit=swiglu_limit,
        precision=precision,
        batch_invariant=batch_invariant,
    )
    return _call(inputs, options, num_tokens, out)


def torch_moe_routed(
    hidden_states: Float[Tensor, "T H"],
    hidden_states_scale: Float32[Tensor, "H//128 T"] | None,
    gemm1_weights: Float8e4m3fn[Tensor, "E_local 2*I H"],
    gemm1_weights_scale: Float32[Tensor, "E_local 2*I//128 H//128"],
    gemm2_weights: Float8e4m3fn[Tensor, "E_local H I"],
    gemm2_weights_scale: Float32[Tensor, "E_local H//128 I//128"],
    topk_ids: Int32[Tensor, "T k"],
    topk_weights: Float32[Tensor, "T k"],
    local_expert_offset: int,
    *,
    num_experts: int,
    backend: str = "auto",
    num_tokens: int | None = None,
    expected_rows: float | None = None,
    scale_format: ScaleFormat = "f32",
    swiglu_limit: float | None = None,
    precision: Precision = "fast",
    batch_invariant: bool = False,
    out: BFloat16[Tensor, "T H"] | None = None,
) -> BFloat16[Tensor, "T H"]:
    """`jax_moe.apply_routed` on torch tensors: the caller says which experts each token goes to.

    Examples:
        >>> weights, ids = torch.topk(logits.softmax(dim=1), 8)   # any router
        >>> out = torch_moe_routed(x, scale, *experts, ids.int(), weights, 0, num_experts=128)

    Args:
        hidden_states: e4m3[T,H], or bf16, f16 or f32[T,H], which is then quantized here.
        hidden_states_scale: f32[H/128,T]; None exactly if `hidden_states` is not e4m3.
        gemm1_weights: e4m3[E_local,2*I,H]; rows 0..I-1 make the up half, rows I..2*I-1 the gate.
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        topk_ids: i32[T,k], global expert ids. Any value that names no local expert is skipped;
            -1 means "no expert". If an id occurs twice in a row, both weights count.
        topk_weights: f32[T,k], every factor included.
        local_expert_offset: As in `torch_moe`.
        num_experts: E, static.
        backend: As in `torch_moe`.
        num_tokens: As in `torch_moe`.
        expected_rows: As in `jax_moe.apply`.
        scale_format: As in `jax_moe.apply_routed`.
        swiglu_limit: As in `jax_moe.apply_routed`.
        precision: As in `jax_moe.apply`.
        batch_invariant: As in `jax_moe.apply`.
        out: As in `torch_moe`.

    Returns:
        bf16[T,H], as `torch_moe`.

    Raises:
        TypeError: As `torch_moe`.
        ValueError: As `torch_moe`.
        NotImplementedError: As `torch_moe`.
        MemoryError: As `torch_moe`.
        RuntimeError: As `torch_moe`.
    """
    inputs = RoutedInputs.of(
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        topk_ids,
        topk_weights,
        local_expert_offset,
    )
    options = Options(
        backend=backend,
        expected_rows=expected_rows,
        num_experts=num_experts,
        scale_format=scale_format,
        swiglu_limit=swiglu_limit,
        precision=precision,
        batch_invariant=batch_invariant,
    )
    return _call(inputs, options, num_tokens, out)


def _call(inputs: Inputs, options: Options, num_tokens: Any, out: Any) -> Tensor:
    is_traced = torch_ops.is_traced(inputs.hidden_states)
    return (torch_ops if is_traced else torch_call).call(inputs, options, num_tokens, out)


class TorchMoE:
    """`torch_moe` and `torch_moe_routed` with the weights imported once.

    The handle keeps the weights' memory alive. They are shared, not copied, if row-major and
    aligned (else copied once, here): writing to them in place changes what later calls on the
    writing stream compute. `share_memory()`, a queue of `torch.multiprocessing` and resizing move
    shared memory: calls then raise, and the handle is to be made again. Of a call it keeps no more
    than the numbers' values, on the device.

    It is a plain object, no `torch.nn.Module`. A module that holds one can be copied
    (`copy.deepcopy`), pickled and saved whole: the weights go along, and a copy shares their memory
    with what was copied beside them. `state_dict`, `.to()` and dtype conversions of that module do
    not see it: register the weights as buffers if they are to be there as well.

    Examples:
        >>> layer = TorchMoE(ExpertWeights(w13, w13_scale, w2, w2_scale))
        >>> out = layer(logits, bias, x, x_scale, 0, 2.5)
        >>> out = layer.routed(x, x_scale, ids, weights, 0, num_experts=256)
    """

    def __init__(
        self,
        weights: ExpertWeights,
        *,
        config: MoEConfig = DEEPSEEK_V3,
        backend: str = "auto",
        expected_rows: float | None = None,
        scale_format: ScaleFormat | None = None,
        swiglu_limit: float | None = None,
        precision: Precision = "fast",
        batch_invariant: bool = False,
    ) -> None:
        """Imports and checks the weights.

        Args:
            weights: The layer's weights: torch tensors, all on one device.
            config: How experts are picked; `routed` takes its arithmetic only.
            backend: As in `torch_moe`.
            expected_rows: As in `jax_moe.apply`.
            scale_format: As in `jax_moe.apply`.
            swiglu_limit: As in `jax_moe.apply`.
            precision: As in `jax_moe.apply`.
            batch_invariant: As in `jax_moe.apply`.

        Raises:
            TypeError: A weight that is no tensor or of another dtype, or something else than
                `ExpertWeights` and `MoEConfig`.
            ValueError: A weight that the bridge refuses, of another shape, or on another device
                than the first.
            NotImplementedError: The backend does not run on the weights' device.
        """
        given: Any = weights
        if not isinstance(given, ExpertWeights):
            kind = "None" if given is None else type(given).__name__
            raise TypeError(
                f"weights: expected a jax_moe.ExpertWeights of torch tensors, got {kind}"
            )
        tensors = weights._asdict()
        self._bridge = dlpack.bridge_of(weights.gemm1_weights, "gemm1_weights")
        stream = self._bridge.current_stream()
        torch_call.check_dtypes(tensors)
        shared = self._bridge.ready(tensors)
        self._arrays = ExpertWeights(**self._bridge.import_all(shared, stream)).check()
        # Aliases keep the storages that JAX reads, whatever becomes of the caller's tensors.
        self._tensors = ExpertWeights(**{name: t.data for name, t in shared.items()})
        self._lent_at = lending.addresses(self._tensors)
        validate.moe_config(config)
        form, limit = config.merged(scale_format, swiglu_limit)
        self._options = Options(
            backend=backend,
            expected_rows=expected_rows,
            config=config,
            scale_format=form,
            swiglu_limit=limit,
            precision=precision,
            batch_invariant=batch_invariant,
        )
        self._layer = torch_call.layer_for(self._options, self._bridge.target)
        # A graph would hold one of NumPy as a tensor.
        self._options = self._options._replace(expected_rows=self._layer.options.expected_rows)
        self._number = torch_call.Numbers(self._bridge.target)
        self._num_local_experts = torch_call.num_local_experts_of(self._arrays)

    def __call__(
        self,
        routing_logits: Float[Tensor, "T E"],
        routing_bias: Float[Tensor, " E"] | None,
        hidden_states: Float[Tensor, "T H"],
        hidden_states_scale: Float32[Tensor, "H//128 T"] | None,
        local_expert_offset: int,
        routed_scaling_factor: float,
        *,
        num_tokens: int | None = None,
        out: BFloat16[Tensor, "T H"] | None = None,
    ) -> BFloat16[Tensor, "T H"]:
        """Runs the layer; arguments, result and errors as for `torch_moe`."""
        tensors: dict[str, Any] = {
            "routing_logits": routing_logits,
            "routing_bias": routing_bias,
            "hidden_states": hidden_states,
            "hidden_states_scale": hidden_states_scale,
        }
        if torch_ops.is_traced(hidden_states):
            traced = LayerInputs(
                **tensors,
                weights=self._tensors,
                local_expert_offset=local_expert_offset,
                routed_scaling_factor=routed_scaling_factor,
            )
            return torch_ops.call(traced, self._options, num_tokens, out)
        stream = self._stream()
        arrays = torch_call.imported(self._bridge, tensors, stream)
        num_experts = torch_call.num_experts_of(arrays["routing_logits"])
        inputs = LayerInputs(
            **arrays,
            weights=self._arrays,
            local_expert_offset=self._offset(local_expert_offset, num_experts),
            routed_scaling_factor=self._number(torch_call.factor, routed_scaling_factor),
        )
        return self._run(self._layer, inputs, num_tokens, out, stream)

    def routed(
        self,
        hidden_states: Float[Tensor, "T H"],
        hidden_states_scale: Float32[Tensor, "H//128 T"] | None,
        topk_ids: Int32[Tensor, "T k"],
        topk_weights: Float32[Tensor, "T k"],
        local_expert_offset: int,
        *,
        num_experts: int,
        num_tokens: int | None = None,
        out: BFloat16[Tensor, "T H"] | None = None,
    ) -> BFloat16[Tensor, "T H"]:
        """Runs the layer after a router; arguments, result and errors as for `torch_moe_routed`."""
        options = self._options._replace(config=None, num_experts=num_experts)
        if torch_ops.is_traced(hidden_states):
            traced = RoutedInputs.of(
                hidden_states,
                hidden_states_scale,
                *self._tensors,
                topk_ids,
                topk_weights,
                local_expert_offset,
            )
            return torch_ops.call(traced, options, num_tokens, out)
        stream = self._stream()
        tensors = {
            "hidden_states": hidden_states,
            "hidden_states_scale": hidden_states_scale,
            "topk_ids": topk_ids,
            "topk_weights": topk_weights,
        }
        arrays = torch_call.imported(self._bridge, tensors, stream)
        layer = torch_call.layer_for(options, self._bridge.target)
        inputs = RoutedInputs(
            routing=Routing(arrays.pop("topk_ids"), arrays.pop("topk_weights")),
            **arrays,
            weights=self._arrays,
            local_expert_offset=self._offset(local_expert_offset, layer.options.num_experts or 0),
        )
        return self._run(layer, inputs, num_tokens, out, stream)

    def _stream(self) -> dlpack.Stream:
        if lending.addresses(self._tensors) != self._lent_at:
            lending.refuse_moved(self._tensors._asdict(), self._lent_at, "TorchMoE")
        return self._bridge.current_stream()

    def _offset(self, value: Any, num_experts: int) -> jax.Array:
        return self._number(torch_call.offset, value, num_experts, self._num_local_experts)

    def _run(
        self,
        layer: torch_call.Layer,
        inputs: Inputs,
        num_tokens: Any,
        out: Tensor | None,
        stream: dlpack.Stream,
    ) -> Tensor:
        if num_tokens is not None:
            rows = torch_call.rows_of(inputs.hidden_states)
            num_tokens = self._number(torch_call.live_tokens, num_tokens, rows)
        return torch_call.run(layer, inputs, num_tokens, out, self._bridge, stream)

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of; what was imported stays behind.

        Float8 goes as bytes: torch 2.11 pickles such tensors, but `pickle.loads` cannot load them.
        """
        tensors: Any = self._tensors
        weights = [t.view(torch.uint8) if t.itemsize == 1 else t for t in tensors]
        return {"weights": ExpertWeights(*weights), "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Imports the weights again."""
        weights = [t.view(torch.float8_e4m3fn) if t.itemsize == 1 else t for t in state["weights"]]
        options = state["options"]._asdict()
        del options["num_experts"]  # of calls, not of a handle
        self.__init__(ExpertWeights(*weights), **options)  # type: ignore[misc]
