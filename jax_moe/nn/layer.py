"""The layer as a pure function: for Flax, Equinox, Haiku, or no framework at all."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import BFloat16, Float, Float32, Int32

from jax_moe import backends, entry, stages, transfers, validate
from jax_moe.config import Precision, checked_batch_invariant, checked_precision
from jax_moe.nn.config import LayerConfig, checked_layer_config
from jax_moe.numerics import matmul, matmul_in_tiles
from jax_moe.parallel import api, placement
from jax_moe.parallel.ranks import AxisName
from jax_moe.router import with_shared
from jax_moe.scalars import alive, boolean, got, integer
from jax_moe.transforms import forward_only
from jax_moe.types import ExpertWeights, LayerWeights, RoutedInputs, Routing
from pallas_kernels.shapes import even_rows

_MOST_ROWS_OF_FUSED = 16  # more would choose tiles that are too tall for the routed experts


def moe_layer(
    params: LayerWeights,
    hidden_states: Float[Array, "... H"],
    *,
    config: LayerConfig,
    axis_name: AxisName | None = None,
    backend: str = "auto",
    num_tokens: int | Int32[Array, ""] | None = None,
    with_load: bool = False,
    precision: Precision = "fast",
    batch_invariant: bool = False,
) -> BFloat16[Array, "... H"] | tuple[BFloat16[Array, "... H"], Int32[Array, " E"]]:
    """Gate, router, routed experts and shared experts; no residual.

    For the rows x of the hidden states, of which q is the quantized form::

        logits = f32(x) @ f32(gate_weight).T                  (float32, true)
        out = sum of w_e expert_e(q) over the chosen e  +  g shared(q)
        g = sigmoid(f32(x) @ f32(shared_gate).T), or 1 without a gate

    x is quantized once for routed and shared experts, with `precision="high"` not at all. The sum
    is rounded to bf16 once; with "fast" and shared experts that are not fused, so are its two terms
    before. Forward only; jit it, alone or with what is around it. Works under `jax.jit`,
    `jax.lax.scan` over layers with stacked weights, `jax.vmap`, `jax.shard_map` and `jax.export`,
    as `apply` does.

    Examples:
        >>> folder = "DeepSeek-V3"                                            # doctest: +SKIP
        >>> params = jax_moe.checkpoint.load_layer(folder, 3)                 # doctest: +SKIP
        >>> config = LayerConfig.from_hf(json.load(open(f"{folder}/config.json")))  # doctest: +SKIP
        >>> y = jax.jit(functools.partial(moe_layer, config=config))(params, x)     # doctest: +SKIP

    Args:
        params: The weights, from `jax_moe.checkpoint.load_layer`, or from `fuse_shared`.
        hidden_states: bf16, f16 or f32[...,H].
        config: What the layer is.
        axis_name: None where this device holds all experts. Inside of `jax.shard_map`, the axis (or
            axes) of the ranks: each brings tokens of its own and holds E/N experts, and tokens
            travel (`apply_expert_parallel`). Shared experts are on every rank, not fused.
        backend: As in `apply`.
        num_tokens: How many of the T rows (all axes but the last, flattened) are live, as in
            `apply`.
        with_load: Whether to return the load as well. Static.
        precision: As in `apply`.
        batch_invariant: As in `apply`, gates and shared experts included.

    Returns:
        bf16[...,H]; with `with_load` also i32[E]: the (token, expert) pairs of each routed expert,
        over all ranks.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A shape does not fit; names the argument, what was expected and what came.
        NotImplementedError: As `apply`.
    """
    x, num_fused = _checked(params, hidden_states, config, axis_name)
    router = config.router
    with_load = boolean("with_load", with_load)
    live: Any = None if num_tokens is None else integer("num_tokens", num_tokens, 0, len(x))
    batch_invariant = checked_batch_invariant(batch_invariant)
    is_gated = config.has_shared_gate  # shared experts then have other weights than 1
    routing = stages.route_with_shared(
        _gate_logits(x, params.gate_weight, batch_invariant),
        params.e_score_correction_bias,
        config.routed_scaling_factor,
        config=router,
        num_shared_experts=0 if is_gated else num_fused,
        batch_invariant=batch_invariant,
        backend=backend,
    )
    precision = checked_precision(precision)
    rows: tuple[Any, Any] = (x, None)  # with "high" they are used as they are
    if precision == "fast":
        rows = stages.quantize(x, scale_format=router.scale_format, backend=backend)
    call: dict[str, Any] = {
        "backend": backend,
        "num_tokens": live,
        "scale_format": router.scale_format,
        "precision": precision,
        "batch_invariant": batch_invariant,
    }
    # "high" rounds once, after the shared experts; elsewhere FP8's error hides a second bf16's.
    is_added_to = params.shared_experts is not None and precision == "high"
    dtype = "float32" if is_added_to else "bfloat16"
    load: Any = None
    out: Any
    if axis_name is not None:
        out = api.run_routed(
            RoutedInputs(*rows, params.experts, routing, 0),
            num_experts=config.num_experts,
            axis_name=axis_name,
            swiglu_limit=router.swiglu_limit,
            with_load=with_load,
            result_dtype=dtype,
            **call,
        )
        out, load = out if with_load else (out, None)
    else:
        if with_load:
            counted = transfers.upload_numbers((routing.topk_ids, live))
            load = _load(*counted, num_experts=config.num_experts)
        if is_gated and num_fused:
            weight = _shared_weight(params, x, config, batch_invariant)
            routing = _with_shared(routing, config.num_experts, num_fused, weight)
        out = entry.run_routed(
            RoutedInputs(*rows, params.experts, routing, 0),
            num_experts=config.num_experts + num_fused,
            expected_rows=_expected_rows(len(x), config, num_fused),
            swiglu_limit=router.swiglu_limit,
            num_shared_experts=num_fused,
            output_dtype=dtype,
            **call,
        )
    if params.shared_experts is not None:
        shared = _shared(rows, params, x, config, call | {"output_dtype": dtype})
        out = (out.astype(jnp.float32) + shared.astype(jnp.float32)).astype(jnp.bfloat16)
    out = out.reshape(hidden_states.shape)
    return (out, load) if with_load else out


def fuse_shared(params: LayerWeights, config: LayerConfig) -> LayerWeights:
    """Makes the shared experts further experts of the same grouped matmuls.

    Every token takes them: their ids come after those of the routed experts, so none collides.
    That saves launches where tokens are few. Shared experts that are wider than a routed one are
    cut into several, which is exact up to the order of sums. The weights are copied once; call it
    when they are loaded, never per call.

    Args:
        params: All experts of the layer on one device.
        config: What the layer is.

    Returns:
        Weights with E plus the shared experts and no `shared_experts` of their own.

    Raises:
        TypeError: `params` or `config` is of another type.
        ValueError: There are no shared experts, their size is no multiple of a routed expert's,
            their activation is clamped otherwise, or arrays are split over Explicit mesh axes.
    """
    width = checked_layer_config(config).intermediate_size
    shared = checked_layer_weights("params", params).shared_experts
    if shared is None:
        raise ValueError("params: expected shared_experts to fuse, got None")
    _check_arrays("params", params, config)
    held = params.experts.num_local_experts
    if held != config.num_experts:
        raise ValueError(f"params.experts: expected all {config.num_experts} experts, got {held}")
    if config.shared_intermediate_size % width:
        raise ValueError(
            f"config: expected shared_intermediate_size to be a multiple of {width}, "
            f"got {config.shared_intermediate_size}"
        )
    validate.whole(**{"params.experts": params.experts, "params.shared_experts": shared})
    if config.shared_swiglu_limit != config.router.swiglu_limit:
        raise ValueError(
            f"config: expected shared_swiglu_limit = {config.router.swiglu_limit}, as for routed "
            f"experts, got {config.shared_swiglu_limit}"
        )
    pieces = config.shared_intermediate_size // width
    cut = (_cut_rows, _cut_rows, _cut_columns, _cut_columns)
    fused = [
        _appended(routed, function(ours, pieces))
        for routed, ours, function in zip(params.experts, shared, cut, strict=True)
    ]
    return params._replace(experts=ExpertWeights(*fused), shared_experts=None)


def _cut_rows(array: Any, pieces: int) -> Any:
    """[1,2*n*m,k] as [n,2*m,k]: each piece gets its rows of the up half and of the gate."""
    _, rows, columns = array.shape
    halves = array.reshape(2, pieces, rows // (2 * pieces), columns)
    return halves.swapaxes(0, 1).reshape(pieces, rows // pieces, columns)


def _cut_columns(array: Any, pieces: int) -> Any:
    """[1,k,n*m] as [n,k,m]."""
    _, rows, columns = array.shape
    return array.reshape(rows, pieces, columns // pieces).swapaxes(0, 1)


def _appended(routed: Any, shared: Any) -> Any:
    concatenate = np.concatenate if isinstance(routed, np.ndarray) else jnp.concatenate
    return concatenate([routed, shared], axis=0)


def _check_experts(name: str, params: LayerWeights, config: LayerConfig) -> None:
    """Checks the experts' arrays, and that the shared experts are held as one."""
    hidden_size, shared = (config.hidden_size, "config"), params.shared_experts
    sizes: validate.Sizes = {"H": hidden_size, "I": (config.intermediate_size, "config")}
    validate.weights(params.experts, sizes, f"{name}.experts")
    if shared is not None:
        sizes = {"H": hidden_size, "I": (config.shared_intermediate_size, "config")}
        validate.weights(shared, sizes, f"{name}.shared_experts")
        if shared.num_local_experts != 1:
            raise ValueError(
                f"{name}.shared_experts: expected one expert of all their width, got "
                f"{shared.num_local_experts}"
            )


