"""Compile for an H100 on a machine that has none, and report what the compilers made of it.

`compile_for_h100` drives the whole chain ahead of time: Pallas Mosaic GPU -> MLIR -> PTX for the kernels, XLA for
the program around them, then `ptxas` and `nvdisasm` on every kernel's PTX. Triton kernels (through jax-triton) are
reported too. Nothing is executed.

    python -m tests.h100_target tests.test_aot_harness:example
    python -m tests.h100_target package.module:function --cuda-bin /usr/local/cuda/bin

`module:function` names a callable without arguments that returns `(fn, specs)`, or yields `(label, fn, specs)`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

TARGET_CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
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

# Thunks that contain others or only order them; every other thunk is one launch.
_CONTROL_THUNKS = {"kCommandBuffer", "kSequential", "kConditional", "kWhile", "kWaitForStreams"}


def wheel_bin(tool: str) -> pathlib.Path:
    """Folder of a CUDA tool (`ptxas`, `nvdisasm`) that a compiler wheel brought."""
    for entry in sys.path:
        for path in sorted(pathlib.Path(entry or ".").glob(f"nvidia/*/bin/{tool}")):
            return path.parent
    raise FileNotFoundError(f"{tool} not found: install the extras cuda13 and dev")


def prepare_environment(cuda_bin: str | os.PathLike[str] | None = None) -> None:
    """Lets JAX load its CUDA plugin without a GPU, and puts one folder of CUDA compilers first on PATH.

    Must run before JAX is imported. XLA takes the first `ptxas` on PATH and writes PTX for its version, so without
    this a toolkit that happens to be on the machine would decide which compiler is tested.

    Args:
      cuda_bin: The folder of `ptxas`; default: the compiler wheels'.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    folder = str(cuda_bin or wheel_bin("ptxas"))
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One compiled kernel: `ptxas -v` and a count of its machine instructions."""

    name: str
    architecture: str
    registers: int
    spill_bytes: int  # spill stores plus spill loads
    smem_bytes: int  # dynamic shared memory that the kernel asks for
    instructions: dict[str, int]  # SASS opcode without its modifiers -> occurrences

    @property
    def fp8_instructions(self) -> int:
        """FP8 tensor core instructions: warpgroup (Hopper QGMMA), tcgen05 (Blackwell), warp (Ada QMMA)."""
        return sum(self.instructions.get(opcode, 0) for opcode in ("QGMMA", "UTCQMMA", "QMMA"))


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
        rows = [
            f"  {k.name[:48]:48} {k.architecture:8} {k.registers:5} {k.spill_bytes:6} {k.smem_bytes:8} {k.fp8_instructions:5}"
            for k in self.kernels
        ]
        return "\n".join(
            [
                f"  {'kernel':48} {'target':8} {'regs':>5} {'spill':>6} {'smem':>8} {'fp8':>5}",
                *rows,
                f"  launches {sum(self.launches.values())} {self.launches}, command buffers {self.command_buffers}, "
                f"launches outside them {self.launches_outside_command_buffers}",
                f"  temporary memory {self.temp_bytes:,} bytes, ptxas {self.ptxas_version}",
            ]
        )


def h100_sharding():
    """A sharding on one described, absent H100; arguments that carry it make XLA compile for sm_90a."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(
        "h100", "cuda", target_config=TARGET_CONFIG, topology="1x1x1"
    )
    return SingleDeviceSharding(topology.devices[0])


