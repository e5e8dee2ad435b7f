"""The backends and the choice among them.

A backend is a module of this package with the functions of `Backend`; a new one is one new file
and one name in `NAMES`. It is imported when it is first looked at, so a missing dependency of one
is a reason not to choose it, never an error of the others.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from jax import Array

from jax_moe.config import MoEConfig, Precision, ScaleFormat
from jax_moe.device import (
    Device,
    describe_device,
    device_of,
    is_assumed,
    is_committed,
    jax_device_of,
)
from jax_moe.scalars import quoted
from jax_moe.transforms import is_tracing
from jax_moe.types import GroupPlan, Quantized, Routing

NAMES = ("mosaic", "triton", "xla")
"""All backends, the best first: the order in which "auto" tries them."""


class Backend(Protocol):
    """What every backend module offers. The public stages of `jax_moe` document the arrays.

    Rules: no host sync, no shape that depends on routing, deterministic, nothing kept between
    calls, the given weights never copied or re-laid out. `block_m` is the backend's choice.
    """

    NAME: str
    KEEPS_LOWERED: bool
    """Whether a lowered layer is worth keeping for the next process (`lowering_cache`)."""

    layer: Callable[..., Array] | None
    """All stages in one, where a backend does that otherwise than stage by stage.

    Takes `LayerInputs` or `RoutedInputs`, quantized or not, `num_tokens` as `of_live_tokens` does,
    and the keywords of `plan_groups`, `up_project` and `unpermute`; with `LayerInputs` also
    `config`. `num_shared_experts` is that of `entry.Options`, and may be ignored.
    """

    tiling_table: Callable[[int, int, int], object] | None
    """The tilings in use for H, I, E_local: what a kept layer depends on besides its sources."""

    def unsupported_reason(self, platform: str, compute_capability: str | None) -> str | None:
        """Why it does not run there, in a few words; None if it does."""

    def route(
        self,
        routing_logits: Array,
        routing_bias: Array | None,
        routed_scaling_factor: Array,
        *,
        config: MoEConfig,
        batch_invariant: bool = False,
        num_shared_experts: int = 0,
    ) -> Routing:
        """Logits to experts and weights; shared ones that all tokens take come last."""

    def quantize(
        self, x: Array, *, scale_format: ScaleFormat, precision: Precision = "fast"
    ) -> Quantized:
        """Rows to e4m3 with one scale per 128 columns; with "high" to f16."""

    def plan_groups(
        self,
        topk_ids: Array,
        local_expert_offset: Array,
        *,
        num_local_experts: int,
        num_experts: int,
        expected_rows: float,
        precision: Precision = "fast",
        batch_invariant: bool = False,
    ) -> GroupPlan:
        """Local pairs to expert-major rows; ids outside 0..num_experts-1 are skipped.

        `expected_rows`, those an expert is likely to get, and `precision` choose `block_m`. With
        `batch_invariant`, here and in the matmuls, no bit of a row depends on that choice.
        """

    def up_project(
        self,
        hidden_states: Array,
        hidden_states_scale: Array,
        gemm1_weights: Array,
        gemm1_weights_scale: Array,
        plan: GroupPlan,
        *,
        swiglu_limit: float | None,
        scale_format: ScaleFormat,
        precision: Precision = "fast",
        batch_invariant: bool = False,
    ) -> Quantized:
        """Gather, GEMM1, SwiGLU, requantization; with "high" also of 16-bit rows, and to f16."""

    def down_project(
        self,
        activations: Quantized,
        gemm2_weights: Array,
        gemm2_weights_scale: Array,
        plan: GroupPlan,
        *,
        batch_invariant: bool = False,
    ) -> Array:
        """GEMM2; of f16 activations the result is f32, not bf16."""

    def unpermute(
        self,
        expert_outputs: Array,
        topk_weights: Array,
        plan: GroupPlan,
        *,
        batch_invariant: bool = False,
        output_dtype: str = "bfloat16",
    ) -> Array:
        """Weighted sum per token; exact zeros where nothing is local.

        The result is bf16, or f32 for sums over several ranks.
        """

    def workspace_bytes(
        self,
        num_tokens: int,
        top_k: int,
        num_local_experts: int,
        hidden_size: int,
        intermediate_size: int,
        precision: Precision = "fast",
    ) -> int:
        """Worst case of the temporary memory."""


@functools.cache
def load(name: str) -> Backend:
    """Imports a backend.

    Raises:
        ImportError: A dependency of it is missing.
    """
    module: ModuleType = importlib.import_module(f"{__name__}.{name}")
    return cast(Backend, module)


def unsupported_reason(name: str, device: Device | None = None) -> str | None:
    """Why a backend cannot run on a device.

    Args:
        name: One of `NAMES`.
        device: Where to; None is the default device.

    Returns:
        One line, or None if it can.
    """
    device = device_of() if device is None else device
    try:
        backend = load(name)
    except (ImportError, AttributeError) as error:  # the latter: Pallas of another JAX
        return f"cannot be imported: {error}"
    return backend.unsupported_reason(device.platform, device.compute_capability)


def checked(name: str) -> str:
    """Checks that a backend is one, or "auto"; not that it can run.

    Raises:
        ValueError: There is no such backend.
    """
    choices = ("auto", *NAMES)
    if not isinstance(name, str) or name not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"backend: expected one of {known}, got {quoted(name)}")
    return name


def select(name: str, device: Device) -> str:
    """The backend that `backend=name` means on a device.

    Args:
        name: One of `NAMES`, or "auto" for the best that the device supports.
        device: Where the call runs.

    Returns:
        One of `NAMES`.

    Raises:
        ValueError: There is no such backend.
        NotImplementedError: It cannot run there; says what it got.
    """
    if checked(name) == "auto":
        return next(choice for choice in NAMES if unsupported_reason(choice, device) is None)
    if reason := unsupported_reason(name, device):
        raise NotImplementedError(f"backend={name!r}: {reason} (got: {device})")
    return name


def select_for_call(name: str, arrays: Any, device: jax.Device | None = None) -> str:
    """`select` for a call with these arrays, which an eager one must be able to run as well.

    Args:
        name: As for `select`.
        arrays: The arguments.
        device: Where the call runs; None is where the arrays are.

    Returns:
        One of `NAMES`.

    Raises:
        ValueError: There is no such backend.
        NotImplementedError: It cannot run there, or not eagerly under `jax_moe.assume_device`.
    """
    there = jax_device_of(arrays) if device is None else device
    try:
        chosen = select(name, describe_device(there))
    except NotImplementedError as error:
        if device is None and there != jax_device_of():
            text = f"{error}; that is where {_placed(arrays)} was put, and JAX runs the call there"
            raise NotImplementedError(text) from None
        raise
    if is_assumed() and not is_tracing():
        found = Device.of(there)
        if reason := unsupported_reason(chosen, found):
            raise NotImplementedError(
                f"backend={chosen!r}: {reason} (got: {found}; under jax_moe.assume_device a call "
                "can be traced, lowered and exported, not run)"
            )
    return chosen


def _placed(arrays: Any) -> str:
    """The name of the first array that somebody put on a device."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    path = next(path for path, leaf in leaves if isinstance(leaf, jax.Array) and is_committed(leaf))
    is_named = isinstance(path[-1], jax.tree_util.GetAttrKey)
    return jax.tree_util.keystr(path[-1:], simple=True) if is_named else "one of its arrays"