def checked_layer_weights(name: str, value: object) -> LayerWeights:
    """Checks the type of a layer's weights.

    Raises:
        TypeError: It is another.
    """
    if not isinstance(value, LayerWeights):
        raise TypeError(f"{name}: expected jax_moe.LayerWeights, got {got(value)}")
    return value


def _checked(
    params: Any, hidden_states: Any, config: Any, axis_name: Any
) -> tuple[Float[Array, "T H"], int]:
    """The hidden states as rows, and how many experts of the weights are fused shared ones."""
    checked_layer_weights("params", params)
    checked_layer_config(config)
    if not isinstance(hidden_states, jax.Array | np.ndarray) or hidden_states.ndim < 1:
        raise TypeError(f"hidden_states: expected an array [..., H], got {got(hidden_states)}")
    alive("hidden_states", hidden_states)  # before it is reshaped
    if hidden_states.shape[-1] != config.hidden_size:
        raise ValueError(
            f"hidden_states: expected [..., H] with H = {config.hidden_size} from config, "
            f"got {got(hidden_states)}"
        )
    x: Any = hidden_states.reshape(-1, hidden_states.shape[-1])
    sizes: validate.Sizes = {"H": (config.hidden_size, "config")}
    validate.array("hidden_states", x, "T H", validate.UNQUANTIZED, sizes)
    num_fused = _check_arrays("params", params, config)
    validate.whole(hidden_states=hidden_states, params=params)
    if axis_name is not None and num_fused:
        raise ValueError(
            "params: expected shared_experts that are not fused, given axis_name, got None"
        )
    held = params.experts.num_local_experts
    if axis_name is None and held != config.num_experts + num_fused:
        raise ValueError(
            f"experts: expected {_all_experts(config, num_fused)} without an axis_name, got {held}"
        )
    return x, num_fused


