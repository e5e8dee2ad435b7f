"""What every call of the layer passes through: padding, the memory check, one jitted program.

`LayerInputs` come with the router's inputs, `RoutedInputs` without; all else is the same.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from jax_moe import backends, buckets, lowering_cache, memory, transfers, validate
from jax_moe.config import (
    MoEConfig,
    Precision,
    ScaleFormat,
    checked_batch_invariant,
    checked_precision,
    checked_scale_format,
    checked_swiglu_limit,
)
from jax_moe.device import jax_device_of
from jax_moe.transforms import forward_only
from jax_moe.types import ExpertWeights, GroupPlan, LayerInputs, RoutedInputs
from pallas_kernels.shapes import even_rows

_KEPT_SHAPES = 1024
_TOKEN_AXES = {"hidden_states_scale": 1}  # of all other arrays of tokens it is the first


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a call. Hashable: part of the key of every compiled program.

    Attributes:
        num_experts: E.
        top_k: k.
        config: How experts are picked; None where the caller has picked them.
        expected_rows: Rows an expert is likely to get; None takes T*k/E.
        scale_format: Of the activations that are quantized here.
        swiglu_limit: Clamp before the activation.
        precision: What activations are rounded to.
        batch_invariant: Whether a token's bits are the same in any batch.
        output_dtype: Of the result: "bfloat16", or "float32" where others are added to it.
        num_shared_experts: So many of the last local experts are taken by all live tokens, which
            name them in the last of their k choices, in the experts' order. Not checked.
    """

    num_experts: int
    top_k: int
    config: MoEConfig | None = None
    expected_rows: float | None = None
    scale_format: ScaleFormat = "f32"
    swiglu_limit: float | None = None
    precision: Precision = "fast"
    batch_invariant: bool = False
    output_dtype: str = "bfloat16"
    num_shared_experts: int = 0

    @property
    def epilogue(self) -> dict[str, Any]:
        """The keywords of `up_project`."""
        return {
            "swiglu_limit": self.swiglu_limit,
            "scale_format": self.scale_format,
            "precision": self.precision,
            "batch_invariant": self.batch_invariant,
        }

    def rows_per_expert(self, num_tokens: int) -> float:
        """Rows that an expert is likely to get."""
        if self.expected_rows is not None:
            return self.expected_rows
        return even_rows(num_tokens, self.top_k, self.num_experts)


def run(
    inputs: LayerInputs | RoutedInputs,
    options: Options,
    *,
    backend: str,
    num_tokens: Any,
    name: str,
) -> Float[Array, "T H"]:
    """Runs the layer on checked inputs.

    Args:
        inputs: Checked, scalars as int32 and float32.
        options: What is static.
        backend: As in `jax_moe.apply`.
        num_tokens: As in `jax_moe.apply`.
        name: The public function's, for messages.

    Returns:
        [T,H] of `options.output_dtype`.
    """
    rows, hidden_size = inputs.hidden_states.shape
    live = None if num_tokens is None else validate.integer("num_tokens", num_tokens, 0, rows)
    chosen = backends.select_for_call(backend, inputs)
    if rows == 0:
        return transfers.full((0, hidden_size), 0, options.output_dtype, inputs)
    if buckets.is_eager(inputs):
        live = np.int32(rows) if live is None else live
        padded = buckets.bucket(rows)
        memory.require(jax_device_of(inputs), _bytes_of(inputs, padded, options, chosen), name)
        inputs = _pad_tokens(inputs, padded)
    inputs, live = transfers.upload_numbers((inputs, live))
    out = _jitted(inputs, live, options=options, backend=chosen)
    return buckets.take_rows(out, rows) if out.shape[0] != rows else out


def run_routed(
    inputs: RoutedInputs,
    *,
    num_experts: int,
    backend: str,
    num_tokens: Any = None,
    expected_rows: float | None = None,
    scale_format: ScaleFormat = "f32",
    swiglu_limit: float | None = None,
    precision: Precision = "fast",
    batch_invariant: bool = False,
    num_shared_experts: int = 0,
    output_dtype: str = "bfloat16",
) -> Float[Array, "T H"]:
    """`jax_moe.apply_routed` of unchecked arguments; the last two are those of `Options`."""
    num_experts = validate.num_experts(num_experts)
    inputs = validate.routed_inputs(inputs, num_experts)
    options = Options(
        num_experts=num_experts,
        top_k=inputs.routing.topk_ids.shape[1],
        expected_rows=validate.expected_rows(expected_rows),
        scale_format=checked_scale_format(scale_format),
        swiglu_limit=checked_swiglu_limit(swiglu_limit),
        precision=checked_precision(precision),
        batch_invariant=checked_batch_invariant(batch_invariant),
        num_shared_experts=num_shared_experts,
        output_dtype=output_dtype,
    )
    return run(inputs, options, backend=backend, num_tokens=num_tokens, name="apply_routed")


