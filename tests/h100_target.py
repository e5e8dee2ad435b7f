"""Compile for an H100 on a machine that has none, and report what the compilers made of it.

`compile_for_h100` drives the whole chain ahead of time: Pallas Mosaic GPU -> MLIR -> PTX for the
kernels, XLA for the program around them, then `ptxas` and `nvdisasm` on every kernel's PTX. Triton
kernels (through jax-triton) are reported too. Nothing is executed.

    python -m tests.h100_target tests.test_aot_harness:example
    python -m tests.h100_target package.module:function --cuda-bin /usr/local/cuda/bin

`module:function` names a callable without arguments that returns `(fn, specs)` or yields
`(label, fn, specs)`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

from pallas_kernels import interruption
from tests.cuda_tools import KernelReport, assemble, find, ptxas_version, wheel_bin

TARGET_CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  driver_version: "13.0.0" runtime_version: "13.0.0"
  cuda_compute_capability { major: 9 }
}
runtime_version { major: 13 } dnn_version_info { major: 9 minor: 12 }
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
"""

OLDEST_JAX = (0, 11, 2)
NEEDS_THIS_JAX = f"the ahead-of-time harness reads what JAX {'.'.join(map(str, OLDEST_JAX))} dumps"

# Thunks that contain others or only order them; every other thunk is one launch.
_CONTROL_THUNKS = {"kCommandBuffer", "kSequential", "kConditional", "kWhile", "kWaitForStreams"}


def prepare_environment(cuda_bin: str | os.PathLike[str] | None = None) -> None:
    """Lets JAX load its CUDA plugin without a GPU, and puts one folder of compilers first on PATH.

    Must run before JAX is imported. XLA takes the first `ptxas` on PATH and writes PTX for its
    version, so without this a toolkit that happens to be there would decide what is tested.

    Args:
      cuda_bin: The folder of `ptxas`; default: the compiler wheels'.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    folder = str(cuda_bin or wheel_bin("ptxas"))
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One jitted program and its kernels."""

    kernels: tuple[KernelReport, ...]
    launches: dict[str, int]  # XLA thunk kind -> occurrences
    command_buffers: int
    launches_outside_command_buffers: int
    temp_bytes: int
    ptxas_version: str

    def __str__(self) -> str:
        """A small table: a line a kernel, then the program."""
        rows = [
            f"  {k.name[:44]:44} {k.architecture:8} {k.registers:5} {k.spill_bytes:6} "
            f"{k.smem_bytes:8} {k.fp8_instructions:5}"
            for k in self.kernels
        ]
        return "\n".join(
            [
                f"  {'kernel':44} {'target':8} {'regs':>5} {'spill':>6} {'smem':>8} {'fp8':>5}",
                *rows,
                f"  launches {sum(self.launches.values())} {self.launches}, "
                f"command buffers {self.command_buffers}, "
                f"launches outside them {self.launches_outside_command_buffers}",
                f"  temporary memory {self.temp_bytes:,} bytes, ptxas {self.ptxas_version}",
            ]
        )


