"""The layout that the kernels take, kept on disk for the next start.

A folder with one safetensors file, whose tensors are the arrays of `ExpertWeights` or
`LayerWeights` as they are. Reading it is one copy, without names to match, halves to swap or
scales to convert.
"""

import os
import stat
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, Sharding

from jax_moe import validate
from jax_moe.checkpoint.placing import Placement
from jax_moe.checkpoint.reading import Piece, Stack
from jax_moe.checkpoint.shards import Shard, Tensor
from jax_moe.checkpoint.transfer import num_threads_of, readers
from jax_moe.io.files import folder_name, found_at, shown
from jax_moe.types import ExpertWeights, LayerWeights
from pallas_kernels.shapes import QUANT_BLOCK

FILE = "jax_moe.safetensors"
FORMAT = "jax_moe packed weights"
VERSION = "1"

_GATE_DTYPES = ("F32", "BF16")
_SINGLES = ("gate_weight", "e_score_correction_bias", "shared_gate")


def save_packed(folder: str | os.PathLike[str], weights: ExpertWeights | LayerWeights) -> None:
    """Saves weights in the layout that the kernels take, for `load_packed`.

    The file appears at once or not at all; one that was there is replaced.

    Args:
        folder: One per layer and rank; made if it does not exist.
        weights: JAX or NumPy arrays. Arrays over several processes: each process saves its own.

    Raises:
        TypeError: These are no weights, or an array is of a wrong type or dtype.
        ValueError: A shape does not fit, an array lies partly in other processes, or `folder` is
            no name that a folder can have, or that of something else.
        ImportError: The package safetensors is missing.
        OSError: The folder cannot be made, or the file cannot be written.
    """
    if not isinstance(weights, ExpertWeights | LayerWeights):
        raise TypeError(
            f"weights: expected ExpertWeights or LayerWeights, got {type(weights).__name__}"
        )
    folder = folder_name("folder", folder)
    _check(weights)
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(
            "save_packed: expected the package safetensors (pip install safetensors)"
        ) from error
    tensors = dict(_named(weights))
    for name, array in tensors.items():
        if isinstance(array, jax.core.Tracer):
            raise TypeError(f"{name}: expected an array with values, got a traced one")
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise ValueError(f"{name}: expected an array of this process, got {array.sharding}")
    metadata = {"format": FORMAT, "version": VERSION, "kind": type(weights).__name__}
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        found = found_at(folder)
        raise ValueError(f"folder: {shown(folder)}: expected a folder, got {found}") from None
    with _temporary_folder(folder) as temporary:
        path = os.path.join(temporary, FILE)
        # Explicit, as `jax.transfer_guard` may forbid the implicit way to the host.
        arrays = {n: np.ascontiguousarray(jax.device_get(a)) for n, a in tensors.items()}
        whole = os.path.join(folder, FILE)
        try:
            save_file(arrays, path, metadata)
        except SafetensorError as error:  # an OSError of its own, such as a full disk's
            raise OSError(f"{shown(whole)}: cannot be written: {error}") from None
        os.chmod(path, _mode_of_new_files(temporary))  # safetensors may make it private
        os.replace(path, whole)


def _temporary_folder(folder: str) -> tempfile.TemporaryDirectory[str]:
    """Makes a folder in a folder; an error names the latter, as the former never was."""
    try:
        return tempfile.TemporaryDirectory(dir=folder, prefix=".packed")
    except OSError as error:
        raise OSError(error.errno, error.strerror, folder) from None


def _mode_of_new_files(folder: str) -> int:
    """The mode that the umask leaves, which no other call tells without setting it."""
    path = os.path.join(folder, "mode")
    with open(path, "xb") as file:
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode)


def load_packed(
    folder: str | os.PathLike[str],
    *,
    sharding: Mesh | Sharding | None = None,
    progress: bool = False,
    num_threads: int | None = None,
) -> ExpertWeights | LayerWeights:
    """Loads what `save_packed` saved.

    Args:
        folder: The folder.
        sharding: Of the routed experts, as in `load_experts`; each process reads what its devices
            hold.
        progress: Shows a bar.
        num_threads: Threads to read with.

    Returns:
        What was saved, as jax Arrays.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: The file is missing, truncated, of another format or version, or a tensor does
            not fit; names file and tensor.
        ImportError: `progress` without tqdm.
        RuntimeError: Called while JAX traces, as inside of `jax.jit`.
    """
    threads = num_threads_of(num_threads)
    folder = folder_name("folder", folder)
    if not os.path.isdir(folder):
        found = found_at(folder)
        raise ValueError(
            f"folder: {shown(folder)}: expected the folder of packed weights, got {found}"
        )
    if not os.path.lexists(os.path.join(folder, FILE)):
        raise ValueError(
            f"folder: {shown(folder)}: expected {FILE}, as save_packed writes it, got none "
            "(load_layer reads checkpoints of the hub)"
        )
    shard = Shard(os.path.join(folder, FILE))
    is_layer, has_shared = _check_contents(shard)
    experts = _Packed(shard, "experts.")
    shared = _Packed(shard, "shared_experts.") if has_shared else None
    singles = {name: shard.tensor(name) for name in _SINGLES if name in shard.tensors}
    for name, tensor in singles.items():
        _check_single(name, tensor, singles["gate_weight"], experts.hidden_size)
    if shared and (shared.num_experts, shared.hidden_size) != (1, experts.hidden_size):
        raise ValueError(
            f"{shared.gemm1.where}: expected one expert of H = {experts.hidden_size}, got "
            f"{list(shared.gemm1.info.shape)}"
        )
    placement = Placement(sharding, experts.num_experts)
    held = len(placement.local_experts)
    nbytes = experts.nbytes * held // experts.num_experts + (shared.nbytes if shared else 0)
    with readers(nbytes, shown(folder), threads, progress) as (pool, advance):
        routed = experts.load(placement, pool, advance)
        if not is_layer:
            return routed
        alone = Placement(placement.replicated, 1)
        return LayerWeights(
            experts=routed,
            shared_experts=shared.load(alone, pool, advance) if shared else None,
            **{name: placement.put_replicated(t.read()) for name, t in singles.items()},
        )


