"""One launch of a Triton kernel, described without a framework, and its call from JAX."""

import dataclasses
import functools
import inspect
import os
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir
from jax.interpreters import mlir, partial_eval


@dataclasses.dataclass(frozen=True)
class Launch:
    """Everything a framework needs to launch a kernel.

    The kernel's parameters come in this order: inputs, scalars, outputs, constants.

    Attributes:
        kernel: A `triton.jit` function.
        inputs: Arrays of the framework that launches, contiguous, in row-major order.
        scalars: 32-bit integers that may change without a recompilation.
        outputs: Shapes and dtypes of the arrays that the kernel writes.
        grid: Programs, one to three dimensions; a 0 in it means that there is nothing to do.
        constants: The kernel's `tl.constexpr` parameters by name.
        num_warps: Warps of a program.
        num_stages: Buffers of the software pipeline.
        fuse_products: Whether a product and the sum after it may be rounded once for both.
    """

    kernel: Any
    inputs: tuple[Any, ...]
    scalars: tuple[int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, ...]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    fuse_products: bool = True


def call(launch: Launch, compute_capability: int | None = None) -> list[jax.Array]:
    """Runs a launch inside a JAX program.

    Args:
        launch: What to run.
        compute_capability: Of the GPU to compile for, 90 for Hopper; None asks the first GPU.

    Returns:
        The outputs; zeros where the grid is empty.
    """
    if 0 in launch.grid:
        return [jnp.zeros(out.shape, out.dtype) for out in launch.outputs]
    jax_triton = load_jax_triton()
    outputs = list(launch.outputs)
    fusion: dict[str, Any] = {"enable_fp_fusion": launch.fuse_products}
    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:  # 0.4 and newer
        named = {"out_type": outputs, "backend_options": fusion}
    else:
        named = {"out_shape": outputs, **fusion}
    return jax_triton.triton_call(
        *launch.inputs,
        *launch.scalars,
        kernel=launch.kernel,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        compute_capability=compute_capability,
        **named,
        **launch.constants,
    )


@functools.cache
def load_jax_triton() -> ModuleType:
    """Imports jax-triton without the side effects of its version 0.3, and in a form XLA can graph.

    Raises:
        ImportError: jax-triton is not installed.
    """
    before = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    # Version 0.3 sets it to "", after which PyTorch can launch no Triton kernel in this process.
    if before:
        os.environ["TRITON_CACHE_DIR"] = before
    else:
        os.environ.pop("TRITON_CACHE_DIR", None)
    triton_lib = jax_triton.triton_lib
    if not hasattr(triton_lib, "CUSTOM_CALL_TARGET_NAME"):
        _call_typed_ffi(triton_lib)
    # JAX's own rule drops calls of which no result is used. That of jax-triton 0.4 keeps them, and
    # lacks an argument that JAX 0.12 gives.
    partial_eval.dce_rules.pop(triton_lib.triton_kernel_call_p, None)
    return jax_triton


def _call_typed_ffi(triton_lib: ModuleType) -> None:
    """Makes jax-triton 0.3 lower to jaxlib's typed FFI call, as 0.4 does.

    XLA keeps the untyped call that 0.3 lowers to out of CUDA graphs.
    """

    def lowering(ctx: Any, *args: Any, **params: Any) -> Any:
        backend = triton_lib.get_cuda_backend
        results = triton_lib.triton_kernel_call_lowering(backend, ctx, *args, **params)
        attributes = results[0].owner.attributes
        kernel = ir.DictAttr.get({"opaque": attributes["backend_config"]})
        attributes["call_target_name"] = ir.StringAttr.get("triton_kernel_call_ffi")
        attributes["mhlo.backend_config"] = kernel
        attributes["backend_config"] = ir.StringAttr.get("")
        attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 1)
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lowering, platform="cuda")
