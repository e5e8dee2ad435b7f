"""Rows of tensors, read to where they belong in an array of all experts."""

from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jax_moe.checkpoint.shards import Tensor

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCRATCH_BYTES = 2**20


class Piece(NamedTuple):
    """A rectangle of a matrix of single bytes, and the row of the expert at which it lands.

    Attributes:
        tensor: The matrix.
        row: Its first row.
        rows: How many.
        column: Its first column.
        columns: How many.
        at: The row of the expert.
    """

    tensor: Tensor
    row: int
    rows: int
    column: int
    columns: int
    at: int

    @property
    def nbytes(self) -> int:
        """Bytes that it has."""
        return self.rows * self.columns

    @property
    def position(self) -> tuple[str, int]:
        """Its file and where in that it begins, for sorting."""
        begin = self.tensor.info.begin + self.row * self.tensor.row_bytes + self.column
        return self.tensor.shard.where, begin

    def read(self, matrix: np.ndarray) -> None:
        """Reads it; the bits of the values stay as they are.

        Args:
            matrix: u8[rows,columns] of the expert, contiguous.

        Raises:
            ValueError: The file ended or cannot be read; names file and tensor.
        """
        target = matrix[self.at : self.at + self.rows, : self.columns]
        width = self.tensor.row_bytes
        if self.columns == width == matrix.shape[1]:
            self.tensor.read_into(self.row * width, memoryview(target.reshape(-1)))
            return
        # Columns: whole rows are read into memory that stays in the cache, and cut there. Reading
        # each row's part by itself would be one system call per few hundred bytes of a page.
        step = max(_SCRATCH_BYTES // width, 1)
        scratch = np.empty((min(step, self.rows), width), np.uint8)
        for first in range(0, self.rows, step):
            rows = scratch[: min(step, self.rows - first)]
            self.tensor.read_into((self.row + first) * width, memoryview(rows.reshape(-1)))
            target[first : first + step] = rows[:, self.column : self.column + self.columns]


class Stack(NamedTuple):
    """An e4m3 array of matrices, one per expert, of which the pieces are known.

    Attributes:
        rows: Rows of an expert; what no piece covers is zero.
        columns: Columns of an expert.
        experts: The pieces of each expert; none for an expert that is another process's.
    """

    rows: int
    columns: int
    experts: Sequence[Sequence[Piece]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the array."""
        return (len(self.experts), self.rows, self.columns)

    def nbytes(self, experts: range) -> int:
        """Bytes that are read for some of the experts."""
        return sum(piece.nbytes for expert in experts for piece in self.experts[expert])

    def is_padded(self, expert: int) -> bool:
        """Whether the pieces leave something to be zero."""
        return self.nbytes(range(expert, expert + 1)) < self.rows * self.columns


class Slab(NamedTuple):
    """Some of a stack's experts, next to each other: what one worker reads at one go.

    Attributes:
        stack: The stack.
        which: Which of the stacks it is.
        experts: The experts.
    """

    stack: Stack
    which: int
    experts: range

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the array of these experts."""
        return (len(self.experts), self.stack.rows, self.stack.columns)

    @property
    def pieces(self) -> list[tuple[Piece, int]]:
        """The pieces in file order, each with the position of its expert in the slab."""
        pieces = [
            (piece, position)
            for position, expert in enumerate(self.experts)
            for piece in self.stack.experts[expert]
        ]
        return sorted(pieces, key=lambda item: item[0].position)

    def clear_padding(self, target: np.ndarray) -> None:
        """Zeroes the experts of u8[experts,rows,columns] that the pieces do not cover."""
        for expert, matrix in zip(self.experts, target, strict=True):
            if self.stack.is_padded(expert):
                matrix[...] = 0


def slabs_in_file_order(stacks: Sequence[Stack], experts: range, max_bytes: int) -> list[Slab]:
    """Cuts some of the stacks' experts into slabs, sorted by where in the files they begin.

    Args:
        stacks: The stacks.
        experts: The experts wanted of each.
        max_bytes: What a slab may take, if more than one expert.

    Returns:
        The slabs; those of a stack all have the same number of experts.
    """
    slabs = [
        Slab(stack, which, range(first, first + step))
        for which, stack in enumerate(stacks)
        for step in (_step(stack, len(experts), max_bytes),)
        for first in range(experts.start, experts.stop, step)
    ]
    return sorted(slabs, key=lambda s: min((p.position for p, _ in s.pieces), default=("", 0)))


def aligned_empty(shape: tuple[int, ...], alignment: int = 64) -> np.ndarray:
    """`np.empty` of bytes at an address that XLA takes over without a copy on a CPU."""
    count = int(np.prod(shape))
    raw = np.empty(count + alignment, np.uint8)
    begin = -raw.ctypes.data % alignment
    return raw[begin : begin + count].reshape(shape)


def _step(stack: Stack, count: int, max_bytes: int) -> int:
    """The most experts per slab that divide all of them and keep to the limit; at least one."""
    limit = max(max_bytes // (stack.rows * stack.columns), 1)
    return max(step for step in range(1, count + 1) if not count % step and step <= limit)
