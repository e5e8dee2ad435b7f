"""What the benchmark times: `Solution.run` maps the definition's ten arguments to the output.

They travel as `jax_moe.LayerInputs`, arrays of one framework on one device. JAX and PyTorch see the
same device memory: one side's arrays are DLPack views of the other's. Nobody writes to them. JAX
solutions get the two scalars as device scalars (`i32[]`, `f32[]`), PyTorch ones as Python numbers.

A solution is data plus one plain function, so that every framework is timed the same way: the
benchmark jits a JAX function (one XLA command buffer on a GPU) and captures a PyTorch function in a
CUDA graph (its best case), falling back to eager where capture fails, and says which in the
results.

`interop.solutions.SOLUTIONS` maps names to the solutions of this package. Importing it never fails
because an optional package is missing: `unavailable_reason` says so in one line instead, and `run`
imports what it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from jax_moe import LayerInputs

Framework = Literal["jax", "torch"]


def always_available() -> str | None:
    """The `unavailable_reason` of a solution that runs everywhere."""
    return None


@dataclasses.dataclass(frozen=True)
class Solution:
    """One way to compute the layer: configuration `jax_moe.DEEPSEEK_V3`, any shapes it allows.

    Attributes:
        name: Identifier on the command line and in results.
        framework: Whose arrays `run` takes and returns. A JAX `run` must be traceable by `jax.jit`.
        description: One line on what it is, shown by `bench_main.py --list`.
        run: `run(*inputs.arguments) -> bf16[T, H]`. It must not keep anything between calls that is
            derived from its arguments (outputs, dequantized or re-laid-out weights); compiled code
            may be kept.
        unavailable_reason: Returns None where the solution can run, else one line that says why
            not. It must be cheap, must not raise and must work without a GPU.
        prepare: Untimed step that turns the ten arguments into those of `run`, for a solution whose
            weights would lie in another form in practice (say, dequantized). None passes the ten
            arguments on.
        workspace_bound: Returns, for the ten arguments' shapes, the stated bound on the temporary
            memory of one call in bytes, whatever the routing. A call that takes more is wrong.
            None states no bound.
        capturable: Whether a PyTorch `run` may be captured in a CUDA graph (no host sync inside).
        compile_ahead: Whether a JAX `run` may be compiled while other processes use the GPU: not if
            XLA times candidates to compile it, or if `run`'s arguments are not the ten.
        caveat: What a reader must know about its figures: favourable or unfavourable conditions.
            Empty if none.
        design: Facts for the report's differences table, for example `{"SwiGLU": "...", "GEMM
            workspace": "..."}`.
    """

    name: str
    framework: Framework
    description: str
    run: Callable[..., Any]
    unavailable_reason: Callable[[], str | None] = always_available
    prepare: Callable[[LayerInputs], tuple[Any, ...]] | None = None
    workspace_bound: Callable[[LayerInputs], int] | None = None
    capturable: bool = True
    compile_ahead: bool = True
    caveat: str = ""
    design: Mapping[str, str] = MappingProxyType({})
