"""Checks of what a caller passes, before anything is traced or compiled.

Every message names the argument, what was expected and what came. Shapes are written in
symbols ("E_local 2*I H"); the first argument that holds a symbol sets its size for the others.

One layout cannot be told from its transpose: where T equals H/128, a `[T, H/128]` scale is as
square as a `[H/128, T]` one. It is taken for `[H/128, T]`, always.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_moe.config import MoEConfig, check_experts
from jax_moe.scalars import alive, got
from jax_moe.scalars import boolean as boolean
from jax_moe.scalars import integer as integer
from jax_moe.scalars import real as real
from jax_moe.scalars import static_integer as static_integer
from jax_moe.shardings import whole as whole
from jax_moe.types import ExpertWeights, GroupPlan, LayerInputs, Quantized, RoutedInputs
from pallas_kernels.shapes import QUANT_BLOCK

E4M3 = (np.dtype(jnp.float8_e4m3fn),)
F32 = (np.dtype(np.float32),)
I32 = (np.dtype(np.int32),)
BF16 = (np.dtype(jnp.bfloat16),)
BIAS = (*BF16, *F32)
EXPERT_OUTPUTS = BIAS
F16 = (np.dtype(np.float16),)
UNQUANTIZED = (*BF16, *F16, *F32)
ROWS = {"fast": E4M3, "high": E4M3 + F16}  # with scales, by precision
LOGITS = (*F32, *BF16, np.dtype(np.float16))


class Argument(NamedTuple):
    """What an array argument of the layer is: its axes in symbols, and the accepted dtypes."""

    dims: str
    dtypes: tuple[np.dtype, ...]


ARGUMENTS = {
    "routing_logits": Argument("T E", LOGITS),
    "routing_bias": Argument("E", BIAS),
    "hidden_states": Argument("T H", E4M3 + UNQUANTIZED),
    "hidden_states_scale": Argument(f"H/{QUANT_BLOCK} T", F32),
    "gemm1_weights": Argument("E_local 2*I H", E4M3),
    "gemm1_weights_scale": Argument(f"E_local 2*I/{QUANT_BLOCK} H/{QUANT_BLOCK}", F32),
    "gemm2_weights": Argument("E_local H I", E4M3),
    "gemm2_weights_scale": Argument(f"E_local H/{QUANT_BLOCK} I/{QUANT_BLOCK}", F32),
    "topk_ids": Argument("T k", I32),
    "topk_weights": Argument("T k", F32),
}

type Sizes = dict[str, tuple[int, str]]
"""Symbol -> its size and the argument that set it."""

_ARRAYS = (jax.Array, np.ndarray)
_MAX_PAIRS = 2**30
_MAX_LOGITS = 2**31


def array(name: str, value: Any, dims: str, dtypes: tuple[np.dtype, ...], sizes: Sizes) -> None:
    """Checks an array's type, dtype, rank and shape, and learns the symbols that are new.

    Args:
        name: The argument's.
        value: What the caller passed.
        dims: Its axes in symbols, such as "E_local 2*I/128 H/128".
        dtypes: The accepted dtypes.
        sizes: Symbols known so far; new ones are added.

    Raises:
        TypeError: Not a JAX or NumPy array, or of another dtype.
        ValueError: Of another rank or shape, or of symbolic sizes (`jax.export.symbolic_shape`).
    """
    axes = _axes(dims)
    if not isinstance(value, _ARRAYS) or isinstance(value, np.ma.MaskedArray):
        wanted = _wanted(dims, dtypes)
        raise TypeError(f"{name}: expected a JAX or NumPy array {wanted}, got {got(value)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {_wanted(dims, dtypes)}, got {got(value)}")
    alive(name, value)
    if isinstance(value, jax.Array) and value.aval.memory_space == jax.memory.Space.Host:
        raise ValueError(
            f"{name}: expected an array in the device's memory, got {got(value)} in the host's; "
            "jax.device_put(..., jax.memory.Space.Device) moves it"
        )
    if value.ndim != len(axes):
        rank = f"rank {len(axes)}, {_wanted(dims, dtypes)}"
        raise ValueError(f"{name}: expected {rank}, got {got(value)}")
    if isinstance(value, jax.core.Tracer) and not all(type(size) is int for size in value.shape):
        raise ValueError(
            f"{name}: expected static sizes, got {got(value)}; jax.export needs a program per T, "
            "and num_tokens tells it how many rows are live"
        )
    for position, (axis, found) in enumerate(zip(axes, value.shape, strict=True)):
        if not _matches(axis, found, name, sizes):
            expected = [_size(axis, sizes) for axis in axes]
            hint = " (transposed?)" if list(value.shape) == expected[::-1] else ""
            known = zip(expected, dims.split(), strict=True)
            shape = ", ".join(text if size is None else str(size) for size, text in known)
            raise ValueError(
                f"{name}: expected {_wanted(dims, dtypes)} = [{shape}]{_source(axis, sizes)}, "
                f"got {got(value)}{hint}: axis {position} differs"
            )


def argument(name: str, value: Any, sizes: Sizes, prefix: str = "") -> None:
    """`array` for an argument of the layer, by its name in `ARGUMENTS`; `prefix` is for errors."""
    array(prefix + name, value, *ARGUMENTS[name], sizes)


def wrong_dtype(name: str, found: str) -> TypeError:
    """The error of `argument` for what is no JAX or NumPy array: a tensor of torch.

    Args:
        name: The argument's, one of `ARGUMENTS`.
        found: Dtype and shape of what came.
    """
    return TypeError(f"{name}: expected {_wanted(*ARGUMENTS[name])}, got {found}")


class _Axis(NamedTuple):
    """`factor * symbol / divisor`, as "2*I/128"; a symbol that is a number stands for itself."""

    factor: int
    symbol: str
    divisor: int


@functools.cache
def _axes(dims: str) -> tuple[_Axis, ...]:
    axes = []
    for text in dims.split():
        factor, _, rest = text.rpartition("*")
        symbol, _, divisor = rest.partition("/")
        axes.append(_Axis(int(factor or 1), symbol, int(divisor or 1)))
    return tuple(axes)


def _matches(axis: _Axis, found: int, name: str, sizes: Sizes) -> bool:
    known = sizes.get(axis.symbol)
    if known is not None:
        return found == known[0] * axis.factor // axis.divisor
    if axis.symbol.isdecimal():
        return found == int(axis.symbol)
    if found * axis.divisor % axis.factor:
        return False
    sizes[axis.symbol] = (found * axis.divisor // axis.factor, name)
    return True


def _size(axis: _Axis, sizes: Sizes) -> int | None:
    if axis.symbol.isdecimal():
        return int(axis.symbol)
    if axis.symbol not in sizes:
        return None
    return sizes[axis.symbol][0] * axis.factor // axis.divisor


def _source(axis: _Axis, sizes: Sizes) -> str:
    if axis.symbol not in sizes:
        return ""
    size, name = sizes[axis.symbol]
    return f" ({axis.symbol} = {size} from {name})"


def _wanted(dims: str, dtypes: tuple[np.dtype, ...]) -> str:
    return f"{' or '.join(dtype.name for dtype in dtypes)} [{dims.replace(' ', ', ')}]"


def blocked(symbol: str, sizes: Sizes) -> None:
    """Checks that a size is a positive multiple of the quantization block.

    Raises:
        ValueError: It is not.
    """
    size, name = sizes[symbol]
    if size <= 0 or size % QUANT_BLOCK:
        raise ValueError(
            f"{name}: expected {symbol} to be a positive multiple of {QUANT_BLOCK}, got {size}"
        )


def moe_config(value: Any) -> None:
    """Checks that the configuration is one: it checked itself when it was made."""
    if not isinstance(value, MoEConfig):
        raise TypeError(f"config: expected a jax_moe.MoEConfig, got {got(value)}")


def routing(routing_logits: Any, routing_bias: Any, config: Any, sizes: Sizes) -> None:
    """Checks the arguments of the routing stage; sets T and E."""
    moe_config(config)
    argument("routing_logits", routing_logits, sizes)
    if routing_bias is not None:
        argument("routing_bias", routing_bias, sizes)
    num_experts = sizes["E"][0]
    check_experts("config", config, num_experts, " of routing_logits")
    num_tokens = sizes["T"][0]
    pair_count("routing_logits", num_tokens, config.top_k)
    if num_tokens * num_experts > _MAX_LOGITS:  # kernels find a logit by an int32 offset
        raise ValueError(
            f"routing_logits: expected T * E of at most 2^31, got {num_tokens} * {num_experts}"
        )


def pair_count(name: str, num_tokens: int, top_k: int) -> None:
    """Checks that rows can be counted in int32, padding included."""
    if num_tokens * top_k >= _MAX_PAIRS:
        raise ValueError(f"{name}: expected T * top_k below 2^30, got {num_tokens} * {top_k}")


def hidden(hidden_states: Any, hidden_states_scale: Any, sizes: Sizes) -> None:
    """Checks the activations: e4m3 with scales, or bf16/f16/f32 without; sets H."""
    argument("hidden_states", hidden_states, sizes)
    blocked("H", sizes)
    if hidden_states.dtype in E4M3:
        argument("hidden_states_scale", hidden_states_scale, sizes)
    elif hidden_states_scale is not None:
        raise ValueError(
            f"hidden_states_scale: expected None, as hidden_states is {got(hidden_states)}, "
            f"got {got(hidden_states_scale)}"
        )


def layer_inputs(inputs: LayerInputs, config: Any) -> LayerInputs:
    """Checks what `apply` takes; returns it with its scalars as int32 and float32."""
    sizes: Sizes = {}
    routing(inputs.routing_logits, inputs.routing_bias, config, sizes)
    hidden(inputs.hidden_states, inputs.hidden_states_scale, sizes)
    weights(inputs.weights, sizes)
    whole(
        routing_logits=inputs.routing_logits,
        routing_bias=inputs.routing_bias,
        hidden_states=inputs.hidden_states,
        hidden_states_scale=inputs.hidden_states_scale,
        **inputs.weights._asdict(),
    )
    return inputs._replace(
        local_expert_offset=_offset(inputs.local_expert_offset, sizes["E"][0], sizes, "E"),
        routed_scaling_factor=real("routed_scaling_factor", inputs.routed_scaling_factor),
    )


def routed_inputs(inputs: RoutedInputs, num_experts: int) -> RoutedInputs:
    """Checks what `apply_routed` takes; returns it with its scalar as int32."""
    sizes: Sizes = {}
    hidden(inputs.hidden_states, inputs.hidden_states_scale, sizes)
    weights(inputs.weights, sizes)
    topk(inputs.routing.topk_ids, inputs.routing.topk_weights, sizes)
    whole(
        hidden_states=inputs.hidden_states,
        hidden_states_scale=inputs.hidden_states_scale,
        **inputs.weights._asdict(),
        **inputs.routing._asdict(),
    )
    offset = _offset(inputs.local_expert_offset, num_experts, sizes, "num_experts")
    return inputs._replace(local_expert_offset=offset)


def _offset(value: Any, num_experts: int, sizes: Sizes, source: str) -> Array | np.int32:
    num_local_experts, name = sizes["E_local"]
    if not 1 <= num_local_experts <= num_experts:
        raise ValueError(
            f"{name}: expected E_local in 1..{source} = 1..{num_experts}, got {num_local_experts}"
        )
    return integer("local_expert_offset", value, 0, num_experts - num_local_experts)


def topk(topk_ids: Any, topk_weights: Any, sizes: Sizes) -> None:
    """Checks the choices of a router; sets T and k where nothing did."""
    chosen(topk_ids, sizes)
    argument("topk_weights", topk_weights, sizes)


def chosen(topk_ids: Any, sizes: Sizes) -> None:
    """Checks the experts that a router chose; sets T and k where nothing did."""
    argument("topk_ids", topk_ids, sizes)
    if sizes["k"][0] < 1:
        raise ValueError(f"topk_ids: expected k of at least 1, got {got(topk_ids)}")
    pair_count("topk_ids", sizes["T"][0], sizes["k"][0])


def num_experts(value: Any) -> int:
    """Checks the number of all experts, which is static."""
    return static_integer("num_experts", value, 1, _MAX_PAIRS)


def expected_rows(value: Any) -> float | None:
    """Checks how many rows an expert is likely to get, which is static."""
    if value is None:
        return None
    if isinstance(value, jax.Array | np.ndarray):  # it is part of the key of a program
        raise TypeError(
            f"expected_rows: expected a number of Python or NumPy, or None, got {got(value)}"
        )
    rows = float(real("expected_rows", value))
    if rows <= 0:
        raise ValueError(f"expected_rows: expected a positive number of float32, got {value}")
    return rows


def expert_weights(name: str, value: Any) -> None:
    """Checks that weights are of their type, whatever they hold."""
    if not isinstance(value, ExpertWeights):
        raise TypeError(f"{name}: expected a jax_moe.ExpertWeights, got {got(value)}")


def weights(value: Any, sizes: Sizes, name: str = "") -> None:
    """Checks the weights of both matmuls; `name` is that of what holds them, if anything does."""
    expert_weights(name or "weights", value)
    prefix = f"{name}." if name else ""
    gemm1(value.gemm1_weights, value.gemm1_weights_scale, sizes, prefix)
    gemm2(value.gemm2_weights, value.gemm2_weights_scale, sizes, prefix)


def gates(value: Any, sizes: Sizes) -> None:
    """Checks what a `LayerWeights` holds beside experts; sets E and H where nothing did."""
    array("gate_weight", value.gate_weight, "E H", BIAS, sizes)
    if value.e_score_correction_bias is not None:
        array("e_score_correction_bias", value.e_score_correction_bias, "E", F32, sizes)
    if value.shared_gate is not None:
        array("shared_gate", value.shared_gate, "1 H", BIAS, sizes)


def gemm1(weights: Any, scale: Any, sizes: Sizes, prefix: str = "") -> None:
    """Checks the up-projection's weights; sets E_local and I."""
    argument("gemm1_weights", weights, sizes, prefix)
    blocked("I", sizes)
    argument("gemm1_weights_scale", scale, sizes, prefix)


