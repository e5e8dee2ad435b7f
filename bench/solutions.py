"""What can be benchmarked: our backends, `ragged_dot`, and the solutions of `interop`."""

import dataclasses
import functools
from collections.abc import Mapping

import jax_moe
from bench import interpreter, ragged_dot
from bench.results import REFERENCE
from bench.settings import Settings
from interop.solutions.base import Solution
from jax_moe import LayerInputs, MoEConfig, backends, models
from jax_moe.config import Precision
from jax_moe.device import device_of
from jax_moe.models import Model

_FUSED = {
    "Rows computed": "local pairs only",
    "SwiGLU": "in the epilogue of GEMM1",
    "Intermediate quantization": "in the epilogue of GEMM1",
    "GEMM workspace": "none",
}
_UNFUSED = _FUSED | {
    "SwiGLU": "float32, after GEMM1",
    "Intermediate quantization": "jnp, after SwiGLU",
}


_IN_16_BITS = {"Intermediate quantization": "none: f16 under powers of two"}
_HIGH = "_high"


def known_to(settings: Settings) -> Mapping[str, Solution]:
    """The solutions as a run means them."""
    return registry(
        settings.backend,
        settings.measured,
        precision=settings.precision,
        batch_invariant=settings.batch_invariant,
    )


def registry(
    backend: str = "auto",
    model: Model = models.DEEPSEEK_V3,
    *,
    precision: Precision = "fast",
    batch_invariant: bool = False,
) -> Mapping[str, Solution]:
    """All solutions by name, the reference first, available here or not.

    Args:
        backend: What `jax_moe` runs; the solutions named after a backend run that one.
        model: Whose rank is computed. Solutions that know only DeepSeek-V3's definition are not
            available for others; DeepGEMM's glue takes other sizes and most routers.
        precision: At which `jax_moe` runs; the others say theirs by name.
        batch_invariant: As in `jax_moe.apply`, of `jax_moe` alone.

    Returns:
        Name to solution.
    """
    from interop.solutions import SOLUTIONS, deepgemm

    meant = backends.select("auto", device_of()) if backend == "auto" else backend
    config = model.config
    how = ", activations in 16 bits" * (precision == "high")
    how += ", the same bits in any batch" * batch_invariant
    ours = [
        _jax_moe(
            "jax_moe",
            meant,
            config,
            f"jax_moe.apply, what --backend={backend} means: {meant}{how}",
            precision,
            batch_invariant,
        )
    ]
    ours += [
        _jax_moe(f"jax_moe_{name}", name, config, f"jax_moe.apply, {what}")
        for name, what in (
            ("mosaic", "Pallas Mosaic GPU kernels (Hopper)"),
            ("triton", "Triton kernels through jax-triton (Ada and newer)"),
            ("xla", "plain jnp, any device"),
        )
    ]
    ours += [
        _jax_moe(
            f"jax_moe_{name}{_HIGH}",
            name,
            config,
            f"jax_moe.apply on {name}, activations in 16 bits",
            precision="high",
        )
        for name in backends.NAMES
    ]
    peers = dict(SOLUTIONS)
    if model != models.DEEPSEEK_V3:
        peers = {name: _unavailable_for(model, one) for name, one in peers.items()}
        peers |= {one.name: one for one in deepgemm.solutions(config)}
    first = {REFERENCE: peers.pop(REFERENCE)}
    ours += [interpreter.SOLUTION, ragged_dot.solution(config)]
    return first | {one.name: one for one in ours} | peers


def default_names(on_gpu: bool) -> tuple[str, ...]:
    """What a run without `--solutions` measures: everything on a GPU, the basics on a CPU.

    `jax_moe` is left out, since it would repeat the backend that it means, and those of
    `precision="high"` are there by name only.
    """
    interpreted = interpreter.SOLUTION.name
    if on_gpu:
        left_out = ("jax_moe", interpreted)
        names = (name for name in registry() if name not in left_out)
        return tuple(name for name in names if not name.endswith(_HIGH))
    return (REFERENCE, "jax_moe_xla", interpreted)


def choose(names: tuple[str, ...], known: Mapping[str, Solution]) -> dict[str, Solution]:
    """Picks solutions by name, in the registry's order; `all` means all.

    Raises:
        ValueError: A name is unknown; the message lists what there is.
    """
    for name in names:
        if name != "all" and name not in known:
            raise ValueError(
                f"--solutions: unknown solution {name!r}; expected 'all' or some of "
                f"{', '.join(known)}"
            )
    return {name: one for name, one in known.items() if "all" in names or name in names}


def _unavailable_for(model: Model, solution: Solution) -> Solution:
    reason = f"not for this model: computes DeepSeek-V3's definition only, got {model.name}"
    return dataclasses.replace(solution, unavailable_reason=lambda: reason)


def _jax_moe(
    name: str,
    backend: str,
    config: MoEConfig,
    description: str,
    precision: Precision = "fast",
    batch_invariant: bool = False,
) -> Solution:
    design = _UNFUSED if backend == "xla" else _FUSED
    if precision == "high":
        design = design | _IN_16_BITS
    return Solution(
        name=name,
        framework="jax",
        description=description,
        run=functools.partial(
            jax_moe.apply,
            backend=backend,
            config=config,
            precision=precision,
            batch_invariant=batch_invariant,
        ),
        unavailable_reason=functools.partial(backends.unsupported_reason, backend),
        workspace_bound=functools.partial(_workspace_bound, backend, config, precision),
        compile_ahead=backend != "xla",  # XLA times its matmuls to choose them
        design=design,
    )


def _workspace_bound(
    backend: str, config: MoEConfig, precision: Precision, inputs: LayerInputs
) -> int:
    return jax_moe.workspace_bytes(
        inputs.tokens,
        num_local_experts=inputs.weights.num_local_experts,
        hidden_size=inputs.weights.hidden_size,
        intermediate_size=inputs.weights.intermediate_size,
        backend=backend,
        config=config,
        precision=precision,
    )
