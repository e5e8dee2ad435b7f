"""What of a checkpoint one rank needs: found, checked, and then read."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jax_moe.checkpoint.block_scales import Slice, check_scale, read_float32, slice_of
from jax_moe.checkpoint.huggingface import LayerNames, Projections
from jax_moe.checkpoint.placing import Placement
from jax_moe.checkpoint.reading import Piece, Stack
from jax_moe.checkpoint.shards import Checkpoint, Tensor
from jax_moe.checkpoint.transfer import Advance
from jax_moe.types import ExpertWeights
from pallas_kernels.shapes import QUANT_BLOCK


class Options(NamedTuple):
    """The loaders' options, checked.

    Attributes:
        rank: This expert-parallel rank.
        num_ranks: How many there are.
        tensor_parallel: Rank and number of ranks of the intermediate size.
        num_threads: Threads to read with.
    """

    rank: int
    num_ranks: int
    tensor_parallel: tuple[int, int]
    num_threads: int


class _Expert(NamedTuple):
    """The six tensors of an expert."""

    up: Tensor
    gate: Tensor
    down: Tensor
    up_scale: Tensor
    gate_scale: Tensor
    down_scale: Tensor


class Plan(NamedTuple):
    """Experts that have been checked, and can be read.

    Attributes:
        experts: The tensors of each expert, None where another process holds it.
        hidden_size: H.
        part: The rows of the intermediate size that are wanted.
        placement: Where the arrays go.
    """

    experts: Sequence[_Expert | None]
    hidden_size: int
    part: Slice
    placement: Placement

    @property
    def stacks(self) -> tuple[Stack, Stack]:
        """The values of both matmuls."""
        (first, rows, padded), hidden = self.part, self.hidden_size
        gemm1: list[list[Piece]] = [[] for _ in self.experts]
        gemm2: list[list[Piece]] = [[] for _ in self.experts]
        for index, expert in enumerate(self.experts):
            if expert and rows:
                gemm1[index] = [
                    Piece(expert.up, first, rows, 0, hidden, 0),
                    Piece(expert.gate, first, rows, 0, hidden, padded),
                ]
                gemm2[index] = [Piece(expert.down, 0, hidden, first, rows, 0)]
        return Stack(2 * padded, hidden, gemm1), Stack(hidden, padded, gemm2)

    @property
    def nbytes(self) -> int:
        """Bytes of values to read."""
        held = sum(expert is not None for expert in self.experts)
        return 3 * held * self.hidden_size * self.part.rows

    def load(self, pool: ThreadPoolExecutor, advance: Advance) -> ExpertWeights:
        """Reads them."""
        count, blocks = len(self.experts), self.part.padded // QUANT_BLOCK
        hidden_blocks = self.hidden_size // QUANT_BLOCK
        put = self.placement.put_small
        gemm1, gemm2 = self.placement.put_stacks(self.stacks, pool, advance)
        return ExpertWeights(
            gemm1,
            put((count, 2 * blocks, hidden_blocks), np.float32, self._gemm1_scales),
            gemm2,
            put((count, hidden_blocks, blocks), np.float32, self._gemm2_scales),
        )

    def _gemm1_scales(self, experts: range) -> np.ndarray:
        half, held = self.part.padded // QUANT_BLOCK, self.part.blocks
        shape = (len(experts), 2 * half, self.hidden_size // QUANT_BLOCK)
        scales = np.ones(shape, np.float32)
        for target, expert in zip(scales, self._held(experts), strict=True):
            for at, tensor in ((0, expert.up_scale), (half, expert.gate_scale)):
                rows = read_float32(tensor)[held]
                target[at : at + len(rows)] = rows
        return scales

    def _gemm2_scales(self, experts: range) -> np.ndarray:
        shape = (len(experts), self.hidden_size // QUANT_BLOCK, self.part.padded // QUANT_BLOCK)
        scales = np.ones(shape, np.float32)
        for target, expert in zip(scales, self._held(experts), strict=True):
            columns = read_float32(expert.down_scale)[:, self.part.blocks]
            target[:, : columns.shape[1]] = columns
        return scales

    def _held(self, experts: range) -> Iterator[_Expert]:
        for expert in experts:
            tensors = self.experts[expert]
            assert tensors is not None, expert
            yield tensors


def plan_experts(source: Checkpoint, names: LayerNames, options: Options, sharding: Any) -> Plan:
    """Finds and checks the routed experts that this process holds.

    Args:
        source: The checkpoint.
        names: The layer's names.
        options: The loader's.
        sharding: Where the experts go.

    Returns:
        The plan.

    Raises:
        TypeError: The sharding is none.
        ValueError: The experts do not split evenly, or the checkpoint is refused.
    """
    count = names.num_experts // options.num_ranks
    if count * options.num_ranks != names.num_experts:
        raise ValueError(
            f"num_ranks: expected a divisor of the {names.num_experts} experts, got "
            f"{options.num_ranks}"
        )
    placement = Placement(sharding, count)
    local = placement.local_experts or [0]  # a process without devices still learns the shapes
    offset = options.rank * count
    found = {
        expert: _tensors(source, names, names.expert(offset + expert), names.naming.projections)
        for expert in local
    }
    return _checked([found.get(expert) for expert in range(count)], options, placement)


def plan_shared(
    source: Checkpoint, names: LayerNames, options: Options, routed: Plan
) -> Plan | None:
    """Finds and checks the shared experts; None if the layer has none.

    Args:
        source: The checkpoint.
        names: The layer's names.
        options: The loader's.
        routed: The plan of the routed experts.

    Returns:
        A plan of one expert.

    Raises:
        ValueError: The checkpoint is refused.
    """
    shared = names.shared(source)
    if shared is None:
        return None
    placement = Placement(routed.placement.replicated, 1)
    plan = _checked([_tensors(source, names, *shared)], options, placement)
    if plan.hidden_size != routed.hidden_size:
        tensor = next(filter(None, plan.experts)).up
        raise ValueError(
            f"{tensor.where}: expected {routed.hidden_size} columns, as the routed experts have, "
            f"got {list(tensor.info.shape)}"
        )
    return plan


def _tensors(
    source: Checkpoint, names: LayerNames, prefix: str, projections: Projections
) -> _Expert:
    order = (projections.up, projections.gate, projections.down)
    weights = [source.tensor(f"{prefix}{projection}.weight") for projection in order]
    scales = []
    for projection in order:
        name = f"{prefix}{projection}.{names.naming.scale}"
        if name not in source.weight_map:
            other = f"{prefix}{projection}.weight_scale"
            hint = f"; {other!r} is there: scales per tensor or channel are not supported"
            hint = hint if other in source.weight_map else ""
            raise ValueError(f"{source.index}: {name!r}: missing scale{hint}")
        scales.append(source.tensor(name))
    return _Expert(*weights, *scales)


def _checked(experts: Sequence[_Expert | None], options: Options, placement: Placement) -> Plan:
    """Checks dtypes, shapes and grids before anything is allocated."""
    held = [expert for expert in experts if expert is not None]
    # What most experts agree on is taken for the layer's shape, so that the odd one is named.
    shape, _ = Counter(expert.up.info.shape for expert in held).most_common(1)[0]
    if len(shape) != 2 or not all(shape):
        raise ValueError(f"{held[0].up.where}: expected a matrix, got shape {list(shape)}")
    intermediate, hidden = shape
    for expert in held:
        expert.up.check(("F8_E4M3",), (intermediate, hidden))
        expert.gate.check(("F8_E4M3",), (intermediate, hidden))
        expert.down.check(("F8_E4M3",), (hidden, intermediate))
        if hidden % QUANT_BLOCK:
            raise ValueError(
                f"{expert.up.where}: expected a hidden size that is a multiple of {QUANT_BLOCK}, "
                f"got [{intermediate}, {hidden}]"
            )
        check_scale(expert.up_scale, expert.up)
        check_scale(expert.gate_scale, expert.gate)
        check_scale(expert.down_scale, expert.down)
    return Plan(experts, hidden, slice_of(intermediate, options.tensor_parallel), placement)