def compile_for_h100(fn: Callable[..., Any], *specs: Any) -> ProgramReport:
    """Compiles `jax.jit(fn)` for one H100 and reports on the program and its kernels.

    Args:
      fn: A function of arrays.
      *specs: Its arguments: pytrees of `jax.ShapeDtypeStruct` (anything else is passed on as it is).

    Returns:
      A `ProgramReport`.
    """
    import jax

    sharding = h100_sharding()

    def on_h100(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return leaf

    with tempfile.TemporaryDirectory() as scratch, _triton_kernels() as triton_kernels:
        folder = pathlib.Path(scratch)
        with _environment_variable("MOSAIC_GPU_DUMP_TO", str(folder / "mosaic")):
            (folder / "mosaic").mkdir()
            lowered = jax.jit(fn).trace(*jax.tree.map(on_h100, specs)).lower()
            compiled = lowered.compile(compiler_options={"xla_dump_to": str(folder / "xla")})
        kernels = [
            _assemble(path.stem, path.read_text(), _mosaic_smem_bytes(path), folder)
            for path in sorted((folder / "mosaic").glob("*.ptx"), key=_dump_order)
        ]
        kernels += [_assemble(*kernel, folder) for kernel in triton_kernels]
        launches, command_buffers, outside = _thunks(folder / "xla")
    return ProgramReport(
        kernels=tuple(kernels),
        launches=dict(launches),
        command_buffers=command_buffers,
        launches_outside_command_buffers=outside,
        temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
        ptxas_version=ptxas_version(),
    )


def compile_triton_kernels(fn: Callable[..., Any], *specs: Any) -> tuple[KernelReport, ...]:
    """Lowers `jax.jit(fn)` for CUDA and compiles the Triton kernels in it, for whatever GPU `fn` asks Triton for."""
    import jax

    with tempfile.TemporaryDirectory() as scratch, _triton_kernels() as triton_kernels:
        jax.jit(fn).trace(*specs).lower(lowering_platforms=("cuda",))
        return tuple(_assemble(*kernel, pathlib.Path(scratch)) for kernel in triton_kernels)


def ptxas_version() -> str:
    """Version of the `ptxas` in use, as in "13.5.37"."""
    return _find(r"V(\d+\.\d+\.\d+)", _run("ptxas", "--version"))


def _run(*command: str | os.PathLike[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed ({done.returncode}): {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def _assemble(name: str, ptx: str, smem_bytes: int, folder: pathlib.Path) -> KernelReport:
    """Runs `ptxas` as XLA runs it, and counts the instructions of what comes out."""
    architecture = _find(r"\.target\s+(\w+)", ptx)
    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    log = _run("ptxas", "-v", "--generate-line-info", f"-arch={architecture}", source, "-o", binary)
    sass = _run(wheel_bin("nvdisasm") / "nvdisasm", "-ndf", "-c", binary)
    opcodes = re.findall(
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", sass, re.MULTILINE
    )
    return KernelReport(
        name=re.sub(r"_\d+$", "", name),  # Mosaic numbers its dumps
        architecture=architecture,
        registers=int(_find(r"Used (\d+) registers", log)),
        spill_bytes=int(_find(r"(\d+) bytes spill stores", log))
        + int(_find(r"(\d+) bytes spill loads", log)),
        smem_bytes=smem_bytes,
        instructions=dict(collections.Counter(opcodes)),
    )


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"{pattern!r} not found in:\n{text[:2000]}")
    return match[1]


def _dump_order(path: pathlib.Path) -> int:
    return int(_find(r"_(\d+)$", path.stem))


def _mosaic_smem_bytes(ptx: pathlib.Path) -> int:
    return int(_find(r"smem_scratch_bytes=(\d+)", ptx.with_suffix(".resources.txt").read_text()))


def _thunks(folder: pathlib.Path) -> tuple[collections.Counter[str], int, int]:
    """Reads XLA's launch list: launches by kind, number of command buffers, launches outside of them."""
    # The second file exists only where XLA's thunk passes (command buffers among them) changed something.
    files = [
        *folder.glob("*thunk_sequence_after_thunk_passes.txt"),
        *folder.glob("*thunk_sequence.txt"),
    ]
    if not files:
        raise RuntimeError(
            f"XLA dumped no thunk sequence: {sorted(p.name for p in folder.glob('*'))}"
        )
    launches: collections.Counter[str] = collections.Counter()
    command_buffers = outside = 0
    buffer_indent: int | None = None
    for indent, kind in re.findall(r"^( *)\d+: (k\w+)", files[0].read_text(), re.MULTILINE):
        if buffer_indent is not None and len(indent) <= buffer_indent:
            buffer_indent = None
        if kind == "kCommandBuffer":
            command_buffers += 1
            buffer_indent = len(indent)
        elif kind not in _CONTROL_THUNKS:
            launches[kind] += 1
            outside += buffer_indent is None
    return launches, command_buffers, outside


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


@contextlib.contextmanager
def _triton_kernels() -> Iterator[list[tuple[str, str, int]]]:
    """Records (name, PTX, shared memory bytes) of every kernel that jax-triton compiles meanwhile."""
    kernels: list[tuple[str, str, int]] = []
    try:
        from jax_triton import triton_lib
    except ImportError:  # without jax-triton there are no Triton kernels to record
        yield kernels
        return
    original = triton_lib.compile_ttir_inplace

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        kernels.append((result.name, result.binary, result.shared_mem_bytes))
        return result

    triton_lib._COMPILED_KERNEL_CACHE.clear()
    triton_lib.compile_ttir_inplace = recording
    try:
        yield kernels
    finally:
        triton_lib.compile_ttir_inplace = original


def main(argv: list[str] | None = None) -> int:
    """Command line: compiles what `module:function` returns and prints one report each."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.h100_target", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "target", help="module:function that returns (fn, specs) or yields (label, fn, specs)"
    )
    parser.add_argument(
        "--cuda-bin", help="folder of the ptxas to use; default: the compiler wheels'"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a program")
    args = parser.parse_args(argv)
    module, _, function = args.target.partition(":")
    if not function:
        parser.error(f"target: expected module:function, got {args.target!r}")
    prepare_environment(args.cuda_bin)
    made = getattr(importlib.import_module(module), function)()
    programs = [(args.target, *made)] if isinstance(made, tuple) else made
    for label, fn, specs in programs:
        report = compile_for_h100(fn, *specs)
        if args.json:
            print(json.dumps({"label": label, **dataclasses.asdict(report)}))
        else:
            print(f"{label}\n{report}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
