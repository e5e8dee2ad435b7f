"""Builds the part of flashinfer's module `fused_moe_90` that `flashinfer_cutlass` runs.

    python -m tools.flashinfer_module --output out/flashinfer
    python -m tools.flashinfer_module --output out/flashinfer --package SITE/flashinfer --cuda DIR

flashinfer-python compiles its modules when they are first called. This one has 181 files, of which
154 are generated matrix products of other types. Here are the 14 that bf16 hidden states with e4m3
weights and block scales need; two of them with the other types cut out. Copied to the package's
`data/aot/fused_moe_90/`, `fused_moe_90.so` is what flashinfer loads instead of compiling. Checked
with flashinfer-python 0.6.6 and CUDA 13.0; it needs nvcc, c++ and the package apache-tvm-ffi.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

from interop.arguments import folder_name
from pallas_kernels import interruption

NAME = "fused_moe_90"
_RUNNER = "kernels::CutlassMoeFCRunner<__nv_bfloat16, __nv_fp8_e4m3>"
_BINDING = f"""    if (mActivationDtype == dl_bfloat16 && mWeightDtype == dl_float8_e4m3fn) {{
      mKernelRunner = std::make_unique<{_RUNNER}>();
    }}
"""
_INSTANTIATION = """template class CutlassMoeFCRunner<__nv_bfloat16, __nv_fp8_e4m3, __nv_bfloat16>;
INSTANTIATE_FINALIZE_MOE_ROUTING(__nv_bfloat16, __nv_bfloat16, __nv_bfloat16);
"""
_DEFINES = (
    *("FLASHINFER_ENABLE_F16", "FLASHINFER_ENABLE_BF16"),
    *("FLASHINFER_ENABLE_FP8_E4M3", "FLASHINFER_ENABLE_FP8_E5M2"),
    *("CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED", "USING_OSS_CUTLASS_MOE_GEMM", "NDEBUG"),
    *("COMPILE_HOPPER_TMA_GEMMS", "COMPILE_HOPPER_TMA_GROUPED_GEMMS"),
    *("ENABLE_BF16", "ENABLE_FP8", "ENABLE_FP8_BLOCK_SCALE", "ENABLE_FP4"),
)
_NVCC = (
    *("-std=c++17", "-use_fast_math", "-O3", "--expt-relaxed-constexpr"),
    *("--compiler-options=-fPIC", "-static-global-template-stub=false"),
    "-gencode=arch=compute_90a,code=sm_90a",
)
_CXX = ("-std=c++17", "-O3", "-fPIC", "-Wno-switch-bool")


def replaced(text: str, start: str, end: str, new: str) -> str:
    """The text with what stands from `start` to before `end` exchanged.

    Raises:
        ValueError: One of them is not there: it is another version of flashinfer.
    """
    first = text.find(start)
    last = text.find(end, first)
    if first < 0 or last < 0:
        raise ValueError(f"--package: expected a source with {start!r} and {end!r}, got none")
    return text[:first] + new + text[last:]


def sources(csrc: Path, output: Path) -> list[Path]:
    """The files to compile; writes the two that are cut."""
    backend = csrc / "fused_moe" / "cutlass_backend"
    binding = (backend / "flashinfer_cutlass_fused_moe_binding.cu").read_text()
    binding = binding.replace('"../../tvm_ffi_utils.h"', '"tvm_ffi_utils.h"')
    start, end = "    // keep consistent with cpp/tensorrt_llm/plugins", "    if (!mKernelRunner) {"
    (output / "binding.cu").write_text(replaced(binding, start, end, _BINDING))
    instantiation = (backend / "cutlass_fused_moe_instantiation.cu").read_text()
    start, end = "template class CutlassMoeFCRunner<float", "}  // namespace tensorrt_llm"
    (output / "instantiation.cu").write_text(replaced(instantiation, start, end, _INSTANTIATION))
    internal = csrc / "nv_internal"
    kernels = internal / "tensorrt_llm" / "kernels"
    cutlass = kernels / "cutlass_kernels"
    return [
        output / "binding.cu",
        output / "instantiation.cu",
        cutlass / "fp8_blockscale_gemm" / "fp8_blockscale_gemm.cu",
        cutlass / "moe_gemm" / "moe_gemm_kernels_bf16_fp8.cu",
        cutlass / "moe_gemm" / "moe_gemm_tma_warp_specialized_input.cu",
        cutlass / "cutlass_heuristic.cpp",
        backend / "deepgemm_jit_setup.cu",
        internal / "cpp" / "common" / "memoryUtils.cu",
        kernels / "preQuantScaleKernel.cu",
        kernels / "lora" / "lora.cpp",
        *(
            internal / "cpp" / "common" / f"{name}.cpp"
            for name in ("envUtils", "logger", "stringUtils", "tllmException")
        ),
    ]


def include_flags(package: Path, cuda: Path, tvm_ffi: Path, output: Path) -> list[str]:
    """In flashinfer's order."""
    data, internal = package / "data", package / "data" / "csrc" / "nv_internal"
    llm = internal / "tensorrt_llm"
    cutlass = llm / "kernels" / "cutlass_kernels"
    own = [data / "csrc" / "fused_moe" / "cutlass_backend", internal, internal / "include"]
    own += [llm / "cutlass_extensions" / "include", cutlass / "include", cutlass, output]
    system = [cuda / "include", cuda / "include" / "cccl", tvm_ffi / "include", data / "csrc"]
    system += [data / "include", data / "cutlass" / "include", data / "spdlog" / "include"]
    system += [data / "cutlass" / "tools" / "util" / "include"]
    return [f"-I{path}" for path in own] + [f"-isystem{path}" for path in system]


