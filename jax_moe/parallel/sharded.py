"""The layer as a function of global arrays, and what can be asked about a mesh beforehand."""

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_moe import backends, transfers, validate
from jax_moe.config import (
    DEEPSEEK_V3,
    MoEConfig,
    Precision,
    ScaleFormat,
    checked_batch_invariant,
    checked_precision,
)
from jax_moe.device import describe_device
from jax_moe.parallel import exchange as exchanges
from jax_moe.parallel import ranks, workspace
from jax_moe.parallel.api import apply_expert_parallel, apply_routed_expert_parallel, check_experts
from jax_moe.parallel.ranks import AxisName
from jax_moe.parallel.tokens import live_of_each_rank
from jax_moe.transforms import is_tracing

_PER_TOKEN = {"hidden_states_scale": 1}
"""Axis of the tokens; of the other arrays of tokens it is the first."""


def partition_specs(
    axis_name: AxisName, *, routed: bool = False
) -> tuple[tuple[PartitionSpec, ...], PartitionSpec]:
    """How the arguments of `apply_expert_parallel` lie on a mesh.

    Tokens and experts are split over the ranks, the bias and the scaling factor are everywhere.

    Examples:
        >>> in_specs, out_specs = jax_moe.partition_specs("expert")
        >>> weights = jax.device_put(weights, jax.NamedSharding(mesh, in_specs[4]))

    Args:
        axis_name: The axis or axes of the ranks.
        routed: Those of `apply_routed_expert_parallel` instead.

    Returns:
        `in_specs`, one per positional argument in their order (also for a `hidden_states_scale` of
        None), and `out_specs` of the output.

    Raises:
        TypeError: `axis_name` is no name, `routed` no bool.
        ValueError: It names more than two axes, or one twice.
    """
    names = ranks.axis_names(axis_name)
    routed = validate.boolean("routed", routed)
    split, everywhere = PartitionSpec(names), PartitionSpec()
    rows = (split, PartitionSpec(None, names))
    weights = (split,) * 4
    if routed:
        return (*rows, *weights, split, split), split
    return (split, everywhere, *rows, *weights, everywhere), split