def h100_sharding():
    """A sharding on one described, absent H100: arguments that carry it are compiled for sm_90a."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(
        "h100", "cuda", target_config=TARGET_CONFIG, topology="1x1x1"
    )
    return SingleDeviceSharding(topology.devices[0])


def h100_mesh(hosts: int, devices: int, names: tuple[str, ...]) -> Any:
    """A mesh of described, absent H100s: `devices` in each host, which is a process of its own.

    Args:
      hosts: How many.
      devices: Of each host.
      names: Of the axes: two, or one for all devices.
    """
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    topology = topologies.get_topology_desc(
        "h100", "cuda", target_config=TARGET_CONFIG, topology=f"1x{hosts}x{devices}"
    )
    shape = (hosts, devices)[-len(names) :] if hosts == 1 else (hosts, devices)
    kinds = (AxisType.Auto,) * len(names)
    return Mesh(np.array(topology.devices).reshape(shape), names, axis_types=kinds)


def compile_for_h100(
    fn: Callable[..., Any], *specs: Any, dump: pathlib.Path | None = None
) -> ProgramReport:
    """Compiles `jax.jit(fn)` for H100s and reports on the program and its kernels.

    Args:
      fn: A function of arrays.
      *specs: Its arguments: pytrees of `jax.ShapeDtypeStruct`, on one H100 where they carry no
        sharding; other leaves are passed on.
      dump: A folder for what XLA dumps; None keeps nothing.

    Returns:
      A `ProgramReport`; kernels in the order of their compilation, Mosaic's before Triton's.
    """
    with contextlib.ExitStack() as stack:
        folder = dump or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        compiled, kernels = _compile(fn, specs, folder)
        launches, command_buffers, outside = thunks(folder)
    return ProgramReport(
        kernels=tuple(assemble(*kernel) for kernel in kernels),
        launches=launches,
        command_buffers=command_buffers,
        launches_outside_command_buffers=outside,
        temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
        ptxas_version=ptxas_version(),
    )


def ptx_for_h100(fn: Callable[..., Any], *specs: Any) -> dict[str, str]:
    """The PTX of each Mosaic or Triton kernel of `jax.jit(fn)`, by name; see `compile_for_h100`."""
    with tempfile.TemporaryDirectory() as scratch:
        _, kernels = _compile(fn, specs, pathlib.Path(scratch))
    return {name: ptx for name, ptx, _ in kernels}


def _compile(
    fn: Callable[..., Any], specs: Any, scratch: pathlib.Path
) -> tuple[Any, list[tuple[str, str, int]]]:
    """The program and (name, PTX, shared memory bytes) of its kernels; XLA dumps to `scratch`."""
    import jax

    from jax_moe import jax_window

    if jax_window.release(jax.__version__) < OLDEST_JAX:
        raise NotImplementedError(f"{NEEDS_THIS_JAX}, got {jax.__version__}")
    sharding = h100_sharding()

    def on_h100(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return leaf

    with _triton_kernels() as triton_kernels:
        with _mosaic_smem_bytes() as smem_bytes, _new_mosaic_hashes():
            lowered = jax.jit(fn).trace(*jax.tree.map(on_h100, specs)).lower()
        # Printed, since with a folder to dump to Mosaic logs every pass: 140 MB for the layer.
        printing = _environment_variable("MOSAIC_GPU_DUMP_PTX", "1")
        with no_compilation_cache(), printing, _printed(scratch / "mosaic.ptx"):
            # The level is XLA's default, whatever the CPU's programs of this process get.
            options = {"xla_dump_to": str(scratch), "xla_backend_optimization_level": 3}
            compiled = lowered.compile(compiler_options=options)
    printed = (scratch / "mosaic.ptx").read_text()
    return compiled, [*_mosaic_kernels(printed, smem_bytes), *triton_kernels]


def compile_triton_kernels(fn: Callable[..., Any], *specs: Any) -> tuple[KernelReport, ...]:
    """Lowers `jax.jit(fn)` for CUDA and compiles its Triton kernels for the GPU `fn` names."""
    import jax

    with _triton_kernels() as kernels:
        jax.jit(fn).trace(*specs).lower(lowering_platforms=("cuda",))
    return tuple(assemble(*kernel) for kernel in kernels)


def _mosaic_kernels(printed: str, smem_bytes: dict[str, int]) -> list[tuple[str, str, int]]:
    """(name, PTX, shared memory bytes) of each kernel printed, in the order of their lowering."""
    kernels = {}
    lowered = {int(find(r"_(\d+)$", key)): key for key in smem_bytes}
    for ptx in re.split(r"^(?=//\n// Generated by LLVM)", printed, flags=re.MULTILINE)[1:]:
        name = find(r"\.entry (\w+)_mosaic_gpu_kernel\(", ptx)
        left = [n for n in sorted(lowered) if n not in kernels and lowered[n] == f"{name}_{n}"]
        kernels[left[0]] = name, ptx, smem_bytes[lowered[left[0]]]
    return [kernels[number] for number in sorted(kernels)]


@contextlib.contextmanager
def _printed(path: pathlib.Path) -> Iterator[None]:
    """Writes to a file what is printed meanwhile, by C++ too."""
    sys.stdout.flush()
    before = os.dup(1)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(before, 1)
            os.close(before)


@contextlib.contextmanager
def _mosaic_smem_bytes() -> Iterator[dict[str, int]]:
    """Records the shared memory of each kernel that Mosaic lowers, by `name_counter`."""
    from jax.experimental.mosaic.gpu import utils

    found: dict[str, int] = {}
    original = utils.dump_to_file_or_stdout

    def recording(content: str, name: str, path: str) -> None:
        smem_bytes = int(find(r"smem_scratch_bytes=(\d+)", content))
        found[name.removesuffix(".resources.txt")] = smem_bytes

    # Asked for nothing else, Mosaic does not write its (large, slow) logs of the passes.
    utils.dump_to_file_or_stdout = recording
    try:
        with _environment_variable("MOSAIC_GPU_DUMP_RESOURCES", "1"):
            yield found
    finally:
        utils.dump_to_file_or_stdout = original


@contextlib.contextmanager
def _new_mosaic_hashes() -> Iterator[None]:
    """Lowers kernels that Mosaic takes for new: JAX 0.12 compiles equal ones once per process."""
    from jax.experimental.mosaic.gpu import core

    salted = types.SimpleNamespace(sha256=lambda module: hashlib.sha256(module + os.urandom(16)))
    with mock.patch.object(core, "hashlib", salted):
        yield


@contextlib.contextmanager
def _triton_kernels() -> Iterator[list[tuple[str, str, int]]]:
    """Records (name, PTX, shared memory bytes) of each kernel that jax-triton compiles."""
    from pallas_kernels.triton.launch import load_jax_triton

    kernels: list[tuple[str, str, int]] = []
    try:
        triton_lib = load_jax_triton().triton_lib
    except ImportError:  # without jax-triton there are no Triton kernels to record
        yield kernels
        return
    original = triton_lib.compile_ttir_inplace

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        kernels.append((result.name, result.binary, result.shared_mem_bytes))
        return result

    if hasattr(triton_lib, "_COMPILED_KERNEL_CACHE"):  # 0.3 has one of all kernels
        new_cache: Any = mock.patch.dict(triton_lib._COMPILED_KERNEL_CACHE, clear=True)
    else:  # 0.4 has one per kernel
        cache: dict[Any, Any] = {}
        new_cache = mock.patch.object(
            triton_lib.TritonFunction, "_kernel_cache", property(lambda _: cache)
        )
    with new_cache, mock.patch.object(triton_lib, "compile_ttir_inplace", recording):
        yield kernels


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Compiles for real: a program from JAX's persistent cache would leave no dump."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once a process whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def thunk_order(folder: pathlib.Path) -> list[tuple[int, str]]:
    """XLA's launch list: indentation and kind of each thunk, in the order of their launches."""
    found = re.findall(r"^( *)\d+: (k\w+)", _thunk_text(folder), re.MULTILINE)
    return [(len(indent), kind) for indent, kind in found]


