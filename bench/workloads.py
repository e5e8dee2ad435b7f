"""Which workloads a run measures, and at what size: the definition's 19, or powers of two."""

from collections.abc import Sequence
from typing import NamedTuple

from interop.arguments import up_to
from interop.dataset import MAX_TOKENS
from interop.workloads import Workload, workloads
from jax_moe.models import DEEPSEEK_V3, Model

LOCAL_EXPERTS = 32  # of a rank of the definition, whose ids a workload's offset refers to
_LEAST_DIGITS = 6  # of a uuid that is given by digits alone: fewer are a slip of a token count


class Sizes(NamedTuple):
    """The constant axes of one rank, or their reduction for a machine without a GPU."""

    num_experts: int
    num_local_experts: int
    hidden_size: int
    intermediate_size: int

    def over(self, ranks: int) -> "Sizes":
        """Those of one of so many ranks that share all experts."""
        return self._replace(num_local_experts=self.num_experts // ranks)

    def offset(self, workload: Workload) -> int:
        """First local expert of the workload's rank, of as many ranks as there are."""
        ranks = self.num_experts // self.num_local_experts
        return workload.local_expert_offset // LOCAL_EXPERTS % ranks * self.num_local_experts


def sizes_of(model: Model, *, reduced: bool = False) -> Sizes:
    """The sizes of one rank of a model.

    Args:
        model: Gives E, E_local, H and I.
        reduced: Small enough for a CPU: few columns, of DeepSeek-V3's experts a quarter.
    """
    experts = (model.num_experts, model.num_local_experts)
    if not reduced:
        return Sizes(*experts, model.hidden_size, model.intermediate_size)
    if model == DEEPSEEK_V3:
        experts = (64, 8)
    return Sizes(*experts, hidden_size=256, intermediate_size=128)


MOST_LAYERS = 1024  # of one scan, several times those of any model
FULL, REDUCED = sizes_of(DEEPSEEK_V3), sizes_of(DEEPSEEK_V3, reduced=True)

WORKLOADS = tuple(sorted(workloads(), key=lambda row: row.num_tokens))
SCALING = tuple(Workload(f"scaling-{2**i}", 2**i, 32, blob="") for i in range(15))


def select(names: Sequence[str], pool: Sequence[Workload] = WORKLOADS) -> tuple[Workload, ...]:
    """Picks workloads by uuid prefix or token count, in the pool's order.

    Args:
        names: `["all"]`, or any mix of token counts and first characters of uuids. Up to five
            digits are a token count and never a uuid.
        pool: The rows to choose from.

    Returns:
        The chosen rows, each once.

    Raises:
        ValueError: A name matches no row; the message lists what there is.
    """
    chosen: set[str] = set()
    for name in names:
        found = _matching(name.strip(), pool)
        if not found:
            counts = ", ".join(str(row.num_tokens) for row in pool)
            uuids = ", or the first characters of a uuid, six or more where all are digits"
            raise ValueError(
                f"--workloads: unknown workload {name!r}; expected 'all' or one of the token "
                f"counts {counts}{'' if pool is SCALING else uuids}"
            )
        chosen.update(row.uuid for row in found)
    return tuple(row for row in pool if row.uuid in chosen)


def token_counts(text: str) -> tuple[int, ...]:
    """The type of an argument that is token counts, separated by commas; each counts once."""
    return tuple(dict.fromkeys(map(up_to(MAX_TOKENS), text.split(","))))


def _matching(name: str, pool: Sequence[Workload]) -> list[Workload]:
    if name == "all":
        return list(pool)
    counted = [row for row in pool if str(row.num_tokens) == name]
    if counted or not name or (name.isdigit() and len(name) < _LEAST_DIGITS):
        return counted
    return [row for row in pool if row.uuid.startswith(name.lower())]