def per_token(inputs: LayerInputs | RoutedInputs) -> dict[str, Any]:
    """The arrays with an axis of T, by name."""
    arrays = {
        "hidden_states": inputs.hidden_states,
        "hidden_states_scale": inputs.hidden_states_scale,
    }
    if isinstance(inputs, LayerInputs):
        arrays["routing_logits"] = inputs.routing_logits
    else:
        arrays |= inputs.routing._asdict()
    return {name: array for name, array in arrays.items() if array is not None}


def _pad_tokens(inputs: Any, rows: int) -> Any:
    arrays = per_token(inputs)
    padded = {n: buckets.pad(array, _TOKEN_AXES.get(n, 0), rows) for n, array in arrays.items()}
    if isinstance(inputs, RoutedInputs):
        choices = {field: padded.pop(field) for field in inputs.routing._fields}
        padded["routing"] = inputs.routing._replace(**choices)
    return inputs._replace(**padded)


def _bytes_of(inputs: Any, padded: int, options: Options, backend: str) -> int:
    """What an eager call may allocate: the workspace, the result, copies of the arguments."""
    rows, hidden_size = inputs.hidden_states.shape
    weights = inputs.weights
    needed = _workspace_bytes(
        backend,
        padded,
        options.top_k,
        weights.num_local_experts,
        hidden_size,
        weights.intermediate_size,
        options.precision,
    )
    out_bytes = hidden_size * np.dtype(options.output_dtype).itemsize
    needed += padded * out_bytes
    if padded != rows:
        needed += sum(array.nbytes for array in per_token(inputs).values()) * padded // rows
        needed += rows * out_bytes
    arrays = jax.tree.leaves(inputs)
    return needed + sum(a.nbytes for a in arrays if isinstance(a, np.ndarray))


@functools.lru_cache(_KEPT_SHAPES)
def _workspace_bytes(backend: str, *sizes: Any) -> int:
    return backends.load(backend).workspace_bytes(*sizes)


@functools.partial(jax.jit, static_argnames=("options", "backend"))
def _jitted(inputs: Any, num_tokens: Any, *, options: Options, backend: str) -> Array:
    stages = backends.load(backend)
    body: Callable[..., Array] = functools.partial(layer, options=options, stages=stages)
    if stages.KEEPS_LOWERED:
        body = lowering_cache.cached_lowering(
            body, stages.NAME, options, tiling_table(inputs.weights, stages)
        )
    return forward_only(body)(inputs, num_tokens)


def tiling_table(weights: ExpertWeights, stages: backends.Backend) -> object:
    """The tilings in use for a rank's weights: part of what a kept layer depends on."""
    sizes = (weights.hidden_size, weights.intermediate_size, weights.num_local_experts)
    return stages.tiling_table and stages.tiling_table(*sizes)


def layer(
    inputs: LayerInputs | RoutedInputs,
    num_tokens: Array | None,
    *,
    options: Options,
    stages: backends.Backend,
) -> Float[Array, "T H"]:
    """The stages, in the order in which the data flows."""
    expected_rows = options.rows_per_expert(inputs.tokens)
    if stages.layer is not None:
        return stages.layer(
            inputs,
            num_tokens,
            num_experts=options.num_experts,
            expected_rows=expected_rows,
            config=options.config,
            **options.epilogue,
            output_dtype=options.output_dtype,
            num_shared_experts=options.num_shared_experts,
        )
    if inputs.hidden_states_scale is None:
        values, scales = stages.quantize(
            inputs.hidden_states, scale_format=options.scale_format, precision=options.precision
        )
        inputs = inputs._replace(hidden_states=values, hidden_states_scale=scales)
    if isinstance(inputs, LayerInputs):
        assert options.config is not None
        routing = stages.route(
            inputs.routing_logits,
            inputs.routing_bias,
            inputs.routed_scaling_factor,
            config=options.config,
            batch_invariant=options.batch_invariant,
        )
        inputs = inputs.routed(routing)
    plan = stages.plan_groups(
        backends.of_live_tokens(inputs.routing.topk_ids, num_tokens),
        inputs.local_expert_offset,
        num_local_experts=inputs.weights.num_local_experts,
        num_experts=options.num_experts,
        expected_rows=expected_rows,
        precision=options.precision,
        batch_invariant=options.batch_invariant,
    )
    return _matmuls(inputs, plan, options, stages)


def _matmuls(
    inputs: RoutedInputs, plan: GroupPlan, options: Options, stages: backends.Backend
) -> Float[Array, "T H"]:
    """The stages after the plan, for a backend without a `layer` of its own."""
    weights = inputs.weights
    activations = stages.up_project(
        *inputs.rows,
        weights.gemm1_weights,
        weights.gemm1_weights_scale,
        plan,
        **options.epilogue,
    )
    expert_outputs = stages.down_project(
        activations,
        weights.gemm2_weights,
        weights.gemm2_weights_scale,
        plan,
        batch_invariant=options.batch_invariant,
    )
    return stages.unpermute(
        expert_outputs,
        inputs.routing.topk_weights,
        plan,
        batch_invariant=options.batch_invariant,
        output_dtype=options.output_dtype,
    )
