"""The solutions that flashinfer-bench runs: small Python sources that call this project's packages.

The packages must be installed or on PYTHONPATH of the benchmark's process. Each source is called
with the definition's inputs, positionally, and returns the output. None keeps anything between
calls. sglang's two are for the default definition: their router is that one.
"""

from collections.abc import Mapping
from typing import Any

from interop import definitions, solutions
from interop.definitions import Definition
from jax_moe.config import Precision

AUTHOR = "jax-moe"

_SIGNATURE = """def run(
    {arguments},
):"""

_TORCH_SOURCE = '''"""{description}; needs the jax-moe packages installed or on PYTHONPATH."""

from interop.solutions import {name}


{signature}
    return {name}.run(
        {arguments},
    )
'''

_JAX_SOURCE = '''"""{description}; needs the jax-moe packages installed or on PYTHONPATH."""

import os

# Read when JAX first touches the GPU: leave PyTorch its share of the memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch

from interop import torch_moe
from jax_moe import MoEConfig


{signature}
    output = torch_moe(
        {arguments},
        config=MoEConfig({options}),
        backend="mosaic",{precision}
    )
    # JAX launches on a stream of its own: return only when the result exists, whatever the clock.
    torch.cuda.current_stream().synchronize()
    return output
'''

_JAX_MOE_DESIGN = {
    "Rows computed": "local pairs only",
    "SwiGLU": "in the epilogue of GEMM1",
    "Intermediate quantization": "in the epilogue of GEMM1",
    "GEMM workspace": "none",
}


HIGH = "jax_moe_mosaic_high"
"""Ours with 16-bit activations, for tolerances that no FP8 activation meets: run by name only."""


def precision_of(name: str) -> Precision:
    """That of one of our solutions."""
    return "high" if name == HIGH else "fast"


def records(definition: Definition = definitions.DEFAULT) -> tuple[dict[str, Any], ...]:
    """The solutions in flashinfer-bench's schema, the baseline of the ratios first.

    Args:
        definition: For which.
    """
    jax_description = "FP8 block-scaled mixture of experts, Pallas Mosaic GPU kernels"
    ours = tuple(
        _record(definition, name, description, _JAX_SOURCE, ("torch", "jax"))
        for name, description in (
            ("jax_moe_mosaic", jax_description),
            (HIGH, f"{jax_description}, activations in 16 bits"),
        )
    )
    if not definition.is_default:
        return ours
    v1, v2 = solutions.SOLUTIONS["sglang_v1"], solutions.SOLUTIONS["sglang_v2"]
    needs = ("torch", "sglang-kernel")
    return (
        _record(definition, "sglang_v1", v1.description, _TORCH_SOURCE, needs),
        _record(definition, "sglang_v2", v2.description, _TORCH_SOURCE, needs),
        *ours,
    )


def names(definition: Definition = definitions.DEFAULT) -> tuple[str, ...]:
    """Of the solutions of `records`, in their order."""
    return tuple(record["name"] for record in records(definition))


def designs() -> Mapping[str, Mapping[str, str]]:
    """How each solution is built, for the report's differences table."""
    peers = {name: solutions.SOLUTIONS[name].design for name in ("sglang_v1", "sglang_v2")}
    high = _JAX_MOE_DESIGN | {"Intermediate quantization": "none: f16 under powers of two"}
    return {**peers, "jax_moe_mosaic": _JAX_MOE_DESIGN, HIGH: high}


def _record(
    definition: Definition,
    name: str,
    description: str,
    source: str,
    dependencies: tuple[str, ...],
) -> dict[str, Any]:
    content = source.format(
        name=name,
        description=description,
        signature=_SIGNATURE.format(arguments=",\n    ".join(definition.record["inputs"])),
        arguments=",\n        ".join(definition.arguments),
        options=definition.options,
        precision='\n        precision="high",' * (precision_of(name) == "high"),
    )
    return {
        "name": name,
        "definition": definition.name,
        "author": AUTHOR,
        "description": description,
        "spec": {
            "language": "python",
            "target_hardware": ["NVIDIA H100"],
            "entry_point": "main.py::run",
            "dependencies": [AUTHOR, *dependencies],
            "destination_passing_style": False,
        },
        "sources": [{"path": "main.py", "content": content}],
    }
