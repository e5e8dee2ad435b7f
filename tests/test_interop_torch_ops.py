"""The layer under `torch.compile`, `torch.export`, fake tensors and tracers: a custom operator."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import jax_moe  # noqa: E402
from interop import TorchMoE, to_jax, to_torch, torch_call, torch_moe, torch_ops  # noqa: E402
from interop import torch_moe_routed as routed  # noqa: E402
from jax_moe import ExpertWeights, MoEConfig  # noqa: E402
from tests.moe_inputs import array_arguments, replaced, token_arguments  # noqa: E402
from tests.torch_inputs import bits, torch_inputs  # noqa: E402

CONFIG = MoEConfig(top_k=2, swiglu_limit=7.0, scale_format="ue8m0")
OPERATORS = torch.ops.jax_moe


@pytest.fixture(scope="module")
def inputs():
    return torch_inputs(
        4, num_experts=8, num_local_experts=8, hidden_size=128, intermediate_size=128, offset=0
    )


@pytest.fixture(scope="module")
def weights(inputs):
    return inputs.weights


@pytest.fixture(scope="module")
def handle(weights):
    return TorchMoE(weights, config=CONFIG)


@pytest.fixture(scope="module")
def expected(inputs):
    return bits(torch_moe(*inputs.arguments, config=CONFIG))


@pytest.fixture(scope="module")
def choices(inputs):
    chosen = jax_moe.route(
        *map(to_jax, (inputs.routing_logits, inputs.routing_bias)),
        2.5,
        config=CONFIG,
        backend="xla",
    )
    return [to_torch(array) for array in chosen]


@pytest.fixture
def cold():
    """Nothing is traced yet, by JAX or by Dynamo: it must not walk into JAX's tracing."""
    torch._dynamo.reset()
    torch_call._compiled.cache_clear()


def plain(*tensors: Any) -> torch.Tensor:
    return torch_moe(*tensors, 0, 2.5, config=CONFIG)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_cold_as_one_graph(cold, inputs, expected, backend):
    compiled = torch.compile(plain, backend=backend, fullgraph=True)
    np.testing.assert_array_equal(bits(compiled(*array_arguments(inputs))), expected)


def test_a_handle_compiles_cold_as_one_graph(cold, inputs, expected, handle):
    compiled = torch.compile(
        lambda *tensors: handle(*tensors, 0, 2.5), backend="aot_eager", fullgraph=True
    )
    np.testing.assert_array_equal(bits(compiled(*token_arguments(inputs))), expected)


def test_the_routed_form_compiles_cold_as_one_graph(cold, inputs, expected, handle, choices):
    function = lambda *tensors: handle.routed(*tensors, 0, num_experts=8)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    np.testing.assert_array_equal(
        bits(compiled(inputs.hidden_states, inputs.hidden_states_scale, *choices)), expected
    )


def test_precision_is_kept_in_a_graph(cold, inputs, weights, expected, choices):
    handle = TorchMoE(weights, config=CONFIG, precision="high", batch_invariant=True)
    x = inputs.hidden_states, inputs.hidden_states_scale
    whole = handle(*token_arguments(inputs), 0, 2.5)
    routed = handle.routed(*x, *choices, 0, num_experts=8)
    assert (bits(whole) != expected).any()
    found = torch.compile(lambda *a: handle(*a, 0, 2.5), backend="eager", fullgraph=True)(
        *token_arguments(inputs)
    )
    np.testing.assert_array_equal(bits(found), bits(whole))
    function = lambda *a: handle.routed(*a, 0, num_experts=8)  # noqa: E731
    found = torch.compile(function, backend="eager", fullgraph=True)(*x, *choices)
    np.testing.assert_array_equal(bits(found), bits(routed))


def test_a_destination_is_written_to_in_a_graph(cold, inputs, expected):
    def write(out: torch.Tensor, *tensors: Any) -> torch.Tensor:
        return torch_moe(*tensors, 0, 2.5, config=CONFIG, out=out)

    out = torch.zeros(4, 128, dtype=torch.bfloat16)
    compiled = torch.compile(write, backend="aot_eager", fullgraph=True)
    assert compiled(out, *array_arguments(inputs)) is out
    np.testing.assert_array_equal(bits(out), expected)