def precision_of(rows: Array) -> Precision:
    """The precision that scaled activations, e4m3 or f16, have."""
    return "high" if rows.dtype == jnp.float16 else "fast"


def in_precision(rows: Quantized, precision: Precision) -> Quantized:
    """The rows that an up-projection of that precision multiplies: e4m3 is exact in f16."""
    if precision == "high":
        return rows._replace(values=rows.values.astype(jnp.float16))
    return rows


def of_live_tokens(topk_ids: Array, num_tokens: Array | None) -> Array:
    """The expert ids, with -1, no expert, from token `num_tokens` on."""
    if num_tokens is None:
        return topk_ids
    tokens = jnp.arange(topk_ids.shape[0], dtype=jnp.int32)
    return jnp.where(tokens[:, None] < num_tokens, topk_ids, -1)


def describe() -> str:
    """Says which backend "auto" means here and why the others are not available.

    Returns:
        A few lines to print: the default device, then a line per backend, the best first.

    Raises:
        RuntimeError: There is no device of those that `JAX_PLATFORMS` allows.
    """
    device = device_of()
    chosen = select("auto", device)
    lines = [f"device: {device}"]
    for name in NAMES:
        reason = unsupported_reason(name, device)
        state = "chosen by auto" if name == chosen else reason or "available"
        lines.append(f"{name:8}{state}")
    return "\n".join(lines)
