"""Numbers of NumPy, JAX and torch: in a graph as in an eager call, to a handle as to a function."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import jax_moe  # noqa: E402
from interop import TorchMoE, to_jax, to_torch, torch_moe  # noqa: E402
from interop import torch_moe_routed as routed  # noqa: E402
from jax_moe import MoEConfig  # noqa: E402
from tests.moe_inputs import array_arguments, handle_arguments, token_arguments  # noqa: E402
from tests.test_interop_torch_ops import CONFIG, expected, inputs  # noqa: E402
from tests.torch_inputs import bits  # noqa: E402

PLAIN = {"local_expert_offset": 0, "routed_scaling_factor": 2.5}
__all__ = ["expected", "inputs"]  # fixtures


@pytest.fixture(scope="module")
def choices(inputs):
    router = map(to_jax, (inputs.routing_logits, inputs.routing_bias))
    chosen = jax_moe.route(*router, 2.5, config=CONFIG, backend="xla")
    return [to_torch(array) for array in chosen]


@pytest.fixture
def cold():
    torch._dynamo.reset()


NUMBERS = {
    "local_expert_offset": (np.int64(0), np.array(0), torch.tensor(0)),
    "routed_scaling_factor": (np.float32(2.5), np.array(2.5), torch.tensor(2.5)),
    "num_tokens": (np.int32(4), np.array(4, np.uint8), torch.tensor(4)),
    "expected_rows": (np.float32(3), np.int64(3), np.float64(3)),
    "swiglu_limit": (np.float32(7), np.int64(7), np.float64(7)),
    "num_experts": (np.int64(8), np.array(8), np.uint8(8)),
}


@pytest.mark.parametrize("kind", range(3))
def test_numbers_of_numpy_and_torch_are_taken_in_a_graph(cold, inputs, expected, choices, kind):
    """As a backend sees them that makes tensors of its own of what a graph holds."""
    chosen = {name: kinds[kind] for name, kinds in NUMBERS.items()}
    num_experts = chosen.pop("num_experts")
    whole = lambda *x: torch_moe(*x, config=CONFIG, **chosen)  # noqa: E731
    x = inputs.hidden_states, inputs.hidden_states_scale, *inputs.weights
    offset, limit = chosen["local_expert_offset"], chosen["swiglu_limit"]
    after = lambda *x: routed(  # noqa: E731
        *x, offset, num_experts=num_experts, swiglu_limit=limit, scale_format="ue8m0"
    )
    for function, tensors in (
        (whole, array_arguments(inputs)),
        (after, (*x, *choices)),
    ):
        np.testing.assert_array_equal(bits(function(*tensors)), expected)
        with FlopCounterMode(display=False):  # sees the operator of an eager call as well
            np.testing.assert_array_equal(bits(function(*tensors)), expected)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        np.testing.assert_array_equal(bits(compiled(*tensors)), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # torch's own, in inductor
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", NUMBERS)
def test_each_number_in_a_graph_of_each_backend(
    cold, inputs, expected, choices, name, backend, fullgraph
):
    for value in NUMBERS[name]:
        for call in doors(inputs, choices, PLAIN | {name: value}):
            torch._dynamo.reset()
            compiled = torch.compile(call, backend=backend, fullgraph=fullgraph)
            np.testing.assert_array_equal(bits(compiled()), expected)


def doors(inputs: Any, choices: Any, numbers: dict[str, Any]) -> list[Any]:
    """Calls of a handle and of `torch_moe` with these numbers."""
    made = {name: numbers[name] for name in ("expected_rows", "swiglu_limit") if name in numbers}
    handle = TorchMoE(inputs.weights, config=CONFIG, **made)
    x = inputs.hidden_states, inputs.hidden_states_scale
    offset, factor = (numbers[name] for name in PLAIN)
    live, num_experts = numbers.get("num_tokens"), numbers.get("num_experts")
    if num_experts is not None:
        return [lambda: handle.routed(*x, *choices, offset, num_experts=num_experts)]
    return [
        lambda: handle.routed(*x, *choices, offset, num_experts=8, num_tokens=live),
        lambda: handle(*token_arguments(inputs), offset, factor, num_tokens=live),
        lambda: torch_moe(
            *array_arguments(inputs), offset, factor, num_tokens=live, config=CONFIG, **made
        ),
    ]


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_a_graph_reads_such_a_number_at_each_call(cold, inputs, kind):
    function = lambda factor, *x: torch_moe(*x, 0, factor, config=CONFIG)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for factor in (2.5, 1.5, 3.0):
        found = compiled(kind(factor), *array_arguments(inputs))
        np.testing.assert_array_equal(bits(found), bits(function(factor, *array_arguments(inputs))))
    with pytest.raises(ValueError, match=r"^routed_scaling_factor: expected a finite"):
        compiled(kind(np.inf), *array_arguments(inputs))


class Scaled(torch.nn.Module):
    """A layer whose factor is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.5))

    def forward(self, *tensors: Any) -> torch.Tensor:
        return torch_moe(*tensors, 0, self.factor, config=CONFIG)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_factor_that_is_a_buffer_is_exported(cold, inputs, expected, strict):
    program = torch.export.export(Scaled(), array_arguments(inputs), strict=strict).module()
    np.testing.assert_array_equal(bits(program(*array_arguments(inputs))), expected)
    program.factor.zero_()
    assert not program(*array_arguments(inputs)).any()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("routed_scaling_factor", jnp.float32(2.5), "a real number, of Python or NumPy in a graph"),
        ("routed_scaling_factor", torch.tensor(2.5, device="meta"), "a number, got a tensor on"),
        ("expected_rows", torch.tensor(3.0), r"a real number, got a torch\.Tensor"),
        ("num_tokens", torch.tensor([4]), r"a scalar, got int64 \[1\]"),
    ],
)
def test_a_number_that_one_graph_cannot_hold_is_named(cold, inputs, name, value, message):
    options = PLAIN | {"config": CONFIG, name: value}
    compiled = torch.compile(lambda *x: torch_moe(*x, **options), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{name}: expected {message}"):
        compiled(*array_arguments(inputs))


SCALARS = {
    "local_expert_offset": 0,
    "routed_scaling_factor": 2.5,
    "num_tokens": 4,
    "num_experts": 8,
    "expected_rows": 3.0,
    "swiglu_limit": 7.0,
    "batch_invariant": False,
}
ARRAYS = {"numpy": np.array, "jax": jnp.array, "torch": torch.tensor, "scalar": np.asarray}


@pytest.mark.parametrize("kind", [*ARRAYS, "one element"])
@pytest.mark.parametrize("name", SCALARS)
def test_a_handle_takes_the_numbers_that_a_function_takes(inputs, choices, name, kind):
    """And refuses the others with the same words."""
    number = np.array([SCALARS[name]]) if kind == "one element" else ARRAYS[kind](SCALARS[name])
    number = number[()] if kind == "scalar" else number
    options = SCALARS | {name: number}
    offset, factor, live, num_experts = (options.pop(n) for n in list(SCALARS)[:4])
    x = inputs.hidden_states, inputs.hidden_states_scale
    made = lambda: TorchMoE(inputs.weights, config=CONFIG, **options)  # noqa: E731
    after = {"num_experts": num_experts, "num_tokens": live}
    pairs = [
        (
            lambda: routed(
                *x, *inputs.weights, *choices, offset, **after, **options, scale_format="ue8m0"
            ),
            lambda: made().routed(*x, *choices, offset, **after),
        ),
        (
            lambda: torch_moe(
                *array_arguments(inputs), offset, factor, num_tokens=live, config=CONFIG, **options
            ),
            lambda: made()(*token_arguments(inputs), offset, factor, num_tokens=live),
        ),
    ]
    for by_function, by_handle in pairs:
        found = outcome(by_handle)
        assert found == outcome(by_function)
        assert isinstance(found, bytes) or f"{name}: expected " in found


def outcome(call: Any) -> bytes | str:
    """The bits of a result, or the words of a refusal."""
    try:
        return bits(call()).tobytes()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
def test_both_zeros_are_factors_of_their_own(inputs, kind):
    """They are equal, and keys of a cache."""
    config = MoEConfig(top_k=2)
    both = [inputs._replace(routed_scaling_factor=kind(factor)) for factor in (0.0, -0.0)]
    expected = [bits(torch_moe(*one.arguments, config=config)) for one in both]
    assert not np.array_equal(*expected)
    for order in ((0, 1), (1, 0)):
        handle = TorchMoE(inputs.weights, config=config)
        for place in order:
            found = bits(handle(*handle_arguments(both[place])))
            np.testing.assert_array_equal(found, expected[place])