def test_numbers_may_change_between_calls_of_a_graph(cold, inputs, handle):
    function = lambda offset, live, *x: handle(*x, offset, 2.5, num_tokens=live)  # noqa: E731
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for live in (4, 1, 3):
        found = compiled(0, live, *token_arguments(inputs))
        np.testing.assert_array_equal(
            bits(found), bits(function(0, live, *token_arguments(inputs)))
        )
    with pytest.raises(ValueError, match=r"num_tokens: expected 0\.\.4, got 5"):
        compiled(0, 5, *token_arguments(inputs))


def test_what_is_refused_eagerly_is_refused_in_a_graph(cold, inputs):
    with pytest.raises(TypeError, match="num_tokens: expected an integer, got True"):
        torch.compile(
            lambda *x: torch_moe(*x, 0, 2.5, config=CONFIG, num_tokens=True), backend="eager"
        )(*array_arguments(inputs))
    short = array_arguments(replaced(inputs, gemm2_weights=inputs.weights.gemm2_weights[:3]))
    with pytest.raises(ValueError, match=r"^gemm2_weights: .*\(E_local = 8 from gemm1_weights\)"):
        torch.compile(plain, backend="eager")(*short)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("expected_rows", True, "expected_rows: expected a real number, got True"),
        ("swiglu_limit", True, "swiglu_limit: expected a number or None, got True"),
        ("num_experts", True, "num_experts: expected an integer, got True"),
        ("num_experts", "8", "num_experts: expected an integer, got '8'"),
        ("num_tokens", torch.ones(1, dtype=torch.int32), r"num_tokens: expected a scalar, got"),
        ("precision", None, r"precision: expected one of \('fast', 'high'\), got None"),
        ("backend", 1, "backend: expected one of 'auto', 'mosaic', 'triton', 'xla', got 1"),
    ],
)
def test_options_are_checked_in_a_graph_as_eagerly(cold, inputs, choices, option, value, message):
    x = inputs.hidden_states, inputs.hidden_states_scale
    function = lambda *a: routed(  # noqa: E731
        *x, *inputs.weights, *a, 0, **{"num_experts": 8, option: value}
    )
    for call in (function, torch.compile(function, backend="eager")):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call(*choices)
    with FlopCounterMode(display=False), pytest.raises((TypeError, ValueError)) as refused:
        function(*choices)
    assert str(refused.value).startswith(f"{option}: expected ")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(4, 128), "out: expected bfloat16"),
        (torch.zeros(2, 4, 128, dtype=torch.bfloat16), "out: expected bfloat16"),
        (torch.zeros(4, 128, dtype=torch.bfloat16, requires_grad=True), "out: requires grad"),
    ],
)
def test_a_destination_is_checked_in_a_graph_as_eagerly(cold, inputs, out, message):
    function = lambda *x: torch_moe(*x, 0, 2.5, config=CONFIG, out=out)  # noqa: E731
    for call in (function, torch.compile(function, backend="eager")):
        with pytest.raises((TypeError, ValueError), match=message):
            call(*array_arguments(inputs))
    assert not out.any()


def test_gradients_are_refused(cold, inputs, expected):
    scale = inputs.weights.gemm1_weights_scale.clone().requires_grad_()
    learnt = array_arguments(replaced(inputs, gemm1_weights_scale=scale))
    compiled = torch.compile(plain, backend="aot_eager")
    for function in (plain, compiled):
        with pytest.raises(ValueError, match=r"^gemm1_weights_scale: requires grad"):
            function(*learnt)
    with torch.no_grad():
        np.testing.assert_array_equal(bits(compiled(*learnt)), expected)
    out = OPERATORS.moe(*learnt, 0, 2.5, **static())
    with pytest.raises(NotImplementedError, match="jax_moe is forward only"):
        out.float().sum().backward()