def check_fits(name: str, params: LayerWeights, config: LayerConfig) -> None:
    """Checks that weights are of a layer: all of its experts, or an equal part for each rank.

    Args:
        name: The argument that holds them.
        params: The weights.
        config: What the layer is.

    Raises:
        TypeError: An array is of another type.
        ValueError: A shape or the number of experts does not fit, or something is missing.
    """
    num_fused = _check_arrays(name, params, config)
    held, num_experts = params.experts.num_local_experts, config.num_experts
    is_part = not num_fused and held > 0 and num_experts % held == 0
    if held != num_experts + num_fused and not is_part:
        part = "" if num_fused else ", or an equal part of them"
        raise ValueError(
            f"{name}.experts: expected {_all_experts(config, num_fused)}{part}, got {held}"
        )


def _all_experts(config: LayerConfig, num_fused: int) -> str:
    fused = f" and, without shared_experts, {num_fused} fused ones" if num_fused else ""
    return f"all {config.num_experts} experts{fused}"


def _check_arrays(name: str, params: LayerWeights, config: LayerConfig) -> int:
    """Checks what `config` says of the weights; returns how many experts are fused shared ones."""
    sizes: validate.Sizes = {
        "H": (config.hidden_size, "config"),
        "E": (config.num_experts, "config"),
    }
    validate.gates(params, sizes)
    if params.shared_experts is not None and not config.shared_intermediate_size:
        raise ValueError(f"{name}.shared_experts: expected None, as config says, got ExpertWeights")
    _check_experts(name, params, config)
    bias = params.e_score_correction_bias
    if config.has_routing_bias != (bias is not None):
        raise ValueError(
            f"e_score_correction_bias: expected {'an array' if config.has_routing_bias else 'None'}"
            f", as config says, got {got(bias)}"
        )
    if config.has_shared_gate and params.shared_gate is None:
        raise TypeError("shared_gate: expected a JAX or NumPy array, as config says, got None")
    if params.shared_gate is not None and not config.has_shared_gate:
        raise ValueError(
            f"shared_gate: expected None, as config says, got {got(params.shared_gate)}"
        )
    if params.shared_experts is None and config.shared_intermediate_size:
        return config.shared_intermediate_size // config.intermediate_size
    return 0