def launches_that_wait_for_none(folder: pathlib.Path) -> int:
    """How many launches XLA lets run at once at the start of their command buffer or program."""
    kinds = re.findall(r"^ *\d+: (k\w+) *\[source", _thunk_text(folder), re.MULTILINE)
    return sum(kind not in _CONTROL_THUNKS for kind in kinds)


def _thunk_text(folder: pathlib.Path) -> str:
    # The first file exists only where the passes (command buffers among them) changed something.
    names = ("*thunk_sequence_after_thunk_passes.txt", "*thunk_sequence.txt")
    files = [path for name in names for path in folder.glob(name)]
    if not files:
        raise RuntimeError(f"XLA dumped no thunk sequence, only {sorted(folder.glob('*'))}")
    return files[0].read_text()


def thunks(folder: pathlib.Path) -> tuple[dict[str, int], int, int]:
    """Reads XLA's launch list: launches by kind, command buffers, launches outside of them."""
    launches: collections.Counter[str] = collections.Counter()
    command_buffers = outside = 0
    buffer_indent: int | None = None
    for indent, kind in thunk_order(folder):
        if buffer_indent is not None and indent <= buffer_indent:
            buffer_indent = None
        if kind == "kCommandBuffer":
            command_buffers += 1
            buffer_indent = indent
        elif kind not in _CONTROL_THUNKS:
            launches[kind] += 1
            outside += buffer_indent is None
    return dict(launches), command_buffers, outside


@contextlib.contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def main(argv: list[str] | None = None) -> int:
    """Command line: compiles what `module:function` names and prints one report each."""
    parser = argparse.ArgumentParser(prog="python -m tests.h100_target")
    parser.add_argument("target", help="module:function, see the module's docstring")
    parser.add_argument("--cuda-bin", type=os.path.expanduser, help="of ptxas; else the wheels'")
    parser.add_argument("--json", action="store_true", help="print one JSON object a program")
    args = parser.parse_args(argv)
    module, _, function = args.target.partition(":")
    if not all(name.isidentifier() for name in (*module.split("."), function)):
        parser.error(f"target: expected module:function, got {args.target!r}")
    if args.cuda_bin is not None and shutil.which("ptxas", path=args.cuda_bin) is None:
        parser.error(f"--cuda-bin: expected a folder with ptxas in it, got {args.cuda_bin!r}")
    prepare_environment(args.cuda_bin)
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        parser.error(f"target: {error}")
    if not callable(make):
        parser.error(f"target: expected a function without arguments, got a {type(make).__name__}")
    try:
        inspect.signature(make).bind()
    except (TypeError, ValueError) as error:  # the latter: C code that does not say
        parser.error(f"target: expected a function without arguments: {error}")
    made = make()
    programs = [(args.target, *made)] if isinstance(made, tuple) else made
    for program in programs if isinstance(programs, Iterable) else [programs]:
        if not isinstance(program, tuple) or len(program) != 3:
            forms = "(fn, specs) or a generator of (label, fn, specs)"
            parser.error(f"target: expected {forms}, got {program!r}")
        label, fn, specs = program
        report = compile_for_h100(fn, *specs)
        as_json = {"label": label, **dataclasses.asdict(report)}
        print(json.dumps(as_json) if args.json else f"{label}\n{report}", flush=True)
    return 0


if __name__ == "__main__":
    interruption.exit_with(main)
