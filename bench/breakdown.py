"""Where the GPU time of a call goes: each kernel, its share, and how close it is to its floor."""

import re
from typing import NamedTuple

from bench.results import KernelTime, Results, Row
from bench.roofline import Roofline
from bench.work import BF16_BYTES, Work, gemm_bytes, quantized_row_bytes
from bench.workloads import Sizes
from jax_moe import DEEPSEEK_V3

HEADER = (
    "kernel", "stage", "us", "share", "launches", "TB/s", "TFLOP/s", "of its unpromoted floor",
    "of its promoted floor",
)  # fmt: skip

# Our kernels' names, whichever backend; other solutions' kernels have time and share only.
_STAGES = {
    "route": r"rout",
    "plan": r"plan|count_kernel",
    "gather": r"permute_rows",
    "up": r"up_projection",
    "down": r"down_projection",
    "unpermute local": r"unpermute_local",
    "unpermute": r"unpermute",
}


class Stage(NamedTuple):
    """A kernel of a call with what its stage must at least move and multiply, if it is ours."""

    kernel: KernelTime
    name: str
    work: Work | None


def stage_work(stage: str, row: Row, sizes: Sizes, top_k: int = DEEPSEEK_V3.top_k) -> Work:
    """The least bytes and FLOPs of one of our stages, by the arrays between them.

    What a later stage finds in the L2 counts as moved, so a fraction above 1 is possible.

    Args:
        stage: "route", "plan", "gather", "up", "down", "unpermute", or "unpermute local" where the
            zeros of tokens without a local pair are the up-projection's (not counted there).
        row: Gives T and the local load.
        sizes: Gives E, H and I.
        top_k: Experts per token.

    Returns:
        The work of the stage.
    """
    tokens, load, choices = row.num_tokens, row.load, top_k
    hidden, intermediate = sizes.hidden_size, sizes.intermediate_size
    activations = load.pairs * quantized_row_bytes(intermediate)
    outputs = load.pairs * BF16_BYTES * hidden
    weights = (gemm_bytes(2 * intermediate, hidden), gemm_bytes(hidden, intermediate))
    per_choice = 4 + 4  # an id and a weight, or an id and a row
    choices_of_all = tokens * per_choice * choices
    rows = quantized_row_bytes(hidden)
    moved = {
        "route": tokens * 4 * sizes.num_experts + choices_of_all,
        "plan": choices_of_all,
        "gather": (load.tokens + load.pairs) * rows,
        "up": load.active_experts * weights[0] + load.pairs * rows + activations,
        "down": load.active_experts * weights[1] + activations + outputs,
        "unpermute": outputs + choices_of_all + tokens * BF16_BYTES * hidden,
        "unpermute local": outputs + choices_of_all + load.tokens * BF16_BYTES * hidden,
    }
    multiplied = {
        "up": 2 * load.pairs * 2 * intermediate * hidden,
        "down": 2 * load.pairs * intermediate * hidden,
    }
    return Work(moved[stage], multiplied.get(stage, 0))


def stage_of(kernel: str) -> str:
    """The stage that a kernel of ours belongs to, by its name; empty for others."""
    return next((stage for stage, pattern in _STAGES.items() if re.search(pattern, kernel)), "")


def stages(row: Row, sizes: Sizes, top_k: int = DEEPSEEK_V3.top_k) -> list[Stage]:
    """The kernels of a row in order, each with its stage."""
    found = []
    for kernel in row.kernels:
        name = stage_of(kernel.name) if row.solution.startswith("jax_moe") else ""
        work = stage_work(name, row, sizes, top_k) if name else None
        found.append(Stage(kernel, name, work))
    return found


def table(
    row: Row, sizes: Sizes, roofline: Roofline | None, top_k: int = DEEPSEEK_V3.top_k
) -> list[list[str]]:
    """One line per kernel as in `HEADER`, then the time in which none ran.

    Args:
        row: With GPU times.
        sizes: The constant axes.
        roofline: The device's rates; None leaves the floors out.
        top_k: Experts per token.

    Returns:
        The cells, empty where the row has no GPU times.
    """
    if row.gpu is None or row.busy_us is None:
        return []
    total = row.gpu.median
    lines = [
        [
            stage.kernel.name[:60],
            stage.name or "-",
            f"{stage.kernel.us:.1f}",
            f"{stage.kernel.us / total:.1%}",
            str(stage.kernel.launches),
            *_rates(stage, roofline),
        ]
        for stage in stages(row, sizes, top_k)
    ]
    idle = max(total - row.busy_us, 0.0)
    lines.append(["(no kernel running)", "-", f"{idle:.1f}", f"{idle / total:.1%}", *["-"] * 5])
    lines.append(
        ["call", "all", f"{total:.1f}", "100.0%", str(row.launches), *_whole(row, roofline)]
    )
    return lines


def _rates(stage: Stage, roofline: Roofline | None) -> list[str]:
    if stage.work is None or stage.kernel.us <= 0:
        return ["-"] * 4
    return _cells(stage.work, stage.kernel.us, roofline)


def _whole(row: Row, roofline: Roofline | None) -> list[str]:
    return _cells(row.work, row.gpu.median if row.gpu else 0.0, roofline)


def _cells(work: Work, us: float, roofline: Roofline | None) -> list[str]:
    fractions = [f"{floor / us:.1%}" if floor else "-" for floor in work.floors(roofline)]
    flops = f"{work.flops / us / 1e6:.1f}" if work.flops else "-"
    return [f"{work.bytes / us / 1e6:.3f}", flops, *fractions]


def rows_to_show(results: Results) -> list[Row]:
    """Rows with kernels, by T, then as measured; the reference's thousands are left out."""
    return [
        row
        for _, rows in results.workloads()
        for row in rows
        if row.kernels and row.solution != "torch_reference"
    ]