class Layer(torch.nn.Module):
    """A layer of a model that holds a handle."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__()
        self.experts = TorchMoE(weights, config=CONFIG)

    def forward(self, *tensors: Any) -> torch.Tensor:
        return self.experts(*tensors, 0, 2.5)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exported_for_any_number_of_tokens(cold, inputs, weights, expected, strict):
    tokens = torch.export.Dim("T", min=1, max=64)
    shapes = ({0: tokens}, None, {0: tokens}, {1: tokens})
    program = torch.export.export(
        Layer(weights), token_arguments(inputs), dynamic_shapes=(shapes,), strict=strict
    )
    assert "jax_moe.moe.default" in program.graph_module.code
    np.testing.assert_array_equal(bits(program.module()(*token_arguments(inputs))), expected)
    fewer = (
        inputs.routing_logits[:3],
        inputs.routing_bias,
        inputs.hidden_states[:3],
        inputs.hidden_states_scale[:, :3].contiguous(),
    )
    np.testing.assert_array_equal(bits(program.module()(*fewer)), bits(Layer(weights)(*fewer)))


def static() -> dict[str, Any]:
    """The operator's keywords."""
    fields = dataclasses.asdict(CONFIG) | {"backend": "auto"}
    del fields["block_size"]
    return fields | {"num_tokens": None, "expected_rows": None}


def test_the_operator_takes_every_field_of_the_configuration():
    """A field that it does not take would be lost in a graph."""
    arguments = {argument.name for argument in OPERATORS.moe.default._schema.arguments}
    assert static().keys() <= arguments
    given = set(torch_call.Options._fields) - {"config", "num_experts"}
    assert given <= arguments
    assert given <= {argument.name for argument in OPERATORS.moe_routed.default._schema.arguments}


def test_torch_checks_of_the_operators(inputs, choices):
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        OPERATORS.moe.default, (*array_arguments(inputs), 0, 2.5), static(), test_utils=checks
    )
    keywords = {
        name: value
        for name, value in static().items()
        if name in ("backend", "num_tokens", "expected_rows", "swiglu_limit", "scale_format")
    }
    torch.library.opcheck(
        OPERATORS.moe_routed.default,
        (inputs.hidden_states, inputs.hidden_states_scale, *inputs.weights, *choices, 0),
        keywords | {"num_experts": 8},
        test_utils=checks,
    )


def test_no_cuda_graph_of_torch_takes_them():
    for operator in (OPERATORS.moe.default, OPERATORS.moe_routed.default):
        assert torch.Tag.cudagraph_unsafe in operator.tags


def test_fake_tensors_give_fake_results(inputs, handle, choices):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(tensor) for tensor in array_arguments(inputs)]
    ids, weights = (mode.from_tensor(tensor) for tensor in choices)
    with mode:
        found = [plain(*fakes), handle(*fakes[:4], 0, 2.5)]
        found.append(routed(*fakes[2:], ids, weights, 0, num_experts=8))
    found.append(plain(*fakes))  # outside of their mode as well
    for result in found:
        assert result.fake_mode is mode
        assert (result.shape, result.dtype) == ((4, 128), torch.bfloat16)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_tracers_record_the_call(inputs, expected):
    """And no constant result."""
    graph = make_fx(plain)(*array_arguments(inputs))
    assert "jax_moe.moe.default" in graph.code
    np.testing.assert_array_equal(bits(graph(*array_arguments(inputs))), expected)
    backwards = (
        inputs.routing_logits.flip(0),
        inputs.routing_bias,
        inputs.hidden_states.view(torch.uint8).flip(0).view(torch.float8_e4m3fn),
        inputs.hidden_states_scale.flip(1),
    )
    traced = torch.jit.trace(lambda *x: plain(*x, *inputs.weights), token_arguments(inputs))
    np.testing.assert_array_equal(
        bits(traced(*backwards)), bits(plain(*backwards, *inputs.weights))
    )


def test_a_mode_of_torch_sees_the_call(inputs, expected):
    with FlopCounterMode(display=False):
        np.testing.assert_array_equal(bits(plain(*array_arguments(inputs))), expected)


def test_eager_calls_take_the_short_way(inputs, handle, choices, monkeypatch):
    monkeypatch.setattr(torch_ops, "call", lambda *_: pytest.fail("dispatched"))
    plain(*array_arguments(inputs))
    handle(*token_arguments(inputs), 0, 2.5)
    handle.routed(inputs.hidden_states, inputs.hidden_states_scale, *choices, 0, num_experts=8)
    with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"):
        plain(*array_arguments(inputs))