def build(package: Path, cuda: Path, tvm_ffi: Path, output: Path, jobs: int) -> Path:
    """Compiles what is not there yet, and links.

    Returns:
        The library.

    Raises:
        subprocess.CalledProcessError: A compiler failed; its messages were printed.
    """
    output.mkdir(parents=True, exist_ok=True)
    includes = include_flags(package, cuda, tvm_ffi, output)
    defines = [f"-D{name}" for name in _DEFINES]

    def compiled(source: Path) -> Path:
        target = output / f"{source.name}.o"
        if not target.exists():
            nvcc = [str(cuda / "bin" / "nvcc"), *_NVCC, *defines]
            command = nvcc if source.suffix == ".cu" else ["c++", *_CXX]
            part = target.with_suffix(".part")
            subprocess.run([*command, *includes, "-c", str(source), "-o", str(part)], check=True)
            part.rename(target)
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, sources(package / "data" / "csrc", output)))
    # The driver need not be here: a stub makes the library ask for it.
    stub = output / "libcuda.so.1"
    shared = ["c++", "-shared"]
    named = ["-Wl,-soname,libcuda.so.1", "-xc++", os.devnull]
    subprocess.run([*shared, *named, "-o", str(stub)], check=True)
    library = output / f"{NAME}.so"
    libraries = [f"-L{cuda / name}" for name in ("lib64", "lib")] + ["-l:libcudart.so.13"]
    libraries += ["-Wl,--no-as-needed", str(stub), "-Wl,-s"]
    command = [*shared, *map(str, objects), *libraries, "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=folder_name, required=True, help="folder for objects and library"
    )
    parser.add_argument(
        "--package", type=folder_name, help="flashinfer's folder; else the installed one"
    )
    parser.add_argument(
        "--tvm_ffi", type=folder_name, help="tvm_ffi's folder; else the installed one"
    )
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    parser.add_argument("--cuda", type=folder_name, default=cuda, help="with bin/nvcc and include")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected a positive integer, got {arguments.jobs}")
    for name, package in (("package", "flashinfer"), ("tvm_ffi", "tvm_ffi")):
        if getattr(arguments, name) is None:
            found = util.find_spec(package)
            if found is None or not found.submodule_search_locations:
                sys.exit(f"--{name}: expected a folder, as {package} is not installed, got none")
            setattr(arguments, name, Path(found.submodule_search_locations[0]))
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.output).close()
    except OSError as error:
        parser.error(f"--output: {error}")
    places = arguments.package, arguments.cuda, arguments.tvm_ffi, arguments.output
    try:
        library = build(*places, arguments.jobs)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]}: ended with {error.returncode}")
    except (OSError, ValueError) as error:  # a source or compiler that is not there
        parser.error(str(error))
    print(f"{library}: {library.stat().st_size:,} bytes")
    print(f"copy it to {arguments.package / 'data' / 'aot' / NAME / library.name}")


if __name__ == "__main__":
    interruption.exit_with(main)