def _gate_logits(x: Array, weight: Any, batch_invariant: bool) -> Float32[Array, "T E"]:
    # One example after the other under `jax.vmap`, which changes shapes as well.
    product = _matmul_in_tiles if batch_invariant else matmul
    return product(x.astype(jnp.float32), weight.astype(jnp.float32))


# Jitted, as is all eager arithmetic with numbers here: operations one by one would upload them,
# which `jax.transfer_guard` may forbid.
_matmul_in_tiles = jax.jit(forward_only(matmul_in_tiles))
_with_shared = jax.jit(with_shared, static_argnums=(1, 2))


@functools.partial(jax.jit, static_argnames="num_experts")
def _load(topk_ids: Array, num_tokens: Array | None, *, num_experts: int) -> Int32[Array, " E"]:
    """Pairs of each routed expert among the live tokens."""
    return placement.load(backends.of_live_tokens(topk_ids, num_tokens), num_experts)


def _shared_weight(
    params: LayerWeights, x: Array, config: LayerConfig, batch_invariant: bool
) -> Float[Array, "T 1"]:
    if not config.has_shared_gate:
        return transfers.full((x.shape[0], 1), 1, jnp.float32, x)
    return jax.nn.sigmoid(_gate_logits(x, params.shared_gate, batch_invariant))


def _shared(
    rows: tuple[Any, Any], params: LayerWeights, x: Array, config: LayerConfig, call: dict[str, Any]
) -> Float[Array, "T H"]:
    """The shared experts as one that every token takes."""
    weight = _shared_weight(params, x, config, call["batch_invariant"])
    every = Routing(transfers.full((x.shape[0], 1), 0, jnp.int32, x), weight)
    experts: Any = params.shared_experts
    return entry.run_routed(
        RoutedInputs(*rows, experts, every, 0),
        num_experts=1,
        swiglu_limit=config.shared_swiglu_limit,
        num_shared_experts=1,
        **call,
    )


def _expected_rows(num_tokens: int, config: LayerConfig, num_fused: int) -> float:
    """Rows that an expert is likely to get, for the height of tiles.

    A fused expert gets all T rows, and each of its tiles reads its weights: low ones, for the few
    rows of a routed expert, would read them T/16 times. Tall tiles are narrow for a routed expert.
    """
    routed = even_rows(num_tokens, config.router.top_k, config.num_experts)
    shared = min(num_tokens / 4, _MOST_ROWS_OF_FUSED) if num_fused else 0
    return max(routed, shared, 1e-3)
