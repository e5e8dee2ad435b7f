"""Process settings that must precede JAX and torch, and what to know about the machine."""

import ctypes
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from interop.checkout import git_commit as git_commit
from interop.checkout import output_of as output_of
from pallas_kernels import interruption
from pallas_kernels.files import cache_folder

if TYPE_CHECKING:
    from bench import workloads

_PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "jax-triton",
    "torch",
    "triton",
    "sglang-kernel",
    "sgl-deep-gemm",
    "flashinfer-python",
    "numpy",
)
_NEEDED = {
    "jax": "jax",
    "absl": "absl-py",
    "jaxtyping": "jaxtyping",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
}
"""Modules, and their packages: what the extra `bench` brings, and the library's own."""
_GPU_STATE = (
    "name",
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "clocks_event_reasons.active",
)
_COMMAND_BUFFERS = "--xla_enable_command_buffers_during_profiling=true"


def prepare_process(environ: Any = os.environ) -> None:
    """Sets what the GPU clock and the shared GPU need. Call it before jax or torch is imported.

    XLA would leave CUDA graphs out while a profiler is active, and JAX must leave memory to torch.
    Without a GPU driver JAX's CUDA plugin would print a stack trace, so it is left alone. A user's
    own setting wins.

    Args:
        environ: The environment to change.
    """
    if "command_buffers_during_profiling" not in environ.get("XLA_FLAGS", ""):
        environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {_COMMAND_BUFFERS}".strip()
    for name, value in (
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9"),  # the most, not what is taken; 0.75 otherwise
        ("KINETO_LOG_LEVEL", "5"),  # one line per profiling session otherwise
        ("OMP_WAIT_POLICY", "PASSIVE"),  # torch's spinning threads would stall JAX's on a CPU
    ):
        environ.setdefault(name, value)
    if not has_gpu_driver():
        environ.setdefault("JAX_PLATFORMS", "cpu")
        if environ is os.environ and (jax := sys.modules.get("jax")):  # has read it, used it not
            jax.config.update("jax_platforms", environ["JAX_PLATFORMS"])
        environ.setdefault("NPROC", "16")  # threads for the interpreter's simulated warpgroups


def lacking_packages(needed: Mapping[str, str] = _NEEDED) -> list[str]:
    """Packages that are needed and not there.

    Args:
        needed: Modules, and their packages; by default what `pip install '.[bench]'` would add.
    """
    return [name for module, name in needed.items() if importlib.util.find_spec(module) is None]


def has_gpu_driver() -> bool:
    """Whether NVIDIA's driver is there; asks neither JAX nor the driver itself."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def default_backend() -> str:
    """JAX's, which may start here; Ctrl-C waits meanwhile, as JAX's plugins would swallow it.

    Raises:
        ValueError: There is no device of those that `JAX_PLATFORMS` allows, or JAX has settings
            that cannot be measured with.
    """
    import jax

    from jax_moe.device import no_device

    _check_settings(jax.config)
    with interruption.deferred():
        try:
            return jax.default_backend()
        except (AssertionError, RuntimeError) as error:
            raise ValueError(no_device(error)) from None


def _check_settings(config: Any) -> None:
    """Refuses variables of JAX, left over from debugging, that change what is measured."""
    if config.jax_disable_jit:  # times 1000 times as long
        raise ValueError("JAX_DISABLE_JIT: expected it to be unset, as what is timed is jitted")
    if config.jax_random_seed_offset or not config.jax_threefry_partitionable:
        name = "RANDOM_SEED_OFFSET" if config.jax_random_seed_offset else "THREEFRY_PARTITIONABLE"
        raise ValueError(
            f"JAX_{name}: expected it to be unset, as a seed is to draw the same inputs everywhere"
        )
    for ways in ("", "_host_to_device", "_device_to_device", "_device_to_host"):
        guard = getattr(config, f"jax_transfer_guard{ways}")
        if "disallow" in str(guard):
            raise ValueError(
                f"JAX_TRANSFER_GUARD{ways.upper()}: expected it to be unset, as inputs are moved "
                f"here and there, got {guard}"
            )


def enable_compilation_cache() -> None:
    """Keeps GPU programs in the user's cache folder, unless JAX already has a cache folder.

    A run that is repeated or resumed then reads what it compiled before. Not on a CPU: programs
    from the cache hang in the interpreter of the GPU kernels.
    """
    import jax

    if default_backend() == "gpu" and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))


def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that matter here."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpu_state() -> dict[str, str] | None:
    """Clocks, temperature, power and throttling of the GPU in use, or None without nvidia-smi."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = output_of(
        "nvidia-smi",
        f"--id={index}",
        f"--query-gpu={','.join(_GPU_STATE)}",
        "--format=csv,noheader",
    )
    if query is None:
        return None
    return dict(zip(_GPU_STATE, (field.strip() for field in query.split(",")), strict=False))