class _Static(NamedTuple):
    """What a function of global arrays is made from; equal ones share their compiled programs."""

    mesh: jax.sharding.Mesh
    axes: tuple[str, ...]
    num_experts: int | None
    options: tuple[tuple[str, Any], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arguments, in order."""
        weights = (
            "gemm1_weights",
            "gemm1_weights_scale",
            "gemm2_weights",
            "gemm2_weights_scale",
        )
        rows = ("hidden_states", "hidden_states_scale")
        if self.num_experts is not None:
            return (*rows, *weights, "topk_ids", "topk_weights")
        logits = ("routing_logits", "routing_bias")
        return (*logits, *rows, *weights, "routed_scaling_factor")

    @property
    def specs(self) -> tuple[Any, PartitionSpec]:
        """Of the arguments, `num_tokens` and `placement`; and of the output."""
        in_specs, out_specs = partition_specs(self.axes, routed=self.num_experts is not None)
        return (in_specs, PartitionSpec(self.axes), PartitionSpec()), out_specs


def expert_parallel(
    mesh: jax.sharding.Mesh,
    axis_name: AxisName,
    *,
    config: MoEConfig = DEEPSEEK_V3,
    num_experts: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
    max_rows_at_once: int | None = None,
    with_load: bool = False,
    check_vma: bool = True,
    expected_rows: float | None = None,
    scale_format: ScaleFormat | None = None,
    swiglu_limit: float | None = None,
    precision: Precision = "fast",
    batch_invariant: bool = False,
) -> Callable[..., Any]:
    """`apply_expert_parallel` as a function of global arrays.

    It makes the `jax.shard_map` and jits it. Arrays that already lie as `partition_specs` says are
    used where they are; others are moved there at every call, which weights should be spared. Where
    `jax.set_mesh` has set another mesh, eager calls leave that; inside of `jax.jit` one cannot.

    Examples:
        >>> mesh = jax.make_mesh((8,), ("expert",))
        >>> layer = jax_moe.expert_parallel(mesh, "expert")
        >>> out = layer(logits, bias, x, x_scale, w13, w13_scale, w2, w2_scale, 2.5)

    Args:
        mesh: Devices of one kind; its axes may be Auto or Explicit. Over axes other than
            `axis_name`, the same is computed by every device.
        axis_name: The axis or axes of the ranks.
        config: How experts are picked; with `num_experts` its `scale_format` and `swiglu_limit`
            alone count.
        num_experts: E, for a router of one's own: the function then takes the arguments of
            `apply_routed_expert_parallel`. None: those of `apply_expert_parallel`.
        backend: As in `apply_expert_parallel`, as all that follow.
        exchange: Between the ranks.
        max_rows_at_once: Slots per piece.
        with_load: Whether to return the load as well.
        check_vma: As in `jax.shard_map`.
        expected_rows: As in `apply_expert_parallel`.
        scale_format: As in `apply_expert_parallel`.
        swiglu_limit: As in `apply_expert_parallel`.
        precision: As in `apply_expert_parallel`.
        batch_invariant: As in `apply_expert_parallel`.

    Returns:
        A function of global arrays, in order or by name: [N*T,E] logits, [N*T,H] rows,
        [E_physical,...] weights and so on, and by keyword `num_tokens`, an integer scalar for all
        ranks or i32[N], one per rank, and `placement`. It returns bf16[N*T,H], with `with_load`
        also i32[E], and raises what `apply_expert_parallel` raises; also `ValueError` where the
        ranks cannot share the tokens equally.

    Raises:
        TypeError: `mesh` is no mesh, an option of the wrong type.
        ValueError: The mesh has no such axis or devices of several kinds; an unknown option.
        NotImplementedError: The backend or the exchange does not run on the mesh.
    """
    group = ranks.of_mesh(mesh, axis_name)
    if num_experts is not None:
        num_experts = validate.num_experts(num_experts)
    validate.moe_config(config)
    form, limit = config.merged(scale_format, swiglu_limit)
    chosen = backends.select(backend, describe_device(mesh.devices.flat[0]))
    place = exchanges.Place(group, chosen, checked_precision(precision), mesh)
    exchanges.select(exchange, place, 0)  # refused before there are arguments
    options: dict[str, Any] = {
        "axis_name": group.axes,
        "backend": chosen,
        "max_rows_at_once": workspace.rows_at_once(max_rows_at_once, group.count),
        "with_load": validate.boolean("with_load", with_load),
        "expected_rows": validate.expected_rows(expected_rows),
        "precision": place.precision,
        "batch_invariant": checked_batch_invariant(batch_invariant),
    }
    if num_experts is None:
        options |= {"config": config, "swiglu_limit": swiglu_limit, "scale_format": scale_format}
    else:  # the layer has no configuration then, but its arithmetic is that of `config`
        options |= {"num_experts": num_experts, "swiglu_limit": limit, "scale_format": form}
    static = _Static(mesh, group.axes, num_experts, tuple(options.items()))
    specs, _ = static.specs
    check_vma = validate.boolean("check_vma", check_vma)

    @functools.cache
    def program(num_tokens: int) -> Callable[..., Any]:
        return _program(static, exchanges.select(exchange, place, num_tokens), check_vma)

    def layer(*given: Any, num_tokens: Any = None, placement: Any = None, **named: Any) -> Any:
        arrays = _by_name(static.names, given, named)
        arguments = tuple(arrays.values())
        tokens = _check(arrays, group, static, config, placement)
        backends.select_for_call(chosen, (), mesh.devices.flat[0])
        with _without_another_mesh(mesh):
            live = live_of_each_rank(num_tokens, group.count, tokens)
            if live is not num_tokens and transfers.is_guarded((arguments, live)):
                live = jax.device_put(live, NamedSharding(mesh, PartitionSpec(group.axes)))
            moved = _on_mesh((tuple(arrays.values()), live, placement), specs, mesh)
            return program(tokens)(*moved)

    return layer


def _by_name(names: tuple[str, ...], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Arguments that may be passed in order or by name.

    Raises:
        TypeError: One is missing, there twice or unknown.
    """
    arrays = dict(zip(names, given, strict=False)) | named
    missing = [name for name in names if name not in arrays]
    unknown = [name for name in named if name not in names]
    twice = [name for name in names[: len(given)] if name in named]
    found = {"missing": missing, "unknown": unknown, "twice": twice}
    if len(given) > len(names) or any(found.values()):
        wrong = (f"{kind} {', '.join(found[kind])}" for kind in found if found[kind])
        raise TypeError(
            f"expert_parallel: expected {len(names)} arguments ({', '.join(names)}; num_tokens and "
            f"placement by name), got {len(given) + len(named)}"
            + "".join(f"; {one}" for one in wrong)
        )
    return {name: arrays[name] for name in names}


def _without_another_mesh(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager[object]:
    """Leaves the mesh of a `jax.set_mesh` around the call, which `jax.shard_map` would refuse.

    Raises:
        ValueError: That mesh is another one, and JAX traces, so that it cannot be left.
    """
    surrounding = jax.sharding.get_abstract_mesh()
    if surrounding.empty:
        return contextlib.nullcontext()
    if not is_tracing():
        is_ours = jax.sharding.get_mesh() == mesh
        return contextlib.nullcontext() if is_ours else jax.set_mesh(None)
    if surrounding.manual_axes:
        raise ValueError(
            f"mesh: expected a call outside of jax.shard_map, got {mesh} inside of one over "
            f"{surrounding}; jax_moe.apply_expert_parallel is for inside"
        )
    if surrounding != mesh.abstract_mesh:
        raise ValueError(
            f"mesh: expected the one that jax.set_mesh has set around jax.jit, {surrounding}, got "
            f"{mesh}"
        )
    return contextlib.nullcontext()


def _on_mesh(given: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """Arguments that were put on other devices, or on these in another order, moved here.

    `jax.jit` refuses those. It moves all others itself, unless `jax.transfer_guard` forbids that:
    then they and the numbers are moved here as well.
    """
    is_guarded = transfers.is_guarded(given)

    def move(value: Any, spec: Any) -> Any:
        is_put = isinstance(value, Array) and not isinstance(value, jax.core.Tracer)
        if is_guarded and (is_put or isinstance(value, np.generic)):
            return jax.device_put(value, NamedSharding(mesh, spec))
        if not is_put or not value.committed or _is_on(value, mesh):
            return value
        return jax.device_put(value, NamedSharding(mesh, spec))

    return _mapped(move, given, specs)


def _is_on(array: Array, mesh: jax.sharding.Mesh) -> bool:
    """Whether an array lies on the mesh's devices, in their order where that can be told."""
    sharding, devices = array.sharding, mesh.devices.flat
    if isinstance(sharding, NamedSharding):
        return sharding.mesh is mesh or list(sharding.mesh.devices.flat) == list(devices)
    return len(sharding.device_set) > 1 or sharding.device_set == set(devices)


@functools.lru_cache(maxsize=64)
def _program(static: _Static, exchange: str, check_vma: bool) -> Callable[..., Any]:
    """The jitted `shard_map`; `with_load` decides what it returns."""
    options = dict(static.options) | {"exchange": exchange}
    routed = static.num_experts is not None
    function = apply_routed_expert_parallel if routed else apply_expert_parallel
    specs, out_specs = static.specs
    everywhere = PartitionSpec()

    def rank(arguments: Any, num_tokens: Any, placement: Any) -> Any:
        live = None if num_tokens is None else num_tokens[0]
        return function(*arguments, num_tokens=live, placement=placement, **options)

    sharded = jax.shard_map(
        rank,
        mesh=static.mesh,
        in_specs=specs,
        out_specs=(out_specs, everywhere) if options["with_load"] else out_specs,
        check_vma=check_vma,
    )

    def program(arguments: Any, num_tokens: Any, placement: Any) -> Any:
        given = (arguments, num_tokens, placement)
        if AxisType.Explicit in static.mesh.axis_types:  # there `shard_map` moves nothing
            given = _resharded(given, specs, static.mesh)
        return sharded(*given)

    return jax.jit(program)


def _resharded(given: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """Arguments as their specs say, over the Explicit axes; over the others `shard_map` moves."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def kept(axes: Any) -> Any:
        names = axes if isinstance(axes, tuple) else (axes,)
        return tuple(name for name in names if kinds.get(name) is AxisType.Explicit) or None

    def reshard(value: Any, spec: Any) -> Any:
        if value is None:
            return None
        explicit = PartitionSpec(*map(kept, spec))
        return jax.sharding.reshard(value, NamedSharding(mesh, explicit))

    return _mapped(reshard, given, specs)


def _mapped(function: Callable[[Any, Any], Any], given: Any, specs: Any) -> Any:
    """Arguments, `num_tokens` and `placement`, each with its spec."""
    (arguments, *others), (of_arguments, *of_others) = given, specs
    return (
        tuple(itertools.starmap(function, zip(arguments, of_arguments, strict=True))),
        *itertools.starmap(function, zip(others, of_others, strict=True)),
    )


def _check(
    arrays: dict[str, Any], group: ranks.Ranks, static: _Static, config: Any, placed: Any
) -> int:
    """Checks of the global arrays that their parts cannot show, before anything is traced.

    Returns:
        T of each rank. A factor that is known is float32 afterwards.
    """
    sizes: validate.Sizes = {}
    if static.num_experts is None:
        validate.routing(arrays["routing_logits"], arrays["routing_bias"], config, sizes)
    else:
        validate.topk(arrays["topk_ids"], arrays["topk_weights"], sizes)
        sizes["E"] = (static.num_experts, "num_experts")
    validate.hidden(arrays["hidden_states"], arrays["hidden_states_scale"], sizes)
    validate.gemm1(arrays["gemm1_weights"], arrays["gemm1_weights_scale"], sizes)
    validate.gemm2(arrays["gemm2_weights"], arrays["gemm2_weights_scale"], sizes)
    num_tokens, num_slots = sizes["T"][0], sizes["E_local"][0]
    if num_tokens % group.count:
        raise ValueError(
            f"hidden_states: expected rows that {group.count} ranks share equally (pad them and "
            f"pass num_tokens), got {num_tokens}"
        )
    if num_slots % group.count:
        raise ValueError(
            f"gemm1_weights: expected experts that {group.count} ranks share equally, got "
            f"{num_slots}"
        )
    factor = arrays.get("routed_scaling_factor", 1.0)
    if not isinstance(factor, Array):  # one on a device would have to be read back
        factor = validate.real("routed_scaling_factor", factor)
    if static.num_experts is None:
        arrays["routed_scaling_factor"] = factor
    check_experts(num_slots // group.count, sizes["E"][0], group.count, placed)
    return num_tokens // group.count


def describe_exchange(mesh: jax.sharding.Mesh, axis_name: AxisName, backend: str = "auto") -> str:
    """Says which exchange "auto" means on a mesh, and why the others do not run or are not chosen.

    That is for `precision="fast"`; with "high", "auto" never means "nvlink", which refuses it.

    Args:
        mesh: Devices of one kind.
        axis_name: The axis or axes of the ranks.
        backend: As in `apply_expert_parallel`.

    Returns:
        A few lines to print: the ranks, then a line per exchange.

    Raises:
        TypeError: `mesh` is no mesh, `axis_name` no name.
        ValueError: The mesh has no such axis or devices of several kinds.
        NotImplementedError: The backend does not run on the mesh.
    """
    group = ranks.of_mesh(mesh, axis_name)
    first = mesh.devices.flat[0]
    chosen = backends.select(backend, describe_device(first))
    processes = len({device.process_index for device in mesh.devices.flat})
    over = ", ".join(f"{name}={size}" for name, size in zip(group.axes, group.sizes, strict=True))
    lines = [
        f"ranks: {group.count} ({over}), backend {chosen}",
        f"mesh: {mesh.devices.size} x {first.device_kind}, {processes} process"
        + ("es" if processes > 1 else ""),
    ]
    place = exchanges.Place(group, chosen, mesh=mesh)
    lines += [f"{name:13}{exchanges.state(name, place)}" for name in exchanges.NAMES[1:]]
    return "\n".join(lines)
