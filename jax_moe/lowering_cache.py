"""Keeps lowered layers beside JAX's compilation cache, for the next process.

JAX's persistent cache saves XLA's part of a compilation. Before it, Pallas lowers the kernels, in
every process, which takes seconds of Python. Where that cache is switched on, a layer that was
lowered once is kept there as well, as `jax.export` writes it: program text, no result, no weights.

A file's name is a hash of everything that the text depends on: the sources of this package, JAX's
version, the GPU, shapes and dtypes of the arguments, what is static (the tilings among it), and the
settings of JAX that change what is traced. What cannot be read is made anew.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax import export

import pallas_kernels
from jax_moe.device import has_context
from pallas_kernels import device
from pallas_kernels.files import write_atomically

_PLATFORM = "cuda"
_CUSTOM_CALL = "mosaic_gpu_v2"  # no promise between versions of JAX, which are part of the name
_NO_MESH = jax.sharding.AbstractMesh((), ())
_SEAL_BYTES = hashlib.sha256().digest_size
_TRACED_DIFFERENTLY = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
)


def cached_lowering(function: Callable[..., Any], *static: Any) -> Callable[..., Any]:
    """`function`, lowered once for all processes that share JAX's compilation cache.

    Args:
        function: Traced with pytrees of arrays as its arguments.
        *static: What it depends on besides its arguments and the sources of this package; by its
            `repr`.

    Returns:
        A function of the same arguments, for use inside of `jax.jit`.
    """

    def call(*arguments: Any) -> Any:
        folder = _folder()
        if folder is None:
            return function(*arguments)
        # `jax.export` knows no types of ours, so the program takes the leaves.
        leaves, structure = jax.tree.flatten(arguments)
        specs = [_spec(leaf) for leaf in leaves]
        path = folder / f"jax_moe-{_digest(specs, (structure, *static))}-layer"
        program = _read(path)
        if program is None:
            program = _make(lambda *leaves: function(*jax.tree.unflatten(structure, leaves)), specs)
            _write(path, program)
        return export.deserialize(bytearray(program)).call(*leaves)

    return call


def _spec(array: Any) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(array)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _folder() -> Path | None:
    """Where layers are kept; None where they are not."""
    place = jax.config.jax_compilation_cache_dir
    if not place or not jax.config.jax_enable_compilation_cache:
        return None
    if "://" in place or has_context() or device.local_gpu() is None:
        return None
    # Inside of `jax.shard_map` over all axes of a mesh, a device runs the program by itself; with
    # other axes or explicit shardings it is one of several devices'.
    mesh = jax.sharding.get_abstract_mesh()
    return Path(place) if mesh.empty or mesh.are_all_axes_manual else None


def _digest(specs: Any, static: Any) -> str:
    gpu = device.local_gpu()
    settings = [getattr(jax.config, name) for name in _TRACED_DIFFERENTLY]
    parts = (
        _sources(),
        (jax.__version__, jaxlib.__version__),
        gpu and (gpu.device_kind, gpu.compute_capability, gpu.core_count),
        settings,
        [(spec.shape, spec.dtype.name, spec.weak_type) for spec in specs],
        static,
    )
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    """A hash of the text of the packages that make the program."""
    found = hashlib.sha256()
    for package in (Path(__file__).parent, Path(pallas_kernels.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            found.update(f"\n{path.relative_to(package)}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def _make(function: Callable[..., Any], specs: Any) -> bytes:
    checks = [export.DisabledSafetyCheck.custom_call(_CUSTOM_CALL)]
    exported = export.export(jax.jit(function), platforms=[_PLATFORM], disabled_checks=checks)
    with jax.sharding.use_abstract_mesh(_NO_MESH):  # a program of one device, wherever it is called
        return bytes(exported(*specs).serialize())


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(f"{path}: not read: {error}", stacklevel=2)
        return None
    seal, program = data[:_SEAL_BYTES], data[_SEAL_BYTES:]
    if hashlib.sha256(program).digest() != seal:
        warnings.warn(f"{path}: damaged, made anew", stacklevel=2)
        return None
    return program


def _write(path: Path, program: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path, "wb") as file:
            file.write(hashlib.sha256(program).digest() + program)
    except OSError as error:
        warnings.warn(f"{path}: not kept: {error}", stacklevel=2)
