"""The layer: `apply`, `apply_routed`, their oracles, and how much memory they take.

The maths is DeepSeek-V3's (arXiv:2412.19437, sections 2.1.2 and 3.3), in the form of the
flashinfer-bench definition `moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import BFloat16, Float, Float8e4m3fn, Float32, Int32

from jax_moe import backends, entry, oracle, transfers, validate
from jax_moe.config import (
    DEEPSEEK_V3,
    MoEConfig,
    Precision,
    ScaleFormat,
    checked_batch_invariant,
    checked_precision,
    checked_scale_format,
    checked_swiglu_limit,
)
from jax_moe.device import device_of
from jax_moe.entry import Options
from jax_moe.transforms import forward_only
from jax_moe.types import ExpertWeights, LayerInputs, RoutedInputs, Routing
from pallas_kernels.shapes import QUANT_BLOCK


def apply(
    routing_logits: Float[Array, "T E"],
    routing_bias: Float[Array, " E"] | None,
    hidden_states: Float[Array, "T H"],
    hidden_states_scale: Float32[Array, "H//128 T"] | None,
    gemm1_weights: Float8e4m3fn[Array, "E_local 2*I H"],
    gemm1_weights_scale: Float32[Array, "E_local 2*I//128 H//128"],
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    local_expert_offset: int | Int32[Array, ""],
    routed_scaling_factor: float | Float32[Array, ""],
    *,
    config: MoEConfig = DEEPSEEK_V3,
    backend: str = "auto",
    num_tokens: int | Int32[Array, ""] | None = None,
    expected_rows: float | None = None,
    scale_format: ScaleFormat | None = None,
    swiglu_limit: float | None = None,
    precision: Precision = "fast",
    batch_invariant: bool = False,
) -> BFloat16[Array, "T H"]:
    """One expert-parallel rank of a DeepSeek-V3 mixture of experts, in FP8.

    Every token picks `config.top_k` of E experts; this rank holds E_local of them, from
    `local_expert_offset` on, and returns their part of the sum. Adding the outputs of all ranks
    gives the layer. Only local (token, expert) pairs are computed.

    Forward only. Works eagerly, under `jax.jit` without a host synchronization, under `jax.vmap`
    (one example after the other), inside `jax.shard_map`, and through `jax.export`, at static sizes
    (where backend "triton" needs `disabled_checks` for the custom call "triton_kernel_call_ffi").
    Eager calls pad T to one of few sizes, so a varying T compiles few programs; under your own
    `jit`, pad T yourself and pass `num_tokens`. The same inputs on the same device give the same
    bits; with `batch_invariant=True` a token's bits are the same in any batch.

    Symbols: T tokens (0 is fine), E experts, H hidden and I intermediate size, both multiples of
    128. Scales multiply: `value * scale` dequantizes.

    Args:
        routing_logits: f32, bf16 or f16[T,E], router outputs before the sigmoid or softmax.
        routing_bias: bf16[E] or f32[E], added to the scores for the selection only; or None.
        hidden_states: e4m3[T,H], or bf16, f16 or f32[T,H], which is then quantized here.
        hidden_states_scale: f32[H/128,T], one scale per token and 128 columns, block-major;
            None exactly if `hidden_states` is not e4m3. If T equals H/128 the layout cannot be
            checked: `[H/128, T]` is taken for granted.
        gemm1_weights: e4m3[E_local,2*I,H]; rows 0..I-1 make the up half, rows I..2*I-1 the gate.
        gemm1_weights_scale: f32[E_local,2*I/128,H/128], one scale per 128x128 block.
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        local_expert_offset: Global id of the first local expert, an integer scalar; a new value
            does not recompile. Known values must be in 0..E-E_local; with a traced one, local
            experts outside 0..E-1 are skipped.
        routed_scaling_factor: Factor of all weights, a real scalar; a new value does not recompile.
        config: How experts are picked, clamped and quantized; `route` has the formulas.
        backend: "mosaic", "triton", "xla", or "auto" for the best that the device supports
            (`jax_moe.describe` says which).
        num_tokens: How many of the T rows are live, an integer scalar, may be traced: the rows
            from there on cost no matrix work and come out as zeros, whatever they hold. None
            means all.
        expected_rows: Rows that an expert is likely to get, a positive number of Python or NumPy.
            It chooses the tiling; None takes T*k/E, which misleads where T is the capacity of a
            buffer that is mostly empty.
        scale_format: Scales of the activations that are quantized here, as in `quantize`; None
            takes that of `config`.
        swiglu_limit: Clamp before the activation, as in `up_project`; None takes that of `config`.
        precision: "fast" rounds activations to FP8. "high" keeps them in 16 bits, f16 with a power
            of two per row and 128 columns, and an expert's rows in float32 until they are summed;
            `scale_format` then has no effect. `docs/precision.md` says what it gains and costs.
        batch_invariant: Whether the bits of a token's output depend on its own row, its routing and
            the weights alone: not on T, its place, its neighbours, `num_tokens`, `expected_rows`,
            tuned tilings, nor on whether the call is jitted. That holds per device, backend, JAX
            version and `precision`. False lets the number of tokens choose the order of sums;
            `docs/precision.md` says what True changes.

    Returns:
        bf16[T,H], exact zeros for tokens without a local expert.

    Raises:
        TypeError: An argument is no array, of the wrong dtype, or no bool.
        ValueError: A shape, size or known scalar does not fit, or an option differs from that of
            `config`; names the argument, what was expected and what came.
        NotImplementedError: The backend does not run on this device, or the call is differentiated.
        MemoryError: An eager call needs more memory (from 256 MiB on) than its GPU has; nothing was
            launched. Under your own `jit`, XLA reports that.
    """
    weights = ExpertWeights(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale)
    inputs = validate.layer_inputs(
        LayerInputs(
            routing_logits,
            routing_bias,
            hidden_states,
            hidden_states_scale,
            weights,
            local_expert_offset,
            routed_scaling_factor,
        ),
        config,
    )
    scale_format, swiglu_limit = config.merged(scale_format, swiglu_limit)
    options = Options(
        num_experts=routing_logits.shape[1],
        top_k=config.top_k,
        config=config,
        expected_rows=validate.expected_rows(expected_rows),
        scale_format=scale_format,
        swiglu_limit=swiglu_limit,
        precision=checked_precision(precision),
        batch_invariant=checked_batch_invariant(batch_invariant),
    )
    return entry.run(inputs, options, backend=backend, num_tokens=num_tokens, name="apply")


def apply_routed(
    hidden_states: Float[Array, "T H"],
    hidden_states_scale: Float32[Array, "H//128 T"] | None,
    gemm1_weights: Float8e4m3fn[Array, "E_local 2*I H"],
    gemm1_weights_scale: Float32[Array, "E_local 2*I//128 H//128"],
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    topk_ids: Int32[Array, "T k"],
    topk_weights: Float32[Array, "T k"],
    local_expert_offset: int | Int32[Array, ""],
    *,
    num_experts: int,
    backend: str = "auto",
    num_tokens: int | Int32[Array, ""] | None = None,
    expected_rows: float | None = None,
    scale_format: ScaleFormat = "f32",
    swiglu_limit: float | None = None,
    precision: Precision = "fast",
    batch_invariant: bool = False,
) -> BFloat16[Array, "T H"]:
    """`apply` without its router: the caller says which experts each token goes to.

    `apply` is `route` followed by this, bit for bit. All that its docstring says of padding,
    transformations and repeatability holds here.

    Examples:
        >>> weights, ids = jax.lax.top_k(jax.nn.softmax(logits), 8)   # any router
        >>> out = jax_moe.apply_routed(x, scale, *experts, ids, weights, 0, num_experts=128)

    Args:
        hidden_states: e4m3[T,H], or bf16, f16 or f32[T,H], which is then quantized here.
        hidden_states_scale: f32[H/128,T]; None exactly if `hidden_states` is not e4m3.
        gemm1_weights: e4m3[E_local,2*I,H]; rows 0..I-1 make the up half, rows I..2*I-1 the gate.
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        topk_ids: i32[T,k], global expert ids. Any value that names no local expert is skipped;
            -1 means "no expert". If an id occurs twice in a row, both weights count.
        topk_weights: f32[T,k], every factor included, a scaling factor as well. The weight of a
            pair that is skipped has no effect, NaN neither.
        local_expert_offset: Global id of the first local expert, as in `apply`.
        num_experts: E, static.
        backend: As in `apply`.
        num_tokens: As in `apply`.
        expected_rows: As in `apply`.
        scale_format: Scales of the activations that are quantized here, as in `quantize`.
        swiglu_limit: Clamp before the activation, as in `up_project`.
        precision: As in `apply`.
        batch_invariant: As in `apply`.

    Returns:
        bf16[T,H], exact zeros for tokens without a local expert.

    Raises:
        TypeError: As `apply`.
        ValueError: As `apply`.
        NotImplementedError: As `apply`.
        MemoryError: As `apply`.
    """
    weights = ExpertWeights(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale)
    routing = Routing(topk_ids, topk_weights)
    return entry.run_routed(
        RoutedInputs(hidden_states, hidden_states_scale, weights, routing, local_expert_offset),
        num_experts=num_experts,
        backend=backend,
        num_tokens=num_tokens,
        expected_rows=expected_rows,
        scale_format=scale_format,
        swiglu_limit=swiglu_limit,
        precision=precision,
        batch_invariant=batch_invariant,
    )


def reference(
    routing_logits: Float[Array, "T E"],
    routing_bias: Float[Array, " E"] | None,
    hidden_states: Float[Array, "T H"],
    hidden_states_scale: Float32[Array, "H//128 T"] | None,
    gemm1_weights: Float8e4m3fn[Array, "E_local 2*I H"],
    gemm1_weights_scale: Float32[Array, "E_local 2*I//128 H//128"],
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    local_expert_offset: int | Int32[Array, ""],
    routed_scaling_factor: float | Float32[Array, ""],
    *,
    config: MoEConfig = DEEPSEEK_V3,
    scale_format: ScaleFormat | None = None,
    swiglu_limit: float | None = None,
) -> BFloat16[Array, "T H"]:
    """The oracle of `apply`: the same arguments and result, everything in between in float32.

    The activations between the matmuls are *not* requantized here, as `apply` does, nor are bf16,
    f16 or f32 `hidden_states`: in the Frobenius norm the two agree to about 2.3 % for e4m3 inputs
    and 4.3 % for the others, with `precision="high"` to 0.1 %. Slow, but fit for full size: one
    expert is dequantized at a time and only its tokens are visited, so memory stays near
    `4 * (T*H + 3*I*H)` bytes.

    Args:
        routing_logits: f32, bf16 or f16[T,E]; this and all the others as in `apply`.
        routing_bias: bf16[E] or f32[E], or None.
        hidden_states: e4m3[T,H], or bf16, f16 or f32[T,H], which is used unquantized.
        hidden_states_scale: f32[H/128,T], or None.
        gemm1_weights: e4m3[E_local,2*I,H].
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        local_expert_offset: Integer scalar.
        routed_scaling_factor: Real scalar.
        config: How experts are picked and clamped.
        scale_format: Checked, and without effect: nothing is quantized here.
        swiglu_limit: As in `apply`.

    Returns:
        bf16[T,H].

    Raises:
        TypeError: As `apply`.
        ValueError: As `apply`.
        NotImplementedError: The call is differentiated.
    """
    weights = ExpertWeights(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale)
    inputs = validate.layer_inputs(
        LayerInputs(
            routing_logits,
            routing_bias,
            hidden_states,
            hidden_states_scale,
            weights,
            local_expert_offset,
            routed_scaling_factor,
        ),
        config,
    )
    _, limit = config.merged(scale_format, swiglu_limit)
    if not inputs.tokens:
        return transfers.full(hidden_states.shape, 0, jnp.bfloat16, inputs)
    inputs = transfers.upload_numbers(inputs)
    return _jitted_reference(inputs, config=config, swiglu_limit=limit)


@functools.partial(jax.jit, static_argnames=("config", "swiglu_limit"))
def _jitted_reference(inputs: LayerInputs, **static: Any) -> Array:
    return forward_only(functools.partial(oracle.layer, **static))(inputs)


def reference_routed(
    hidden_states: Float[Array, "T H"],
    hidden_states_scale: Float32[Array, "H//128 T"] | None,
    gemm1_weights: Float8e4m3fn[Array, "E_local 2*I H"],
    gemm1_weights_scale: Float32[Array, "E_local 2*I//128 H//128"],
    gemm2_weights: Float8e4m3fn[Array, "E_local H I"],
    gemm2_weights_scale: Float32[Array, "E_local H//128 I//128"],
    topk_ids: Int32[Array, "T k"],
    topk_weights: Float32[Array, "T k"],
    local_expert_offset: int | Int32[Array, ""],
    *,
    num_experts: int,
    scale_format: ScaleFormat = "f32",
    swiglu_limit: float | None = None,
) -> BFloat16[Array, "T H"]:
    """The oracle of `apply_routed`, in float32, as `reference` is that of `apply`.

    Args:
        hidden_states: As in `apply_routed`, used unquantized where it is not e4m3.
        hidden_states_scale: As in `apply_routed`, and so on.
        gemm1_weights: e4m3[E_local,2*I,H].
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        topk_ids: i32[T,k].
        topk_weights: f32[T,k].
        local_expert_offset: Integer scalar.
        num_experts: E, static.
        scale_format: Checked, and without effect: nothing is quantized here.
        swiglu_limit: As in `apply_routed`.

    Returns:
        bf16[T,H].

    Raises:
        TypeError: As `apply`.
        ValueError: As `apply`.
        NotImplementedError: The call is differentiated.
    """
    weights = ExpertWeights(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale)
    routing = Routing(topk_ids, topk_weights)
    inputs = RoutedInputs(hidden_states, hidden_states_scale, weights, routing, local_expert_offset)
    num_experts = validate.num_experts(num_experts)
    inputs = validate.routed_inputs(inputs, num_experts)
    checked_scale_format(scale_format)
    limit = checked_swiglu_limit(swiglu_limit)
    if not inputs.tokens:
        return transfers.full(hidden_states.shape, 0, jnp.bfloat16, inputs)
    inputs = transfers.upload_numbers(inputs)
    return _jitted_reference_routed(inputs, num_experts=num_experts, swiglu_limit=limit)


@functools.partial(jax.jit, static_argnames=("num_experts", "swiglu_limit"))
def _jitted_reference_routed(inputs: RoutedInputs, **static: Any) -> Array:
    return forward_only(functools.partial(oracle.routed_layer, **static))(inputs)


def workspace_bytes(
    num_tokens: int,
    *,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    config: MoEConfig = DEEPSEEK_V3,
    top_k: int | None = None,
    backend: str = "auto",
    precision: Precision = "fast",
) -> int:
    """Bound on the temporary memory of one jitted `apply` or `apply_routed`, outputs not counted.

    It holds for every routing, also where all pairs are local.

    Args:
        num_tokens: T.
        num_local_experts: E_local.
        hidden_size: H.
        intermediate_size: I.
        config: How experts are picked.
        top_k: Experts per token of an `apply_routed`; None takes that of `config`.
        backend: As in `apply`.
        precision: As in `apply`.

    Returns:
        Bytes.

    Raises:
        TypeError: A count is no integer, `config` no `MoEConfig`.
        ValueError: There is no such backend or precision, or a count is out of range.
        NotImplementedError: The backend does not run on the default device.
    """
    validate.moe_config(config)
    count = functools.partial(validate.static_integer, high=2**30)
    num_tokens = count("num_tokens", num_tokens, 0)
    top_k = config.top_k if top_k is None else count("top_k", top_k, 1)
    num_local_experts = count("num_local_experts", num_local_experts, 1)
    hidden_size = count("hidden_size", hidden_size, QUANT_BLOCK, step=QUANT_BLOCK)
    intermediate_size = count("intermediate_size", intermediate_size, QUANT_BLOCK, step=QUANT_BLOCK)
    precision = checked_precision(precision)
    stages = backends.load(backends.select(backend, device_of()))
    if not num_tokens:
        return 0
    return stages.workspace_bytes(
        num_tokens, top_k, num_local_experts, hidden_size, intermediate_size, precision
    )