def device(sizes: "workloads.Sizes | None" = None) -> Mapping[str, Any]:
    """The default JAX device: platform, kind, for a GPU its capability and memory in bytes.

    `tuned` names the kernels whose tilings this user measured; the others use the shipped ones.

    Args:
        sizes: Of the rank that tilings are for; None means DeepSeek-V3's.
    """
    import jax

    found = jax.devices()[0]
    memory = found.memory_stats() if found.platform == "gpu" else None
    capability = str(getattr(found, "compute_capability", "")) or None
    return {
        "platform": found.platform,
        "kind": found.device_kind,
        "compute_capability": capability,
        "tuned": _tuned(capability, sizes) if capability else [],
        "memory_bytes": (memory or {}).get("bytes_limit"),
        "host_cpus": os.cpu_count(),
    }


def about(sizes: "workloads.Sizes", *, are_checked: bool = True) -> dict[str, Any]:
    """What each file of results says of where its figures come from, taken when a run starts.

    Without a GPU `reduced` is true, and a `note` says what that means.

    Args:
        sizes: Of the rank that is measured.
        are_checked: Whether the command checks results, which the note says.
    """
    on = dict(device(sizes))
    is_reduced = on["platform"] != "gpu"
    checked = "results are checked, " if are_checked else ""
    note = {"note": f"{reduced(sizes)}; {checked}times mean nothing"}
    return {
        "started": now(),
        "command": " ".join(map(shell_word, ["python", *sys.orig_argv[1:]])),
        "sizes": sizes._asdict(),
        "reduced": is_reduced,
        **(note if is_reduced else {}),
        "device": on,
        "versions": versions(),
        "gpu_state": gpu_state(),
        "git_commit": git_commit(),
    }


def shell_word(text: str) -> str:
    """`shlex.quote`, in printable text also where the word is none, in which bash reads it back."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = (
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(text)
    )
    return f"$'{''.join(escaped)}'"


def now() -> str:
    """The time in UTC to the second, as files of results have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def reduced(sizes: "workloads.Sizes") -> str:
    """What a reader of figures without a GPU must know first; no full stop."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    return f"No GPU found: sizes are REDUCED to H={hidden}, I={inner}, E={sizes.num_experts}"


def date(started: str) -> str:
    """The minute of a time in a file of results, for people."""
    return f"{started[:10]} {started[11:16]} UTC" if started else "not recorded"


def sizes_text(sizes: Mapping[str, Any], *, is_reduced: bool) -> str:
    """The `sizes` of a file of results in one line, for the title of a plot."""
    return ("REDUCED sizes " if is_reduced else "") + (
        f"H={sizes['hidden_size']} I={sizes['intermediate_size']} E={sizes['num_experts']} "
        f"E_local={sizes['num_local_experts']}"
    )


def _tuned(capability: str, sizes: "workloads.Sizes | None") -> list[str]:
    from pallas_kernels.mosaic import tilings as mosaic
    from pallas_kernels.tuning.table_format import DEEPSEEK_V3, Sizes

    key = DEEPSEEK_V3
    if sizes is not None:
        key = Sizes(sizes.hidden_size, sizes.intermediate_size, sizes.num_local_experts)
    shipped = {"mosaic": mosaic.chosen(key).is_shipped}
    if importlib.util.find_spec("triton") is not None:
        from pallas_kernels.triton import tilings as triton

        shipped["triton"] = triton.chosen(triton.number_of(capability), key).is_shipped
    return [name for name, is_shipped in shipped.items() if not is_shipped]
