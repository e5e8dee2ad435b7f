"""Blocks of 128x128: their grids of scales, how ranks share them, and padding up to whole ones."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import validate
from jax_moe.checkpoint.shards import Tensor
from jax_moe.types import ExpertWeights
from pallas_kernels.shapes import QUANT_BLOCK, cdiv

_SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")


class Slice(NamedTuple):
    """The part of the intermediate size that one tensor-parallel rank holds: whole blocks.

    Attributes:
        first: Its first row, a multiple of 128.
        rows: Rows that there are; may be 0.
        padded: Rows with the zeros behind them, a multiple of 128, the same on all ranks.
    """

    first: int
    rows: int
    padded: int

    @property
    def blocks(self) -> slice:
        """Its blocks among all."""
        return slice(self.first // QUANT_BLOCK, cdiv(self.first + self.rows, QUANT_BLOCK))


def slice_of(intermediate_size: int, tensor_parallel: Sequence[int]) -> Slice:
    """Shares the blocks of the intermediate size out evenly, none cut in two.

    A cut through a block would leave both of its ranks with a block to pad, and each would
    quantize its activations by another maximum than the whole layer does.

    Args:
        intermediate_size: I, of the whole layer, any positive number.
        tensor_parallel: The rank, and the number of ranks.

    Returns:
        The rank's part.
    """
    rank, ranks = tensor_parallel
    blocks = cdiv(intermediate_size, QUANT_BLOCK)
    first, end = (QUANT_BLOCK * (r * blocks // ranks) for r in (rank, rank + 1))
    rows = min(end, intermediate_size) - min(first, intermediate_size)
    return Slice(first, rows, QUANT_BLOCK * cdiv(blocks, ranks))


def check_scale(tensor: Tensor, weight: Tensor) -> Tensor:
    """Checks that a tensor has one scale per block of a matrix, the last ones perhaps cut off.

    Raises:
        ValueError: Another dtype or grid; names file and tensor.
    """
    rows, columns = weight.info.shape
    grid = (cdiv(rows, QUANT_BLOCK), cdiv(columns, QUANT_BLOCK))
    why = f" (one per 128x128 block of {weight.name!r} {[rows, columns]})"
    return tensor.check(_SCALE_DTYPES, grid, why)


def read_float32(tensor: Tensor) -> np.ndarray:
    """Reads a small tensor of f32, bf16 or e8m0 as f32, which holds all of their values."""
    return tensor.read().astype(np.float32)


def pad_intermediate(weights: ExpertWeights, *, first_row: int = 0) -> ExpertWeights:
    """Pads an intermediate size that is no multiple of 128, exactly: zeros, and scales of one.

    A padded row of both projections gives silu(0) * 0 = 0, which meets columns of zeros: the layer
    computes the same function.

    For a shard that was cut elsewhere: of I = 1536 over 8 ranks, rank 1 holds rows 192..383, which
    begin in the middle of a block. Its scales have then one row per block that it touches, and
    `first_row=192 % 128` puts the zeros where each block keeps its own scale.

    Args:
        weights: e4m3[E_local,2*I,H] and so on, up first as everywhere here; each half's scales have
            ceil((first_row + I) / 128) rows, and the down-projection's as many columns. JAX or
            NumPy arrays.
        first_row: Where the first row lies in its block, 0..127.

    Returns:
        The same weights if there is nothing to pad; else of the least I that is a multiple of 128.

    Raises:
        TypeError: These are no weights, or an array is no JAX or NumPy array, or of another dtype;
            `first_row` no integer.
        ValueError: A shape does not fit, H is no multiple of 128, or `first_row` out of range.
    """
    first_row = int(validate.integer("first_row", first_row, 0, QUANT_BLOCK - 1))
    validate.expert_weights("weights", weights)
    sizes: validate.Sizes = {}
    validate.argument("gemm1_weights", weights.gemm1_weights, sizes)
    validate.blocked("H", sizes)
    validate.argument("gemm2_weights", weights.gemm2_weights, sizes)
    size = sizes["I"][0]
    blocks = cdiv(first_row + size, QUANT_BLOCK)
    behind = blocks * QUANT_BLOCK - first_row - size
    sizes["blocks"] = (blocks, f"I = {size} and first_row = {first_row}")
    scales = {
        "gemm1_weights_scale": f"E_local 2*blocks H/{QUANT_BLOCK}",
        "gemm2_weights_scale": f"E_local H/{QUANT_BLOCK} blocks",
    }
    for name, dims in scales.items():
        validate.array(name, getattr(weights, name), dims, validate.F32, sizes)
    padding = (first_row, behind)
    padded = ExpertWeights(
        _pad_halves(weights.gemm1_weights, padding),
        weights.gemm1_weights_scale,
        _pad(weights.gemm2_weights, 2, padding),
        weights.gemm2_weights_scale,
    )
    return padded.check()


def _pad_halves(array: Any, padding: tuple[int, int]) -> Any:
    if padding == (0, 0):
        return array
    experts, rows, columns = array.shape
    halves = _pad(array.reshape(experts, 2, rows // 2, columns), 2, padding)
    return halves.reshape(experts, -1, columns)


def _pad(array: Any, axis: int, padding: tuple[int, int]) -> Any:
    if padding == (0, 0):
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = padding
    # As bytes: a zero of e4m3 is a zero byte, and no bit pattern goes through a cast.
    pad = np.pad if isinstance(array, np.ndarray) else _pad_on_device
    return pad(array.view(np.uint8), tuple(widths)).view(array.dtype)


# Jitted, as eagerly it would upload the zero, which `jax.transfer_guard` may forbid.
_pad_on_device = jax.jit(lambda array, widths: jnp.pad(array, widths), static_argnums=1)
