"""What a run was asked to do, and the command line that asks for it again."""

import dataclasses
from pathlib import Path
from typing import Any

from bench.correctness import Tolerance
from bench.environment import shell_word
from bench.workloads import Sizes, sizes_of
from interop.workloads import Workload
from jax_moe import models
from jax_moe.config import Precision

CPU_ITERATIONS = 3
_OF_JAX_MOE = ("backend", "precision", "batch_invariant")  # no other solution takes them
_FLAGS = (
    "model",
    "num_local_experts",
    "backend",
    "precision",
    "inputs",
    "dataset",
    "routing",
    "seed",
    "timer",
    "warmup",
    "iterations",
    "num_trials",
    "cool_down",
    "flush",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of `bench_main.py`, with what was left open filled in for this machine.

    Attributes:
        solutions: Names, as chosen.
        workloads: Uuid prefixes, token counts or "all".
        model: Whose rank is measured, a name of `jax_moe.models`.
        num_local_experts: E_local of the rank; None is the model's.
        backend: What `jax_moe` runs.
        precision: At which it runs, as in `jax_moe.apply`.
        batch_invariant: Whether it keeps a token's bits in any batch, as in `jax_moe.apply`.
        inputs: One of `bench.inputs.KINDS`.
        dataset: Folder of `inputs="dataset"`.
        routing: One of `bench.routing.PATTERNS`.
        seed: Of all draws.
        warmup: Untimed calls before the timed ones.
        iterations: Timed calls per trial; slow solutions take fewer.
        num_trials: Draws of activations, each checked and timed.
        tolerance: When an output is right.
        timer: "gpu" or "wall": what speedups and rates are computed from.
        wall_time: Whether a "gpu" run also takes host times, in a pass of its own.
        cool_down: Seconds in which nothing runs before the first timed call of each row.
        flush: How the L2 is emptied before each timed call, one of `bench.timers.FLUSHES`.
        sustained: Whether a "gpu" run also times calls back to back.
        scaling: Powers of two instead of the 19 workloads.
        on_gpu: Whether JAX's default device is a GPU.
        output: Folder of results and reports; None makes one in `out/bench`.
    """

    solutions: tuple[str, ...]
    workloads: tuple[str, ...] = ("all",)
    model: str = models.DEEPSEEK_V3.name
    num_local_experts: int | None = None
    backend: str = "auto"
    precision: Precision = "fast"
    batch_invariant: bool = False
    inputs: str = "realistic"
    dataset: str | None = None
    routing: str = "moments"
    seed: int = 0
    warmup: int = 10
    iterations: int = 100
    num_trials: int = 5
    tolerance: Tolerance = dataclasses.field(default_factory=Tolerance)
    timer: str = "gpu"
    wall_time: bool = True
    cool_down: float = 0.2
    flush: str = "write"
    sustained: bool = False
    scaling: bool = False
    on_gpu: bool = True
    output: Path | None = None

    @property
    def measured(self) -> models.Model:
        """What is known of the model."""
        return models.get(self.model)

    @property
    def sizes(self) -> Sizes:
        """The model's on a GPU, reduced on a CPU; E_local as given."""
        sizes = sizes_of(self.measured, reduced=not self.on_gpu)
        return sizes._replace(num_local_experts=self.num_local_experts or sizes.num_local_experts)

    @property
    def passes(self) -> tuple[str, ...]:
        """The clocks, in order: host times must be taken before a profiler is attached."""
        return ("wall", "gpu") if self.timer == "gpu" and self.wall_time else (self.timer,)

    @property
    def stem(self) -> str:
        """Name of the result files, without ending."""
        return "scaling" if self.scaling else "results"

    def comparable(self) -> dict[str, Any]:
        """What must be equal for rows of two runs to stand in one table."""
        fields = dataclasses.asdict(self)
        for free in ("solutions", "workloads", "output"):
            del fields[free]
        return fields | {"tolerance": self.tolerance._asdict(), "sizes": self.sizes._asdict()}

    def command(
        self, solution: str | None = None, workload: Workload | None = None, **others: Any
    ) -> str:
        """A command line that repeats the run, or one row of it, without defaults.

        Args:
            solution: Of the row; None means all of the run.
            workload: Of the row; None means all of the run.
            others: Flags that are no settings; None and False leave one out.

        Returns:
            One line for a shell.
        """
        chosen = self.workloads
        if workload is not None:
            chosen = (str(workload.num_tokens) if self.scaling else workload.uuid[:8],)
        words = ["python bench_main.py", f"--solutions={solution or ','.join(self.solutions)}"]
        words.append(f"--workloads={','.join(chosen)}")
        default = Settings(self.solutions)
        unread = () if solution in (None, "jax_moe") else _OF_JAX_MOE
        for name in _FLAGS:
            if name not in unread and getattr(self, name) != getattr(default, name):
                words.append(f"--{name}={shell_word(str(getattr(self, name)))}")
        for name, value in self.tolerance._asdict().items():
            if value != getattr(default.tolerance, name):
                words.append(f"--{name}={value}")
        switches = {
            "--scaling": self.scaling,
            "--batch_invariant": self.batch_invariant and "batch_invariant" not in unread,
            "--nowall_time": not self.wall_time,
            "--sustained": self.sustained,
        }
        words += [flag for flag, is_on in switches.items() if is_on]
        for name, value in others.items():
            if value is True:
                words.append(f"--{name}")
            elif value not in (None, False):
                words.append(f"--{name}={shell_word(str(value))}")
        return " ".join(words)