def _check_contents(shard: Shard) -> tuple[bool, bool]:
    """Whether a file holds a whole layer, and whether that has shared experts."""
    kinds = (ExpertWeights.__name__, LayerWeights.__name__)
    for field, allowed in (("format", (FORMAT,)), ("version", (VERSION,)), ("kind", kinds)):
        found = shard.metadata.get(field)
        if found not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise ValueError(f"{shard.where}: {field}: expected {wanted}, got {found!r:.200}")
    is_layer = shard.metadata["kind"] == LayerWeights.__name__
    has_shared = any(name.startswith("shared_experts.") for name in shard.tensors)
    prefixes = ("experts.", "shared_experts.") if is_layer and has_shared else ("experts.",)
    expected = {f"{prefix}{field}" for prefix in prefixes for field in ExpertWeights._fields}
    if is_layer:
        expected |= {"gate_weight", *(set(_SINGLES) & set(shard.tensors))}
    for name in sorted(expected ^ set(shard.tensors)):
        problem = "missing" if name in expected else "unknown tensor"
        raise ValueError(f"{shard.where}: {name!r}: {problem}")
    return is_layer, has_shared


class _Packed:
    """Four tensors of experts in a file, checked."""

    def __init__(self, shard: Shard, prefix: str) -> None:
        self.gemm1, scale1, self.gemm2, scale2 = (
            shard.tensor(f"{prefix}{field}") for field in ExpertWeights._fields
        )
        shape = self.gemm1.info.shape
        if len(shape) != 3 or not all(shape) or shape[1] % (2 * QUANT_BLOCK):
            raise ValueError(
                f"{self.gemm1.where}: expected [E_local, 2*I, H] with I a multiple of "
                f"{QUANT_BLOCK}, got {list(shape)}"
            )
        self.num_experts, rows, self.hidden_size = shape
        size, blocks = rows // 2, self.hidden_size // QUANT_BLOCK
        if self.hidden_size % QUANT_BLOCK:
            raise ValueError(
                f"{self.gemm1.where}: expected H to be a multiple of {QUANT_BLOCK}, got "
                f"{list(shape)}"
            )
        self.gemm1.check(("F8_E4M3",), shape)
        self.gemm2.check(("F8_E4M3",), (self.num_experts, self.hidden_size, size))
        scale1.check(("F32",), (self.num_experts, rows // QUANT_BLOCK, blocks))
        scale2.check(("F32",), (self.num_experts, blocks, size // QUANT_BLOCK))
        self._scales = (scale1, scale2)

    @property
    def nbytes(self) -> int:
        return self.gemm1.nbytes + self.gemm2.nbytes

    def load(self, placement: Placement, pool: Any, advance: Any) -> ExpertWeights:
        held = set(placement.local_experts)
        stacks = []
        for tensor in (self.gemm1, self.gemm2):
            _, rows, columns = tensor.info.shape
            pieces = [
                [Piece(tensor, expert * rows, rows, 0, columns, 0)] if expert in held else []
                for expert in range(self.num_experts)
            ]
            stacks.append(Stack(rows, columns, pieces))
        gemm1, gemm2 = placement.put_stacks(stacks, pool, advance)

        def put(tensor: Tensor) -> Array:
            def read(experts: range) -> np.ndarray:
                return tensor.read(experts.start, len(experts))

            return placement.put_small(tensor.info.shape, np.float32, read)

        scale1, scale2 = map(put, self._scales)
        return ExpertWeights(gemm1, scale1, gemm2, scale2)


def _check(weights: ExpertWeights | LayerWeights) -> None:
    """Checks what is to be saved."""
    sizes: validate.Sizes = {}
    experts, name = weights, ""
    if isinstance(weights, LayerWeights):
        experts, name = weights.experts, "weights.experts"
    validate.weights(experts, sizes, name)
    if not sizes["E_local"][0]:
        raise ValueError(f"{sizes['E_local'][1]}: expected E_local of at least 1, got 0")
    if isinstance(weights, ExpertWeights):
        return
    validate.gates(weights, sizes)
    if weights.shared_experts is not None:
        sizes = {"E_local": (1, "shared_experts"), "H": sizes["H"]}
        validate.weights(weights.shared_experts, sizes, "weights.shared_experts")


def _named(weights: ExpertWeights | LayerWeights) -> Iterator[tuple[str, Any]]:
    if isinstance(weights, ExpertWeights):
        weights = LayerWeights(weights, gate_weight=None)  # type: ignore[arg-type]
    for field, value in weights._asdict().items():
        if isinstance(value, ExpertWeights):
            yield from ((f"{field}.{name}", array) for name, array in value._asdict().items())
        elif value is not None:
            yield field, value


def _check_single(name: str, tensor: Tensor, gate: Tensor, hidden: int) -> None:
    rows = gate.info.shape[0] if gate.info.shape else 0
    dtypes, shape = {
        "gate_weight": (_GATE_DTYPES, (rows, hidden)),
        "e_score_correction_bias": (("F32",), (rows,)),
        "shared_gate": (_GATE_DTYPES, (1, hidden)),
    }[name]
    tensor.check(dtypes, shape)
