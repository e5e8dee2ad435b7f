"""flashinfer-bench's FP8 block-scaled MoE definitions, and how their inputs make the layer's.

    >>> kimi = definitions.get("moe_fp8_block_scale_ds_routing_topk8_ng1_kg1_e48_h7168_i2048")
    >>> kimi.record["axes"]["num_local_experts"]["value"], kimi.router["scoring"]
    (48, 'sigmoid')

`data/definitions.json` has each definition's inputs in call order, as published; what its reference
source alone says (the router) stands beside it. No reference source is taken over: `reference`
gives one of our own. Neither torch nor jax.
"""

import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

_ARGUMENTS = (
    "routing_logits",
    "routing_bias",
    "hidden_states",
    "hidden_states_scale",
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm2_weights",
    "gemm2_weights_scale",
    "local_expert_offset",
    "routed_scaling_factor",
)
_RUN = '''

def run(
    {parameters},
):
    """The layer with this definition's inputs and router."""
    return layer(
        {arguments},
        {options},
    )
'''


class Definition(NamedTuple):
    """A definition and what maps its inputs to the ten arguments of the layer.

    Attributes:
        record: Name, op_type, tags, axes, inputs in call order, outputs; no reference source.
        router: Fields of `jax_moe.MoEConfig`.
        scalars: The two arguments that are numbers: what workloads of ours give where they are
            inputs, and their constant values where they are not.
        source: Where the definition was read.
    """

    record: Mapping[str, Any]
    router: Mapping[str, Any]
    scalars: Mapping[str, float]
    source: str

    @property
    def name(self) -> str:
        """Of the definition."""
        return self.record["name"]

    @property
    def is_default(self) -> bool:
        """Whether it is the one whose workloads and routing are published."""
        return self.name == DEFAULT.name

    @property
    def num_experts(self) -> int:
        """E, the columns of the router's logits."""
        return self.sizes(0)[self.record["inputs"]["routing_logits"]["shape"][1]]

    @property
    def num_local_experts(self) -> int:
        """E_local, the experts whose weights are inputs."""
        return self.sizes(0)[self.record["inputs"]["gemm1_weights"]["shape"][0]]

    @property
    def weight_bytes(self) -> int:
        """Of the two e4m3 weights, without their scales."""
        shapes = self.shapes(0)
        return sum(math.prod(shapes[name]) for name in ("gemm1_weights", "gemm2_weights"))

    @property
    def arguments(self) -> tuple[str, ...]:
        """The layer's ten arguments as source text: an input's name, or a value."""
        constants = {"routing_bias": None, **self.scalars}
        inputs = self.record["inputs"]
        return tuple(name if name in inputs else repr(constants[name]) for name in _ARGUMENTS)

    @property
    def options(self) -> str:
        """The router as source text: keyword arguments."""
        return ", ".join(f"{name}={_quoted(value)}" for name, value in self.router.items())

    def sizes(self, num_tokens: int) -> dict[str, int]:
        """The axes for T tokens."""
        return {name: axis.get("value", num_tokens) for name, axis in self.record["axes"].items()}

    def shapes(self, num_tokens: int) -> dict[str, tuple[int, ...]]:
        """The inputs' shapes for T tokens, () for a number."""
        sizes = self.sizes(num_tokens)
        return {
            name: tuple(sizes[axis] for axis in one["shape"] or ())
            for name, one in self.record["inputs"].items()
        }

    def reference(self) -> str:
        """Source of our reference in PyTorch, which runs alone; one expert dequantized at a time.

        For the default definition every local expert is dequantized, chosen or not, as in the
        published reference; for the others those that are chosen.
        """
        if self.is_default:
            return _text("torch_definition.py")
        return _text("torch_oracle.py") + _RUN.format(
            parameters=",\n    ".join(self.record["inputs"]),
            arguments=",\n        ".join(self.arguments),
            options=self.options.replace(", ", ",\n        "),
        )


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _text(name: str) -> str:
    return resources.files("interop").joinpath(name).read_text("utf-8")


ALL = tuple(Definition(**one) for one in json.loads(_text("data/definitions.json")))
"""The default first."""

DEFAULT = ALL[0]
"""One rank of DeepSeek-V3, the benchmark's own."""


def get(name: str) -> Definition:
    """A definition by its name.

    Raises:
        ValueError: There is none of that name; the message says how to list those there are.
    """
    for one in ALL:
        if one.name == name:
            return one
    raise ValueError(
        f"unknown definition {name!r}; `python -m interop.flashinfer_bench list` shows all"
    )
