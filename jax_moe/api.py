"""The layer: `apply`, its oracle `reference`, and how much memory they take.

The maths is DeepSeek-V3's (arXiv:2412.19437, sections 2.1.2 and 3.3), in the form of the
flashinfer-bench definition `moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import BFloat16, Float, Float8e4m3fn, Float32, Int32

from jax_moe import backends, buckets, lowering_cache, memory, oracle, validate
from jax_moe.config import DEEPSEEK_V3, MoEConfig
from jax_moe.device import device_of, holder_of
from jax_moe.transforms import forward_only
from pallas_kernels.shapes import QUANT_BLOCK


def apply(
    routing_logits: Float32[Array, "T E"],
    routing_bias: Float[Array, " E"],
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
) -> BFloat16[Array, "T H"]:
    """One expert-parallel rank of a DeepSeek-V3 mixture of experts, in FP8.

    Every token picks `config.top_k` of E experts; this rank holds E_local of them, from
    `local_expert_offset` on, and returns their part of the sum. Adding the outputs of all ranks
    gives the layer. Only local (token, expert) pairs are computed.

    Forward only. Works eagerly, under `jax.jit` without a host synchronization, under `jax.vmap`
    (one example after the other), inside `jax.shard_map`, and through `jax.export` (where backend
    "triton" needs `disabled_checks` for the custom call "triton_kernel_call_ffi"). Eager calls
    pad T to one of few sizes, so a varying T compiles few programs; under your own `jit`, pad T
    yourself and pass `num_tokens`. The same inputs on the same device give the same bits.

    Symbols: T tokens (0 is fine), E experts, H hidden and I intermediate size, both multiples of
    128. Scales multiply: `value * scale` dequantizes.

    Args:
        routing_logits: f32[T,E], router outputs before the sigmoid.
        routing_bias: bf16[E] or f32[E], added to the sigmoid for the selection only.
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
        config: How experts are picked.
        backend: "mosaic", "triton", "xla", or "auto" for the best that the device supports
            (`jax_moe.describe` says which).
        num_tokens: How many of the T rows are live, an integer scalar, may be traced: the rows
            from there on cost no matrix work and come out as zeros, whatever they hold. None
            means all.

    Returns:
        bf16[T,H], exact zeros for tokens without a local expert.

    Raises:
        TypeError: An argument is no array, or of the wrong dtype.
        ValueError: A shape, size or known scalar does not fit; names the argument, what was
            expected and what came.
        NotImplementedError: The backend does not run on this device, or the call is differentiated.
        MemoryError: An eager call needs more memory (from 256 MiB on) than its GPU has; nothing was
            launched. Under your own `jit`, XLA reports that.
    """
    arrays = (
        routing_logits,
        routing_bias,
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
    )
    scalars = _check(arrays, local_expert_offset, routed_scaling_factor, config)
    rows, hidden_size = hidden_states.shape
    live = None if num_tokens is None else validate.integer("num_tokens", num_tokens, 0, rows)
    chosen = backends.select(backend, device_of(arrays))
    if rows == 0:
        return jnp.zeros((0, hidden_size), jnp.bfloat16)
    if buckets.is_eager(arrays):
        live = np.int32(rows) if live is None else live
        padded = buckets.bucket(rows)
        memory.require(holder_of(arrays), _bytes_of(arrays, padded, config, chosen), "apply")
        arrays = _pad_tokens(arrays, padded)
    out = _jitted_layer(*arrays, *scalars, live, config=config, backend=chosen)
    return buckets.head(out, rows) if out.shape[0] != rows else out


def _check(arrays: tuple[Any, ...], offset: Any, factor: Any, config: Any) -> tuple[Any, Any]:
    """Checks the ten arguments; returns the two scalars as int32 and float32."""
    logits, bias, hidden_states, hidden_states_scale, w13, s13, w2, s2 = arrays
    sizes: validate.Sizes = {}
    validate.routing(logits, bias, config, sizes)
    validate.hidden(hidden_states, hidden_states_scale, sizes)
    validate.gemm1(w13, s13, sizes)
    validate.gemm2(w2, s2, sizes)
    num_experts, num_local_experts = sizes["E"][0], sizes["E_local"][0]
    validate.experts(num_local_experts, num_experts)
    return (
        validate.integer("local_expert_offset", offset, 0, num_experts - num_local_experts),
        validate.real("routed_scaling_factor", factor),
    )


def _pad_tokens(arrays: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    logits, bias, hidden_states, hidden_states_scale, w13, s13, w2, s2 = arrays
    if hidden_states_scale is not None:
        hidden_states_scale = buckets.pad(hidden_states_scale, 1, rows)
    hidden_states = buckets.pad(hidden_states, 0, rows)
    logits = buckets.pad(logits, 0, rows)
    return logits, bias, hidden_states, hidden_states_scale, w13, s13, w2, s2


def _bytes_of(arrays: tuple[Any, ...], padded: int, config: MoEConfig, backend: str) -> int:
    """What an eager call may allocate: the workspace, the result, copies of the arguments."""
    (rows, hidden_size), w13 = arrays[2].shape, arrays[4]
    needed = backends.load(backend).workspace_bytes(
        padded, config.top_k, w13.shape[0], hidden_size, w13.shape[1] // 2
    )
    needed += 2 * padded * hidden_size
    if padded != rows:
        per_token = (arrays[0], arrays[2], arrays[3])
        needed += sum(a.nbytes for a in per_token if a is not None) * padded // rows
        needed += 2 * rows * hidden_size
    return needed + sum(a.nbytes for a in arrays if isinstance(a, np.ndarray))


@functools.partial(jax.jit, static_argnames=("config", "backend"))
def _jitted_layer(*arguments: Any, config: MoEConfig, backend: str) -> Array:
    layer = functools.partial(_layer, config=config, stages=backends.load(backend))
    return forward_only(lowering_cache.kept(layer, backend, config))(*arguments)


def _layer(
    routing_logits: Array,
    routing_bias: Array,
    hidden_states: Array,
    hidden_states_scale: Array | None,
    gemm1_weights: Array,
    gemm1_weights_scale: Array,
    gemm2_weights: Array,
    gemm2_weights_scale: Array,
    local_expert_offset: Array,
    routed_scaling_factor: Array,
    num_tokens: Array | None,
    *,
    config: MoEConfig,
    stages: backends.Backend,
) -> Array:
    """The five stages, in the order in which the data flows."""
    counts = {
        "num_local_experts": gemm1_weights.shape[0],
        "num_experts": routing_logits.shape[1],
    }
    if hidden_states_scale is None:
        hidden_states, hidden_states_scale = stages.quantize(hidden_states)
    routing = stages.route(routing_logits, routing_bias, routed_scaling_factor, config=config)
    topk_ids = _of_live_tokens(routing.topk_ids, num_tokens)
    plan = stages.plan_groups(topk_ids, local_expert_offset, **counts)
    rows = hidden_states, hidden_states_scale
    activations = stages.up_project(
        *rows, gemm1_weights, gemm1_weights_scale, plan, whole_layer=True
    )
    expert_outputs = stages.down_project(activations, gemm2_weights, gemm2_weights_scale, plan)
    return stages.unpermute(expert_outputs, routing.topk_weights, plan)


def _of_live_tokens(topk_ids: Array, num_tokens: Array | None) -> Array:
    """The expert ids, with -1, no expert, from token `num_tokens` on."""
    if num_tokens is None:
        return topk_ids
    tokens = jnp.arange(topk_ids.shape[0], dtype=jnp.int32)
    return jnp.where(tokens[:, None] < num_tokens, topk_ids, -1)


def reference(
    routing_logits: Float32[Array, "T E"],
    routing_bias: Float[Array, " E"],
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
) -> BFloat16[Array, "T H"]:
    """The oracle of `apply`: the same arguments and result, everything in between in float32.

    The activations between the matmuls are *not* requantized here, as `apply` does: the two agree
    to about 2.5 % in the Frobenius norm. Slow, but fit for full size: one expert is dequantized at
    a time and only its tokens are visited, so memory stays near `4 * (T*H + 3*I*H)` bytes.

    Args:
        routing_logits: f32[T,E]; this and all the others as in `apply`.
        routing_bias: bf16[E] or f32[E].
        hidden_states: e4m3[T,H], or bf16, f16 or f32[T,H], which is used unquantized.
        hidden_states_scale: f32[H/128,T], or None.
        gemm1_weights: e4m3[E_local,2*I,H].
        gemm1_weights_scale: f32[E_local,2*I/128,H/128].
        gemm2_weights: e4m3[E_local,H,I].
        gemm2_weights_scale: f32[E_local,H/128,I/128].
        local_expert_offset: Integer scalar.
        routed_scaling_factor: Real scalar.
        config: How experts are picked.

    Returns:
        bf16[T,H].

    Raises:
        TypeError: As `apply`.
        ValueError: As `apply`.
        NotImplementedError: The call is differentiated.
    """
    arrays = (
        routing_logits,
        routing_bias,
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
    )
    scalars = _check(arrays, local_expert_offset, routed_scaling_factor, config)
    if hidden_states.shape[0] == 0:
        return jnp.zeros(hidden_states.shape, jnp.bfloat16)
    return _jitted_reference(*arrays, *scalars, config=config)


@functools.partial(jax.jit, static_argnames=("config",))
def _jitted_reference(*arguments: Any, config: MoEConfig) -> Array:
    return forward_only(functools.partial(oracle.layer, config=config))(*arguments)


def workspace_bytes(
    num_tokens: int,
    *,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    config: MoEConfig = DEEPSEEK_V3,
    backend: str = "auto",
) -> int:
    """Bound on the temporary memory of one jitted `apply`, outputs not counted.

    It holds for every routing, also where all pairs are local.

    Args:
        num_tokens: T.
        num_local_experts: E_local.
        hidden_size: H.
        intermediate_size: I.
        config: How experts are picked.
        backend: As in `apply`.

    Returns:
        Bytes.

    Raises:
        TypeError: A count is no integer, `config` no `MoEConfig`.
        ValueError: There is no such backend, or a count is out of range.
        NotImplementedError: The backend does not run on the default device.
    """
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config: expected a jax_moe.MoEConfig, got {type(config).__name__}")
    num_tokens = _count("num_tokens", num_tokens, least=0)
    num_local_experts = _count("num_local_experts", num_local_experts, least=1)
    hidden_size = _count("hidden_size", hidden_size, least=QUANT_BLOCK, step=QUANT_BLOCK)
    intermediate_size = _count(
        "intermediate_size", intermediate_size, least=QUANT_BLOCK, step=QUANT_BLOCK
    )
    stages = backends.load(backends.select(backend, device_of()))
    return stages.workspace_bytes(
        num_tokens, config.top_k, num_local_experts, hidden_size, intermediate_size
    )


def _count(name: str, value: Any, least: int, step: int = 1) -> int:
    number = int(validate.integer(name, value, least, 2**30))
    if number % step:
        raise ValueError(f"{name}: expected a multiple of {step}, got {number}")
    return number