def gemm2(weights: Any, scale: Any, sizes: Sizes, prefix: str = "") -> None:
    """Checks the down-projection's weights; sets H where nothing did."""
    argument("gemm2_weights", weights, sizes, prefix)
    blocked("H", sizes)
    argument("gemm2_weights_scale", scale, sizes, prefix)


def plan(value: Any, sizes: Sizes) -> None:
    """Checks a group plan; sets E_local, M, T and k where nothing did."""
    if not isinstance(value, GroupPlan):
        raise TypeError(f"plan: expected a jax_moe.GroupPlan, got {got(value)}")
    axes = ("E_local", "E_local", "M", "T k", "tiles", "1")
    for field, dims, leaf in zip(value._fields, axes, value, strict=True):
        array(f"plan.{field}", leaf, dims, I32, sizes)
    rows, tiles = sizes["M"][0], sizes["tiles"][0]
    if rows % max(tiles, 1):
        raise ValueError(
            f"plan: expected row_token to hold a whole number of rows for each of {tiles} tiles, "
            f"got {rows} rows"
        )


def quantized(name: str, value: Any, dims: str, sizes: Sizes) -> None:
    """Checks a `Quantized` of the given rows and columns."""
    if not isinstance(value, Quantized):
        raise TypeError(f"{name}: expected a jax_moe.Quantized, got {got(value)}")
    rows, columns = dims.split()
    array(f"{name}.values", value.values, dims, E4M3 + F16, sizes)
    array(f"{name}.scales", value.scales, f"{columns}/{QUANT_BLOCK} {rows}", F32, sizes)
