"""The solutions that flashinfer-bench runs: small Python sources that call this project's packages.

The packages must be installed or on PYTHONPATH of the benchmark's process. Each source is called
with the definition's ten inputs, positionally, and returns the output. None keeps anything between
calls.
"""

from collections.abc import Mapping
from typing import Any

from interop import solutions
from interop.workloads import definition

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


{signature}
    output = torch_moe(
        {arguments},
        backend="mosaic",
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


def records() -> tuple[dict[str, Any], ...]:
    """The solutions in flashinfer-bench's schema, the baseline of the ratios first."""
    v1, v2 = solutions.SOLUTIONS["sglang_v1"], solutions.SOLUTIONS["sglang_v2"]
    jax_description = "FP8 block-scaled mixture of experts, Pallas Mosaic GPU kernels"
    return (
        _record("sglang_v1", v1.description, _TORCH_SOURCE, ("torch", "sglang-kernel")),
        _record("sglang_v2", v2.description, _TORCH_SOURCE, ("torch", "sglang-kernel")),
        _record("jax_moe_mosaic", jax_description, _JAX_SOURCE, ("torch", "jax")),
    )


def designs() -> Mapping[str, Mapping[str, str]]:
    """How each solution is built, for the report's differences table."""
    peers = {name: solutions.SOLUTIONS[name].design for name in ("sglang_v1", "sglang_v2")}
    return {**peers, "jax_moe_mosaic": _JAX_MOE_DESIGN}


def _record(
    name: str, description: str, source: str, dependencies: tuple[str, ...]
) -> dict[str, Any]:
    inputs = list(definition()["inputs"])
    content = source.format(
        name=name,
        description=description,
        signature=_SIGNATURE.format(arguments=",\n    ".join(inputs)),
        arguments=",\n        ".join(inputs),
    )
    return {
        "name": name,
        "definition": definition()["name"],
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
