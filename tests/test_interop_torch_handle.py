"""`TorchMoE`: what it checks when made, what it keeps, copies of it; and the routed form."""

from __future__ import annotations

import copy
import io
import pathlib
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

import jax_moe  # noqa: E402
from interop import TorchMoE, to_jax, to_torch, torch_moe, torch_moe_routed  # noqa: E402
from jax_moe import ExpertWeights  # noqa: E402
from tests.moe_inputs import (  # noqa: E402
    TOKEN_ARGUMENTS,
    handle_arguments,
    named_arguments,
    replaced,
    scalar_arguments,
    token_arguments,
)
from tests.torch_inputs import bits, relative_error, torch_inputs  # noqa: E402


@pytest.fixture(scope="module")
def inputs():
    return torch_inputs(20)


@pytest.fixture(scope="module")
def handle(inputs):
    return TorchMoE(inputs.weights)


@pytest.fixture(scope="module")
def expected(inputs):
    return torch_moe(*inputs.arguments)


BAD_WEIGHTS = {
    "swapped": (lambda w: (w[2], w[3], w[0], w[1]), ValueError, "gemm2_weights: expected float8"),
    "bf16": (
        lambda w: (w[0].bfloat16(), *w[1:]),
        TypeError,
        r"gemm1_weights: .* got torch\.bfloat16",
    ),
    "short": (lambda w: (*w[:2], w[2][:3], w[3]), ValueError, r"gemm2_weights: .*\(E_local = 8"),
    "transposed": (
        lambda w: (*w[:2], w[2].mT, w[3]),
        ValueError,
        r"gemm2_weights: .* got float8_e4m3fn \[8, 128, 256\]",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_a_handle_checks_its_weights_when_it_is_made(inputs, change, error, message):
    with pytest.raises(error, match=message):
        TorchMoE(ExpertWeights(*change(inputs.weights)))


def test_a_handle_checks_its_options_when_it_is_made(inputs):
    weights = inputs.weights
    for wrong in (None, tuple(weights)):
        kind = "None" if wrong is None else "tuple"
        with pytest.raises(TypeError, match=rf"weights: .* jax_moe\.ExpertWeights .* got {kind}"):
            TorchMoE(wrong)
    with pytest.raises(NotImplementedError, match=r"backend='mosaic': .* \(got: cpu\)"):
        TorchMoE(weights, backend="mosaic")
    with pytest.raises(ValueError, match="backend: expected one of 'auto'"):
        TorchMoE(weights, backend=["xla"])
    with pytest.raises(TypeError, match=r"config: expected a jax_moe\.MoEConfig, got dict"):
        TorchMoE(weights, config={})
    with pytest.raises(ValueError, match="expected_rows: expected a positive number"):
        TorchMoE(weights, expected_rows=0)


def test_a_handle_keeps_the_storages_of_its_weights(inputs, expected):
    """A weight that is given other data leaves the handle as it was made."""
    weights = ExpertWeights(*[tensor.clone() for tensor in inputs.weights])
    handle = TorchMoE(weights)
    for weight in weights:
        size, weight.data = weight.nbytes, torch.empty(0, dtype=weight.dtype)
        torch.full((size,), 0xFF, dtype=torch.uint8)  # NaNs, where freed memory would be taken
    np.testing.assert_array_equal(bits(handle(*handle_arguments(inputs))), bits(expected))


def test_parameters_where_grad_mode_is_off(inputs, expected):
    weights = ExpertWeights(*(torch.nn.Parameter(t, requires_grad=True) for t in inputs.weights))
    with pytest.raises(ValueError, match="gemm1_weights: requires grad"):
        TorchMoE(weights)
    with torch.inference_mode():
        result = TorchMoE(weights)(*handle_arguments(inputs))
        np.testing.assert_array_equal(bits(result), bits(expected))
        np.testing.assert_array_equal(
            bits(torch_moe(*token_arguments(inputs), *weights, *scalar_arguments(inputs))),
            bits(expected),
        )


class Model(torch.nn.Module):
    """A model whose buffers are what its handle reads."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__()
        for name, tensor in weights._asdict().items():
            self.register_buffer(name, tensor)
        self.experts = TorchMoE(weights)

    def forward(self, *arguments: Any) -> torch.Tensor:
        return self.experts(*arguments)


@pytest.fixture
def model(inputs):
    return Model(ExpertWeights(*(tensor.clone() for tensor in inputs.weights)))


def test_a_module_with_a_handle_can_be_copied(model, inputs, expected):
    changing = handle_arguments(inputs)
    again = copy.deepcopy(model)
    np.testing.assert_array_equal(bits(again(*changing)), bits(expected))
    with torch.no_grad():
        again.gemm1_weights_scale.mul_(2)  # its own buffer, which its own handle reads
    assert not torch.equal(again(*changing), expected)
    np.testing.assert_array_equal(bits(model(*changing)), bits(expected))


def test_a_module_with_a_handle_can_be_saved(model):
    """By the protocol that copies it, and with each weight once: buffer and handle share it."""
    file = io.BytesIO()
    torch.save(model, file)
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert nbytes <= len(file.getvalue()) < 1.5 * nbytes


PICKLED = """
import io
import pickle

import torch

from interop import TorchMoE
from tests.moe_inputs import handle_arguments
from tests.test_interop_torch_handle import Model
from tests.torch_inputs import torch_inputs

inputs = torch_inputs(20)
arguments = handle_arguments(inputs)
handle = TorchMoE(inputs.weights, backend="xla")
expected = handle(*arguments)
holder = torch.nn.Linear(2, 2)  # a module whose own tensors are not float8
holder.experts = handle
for protocol in (2, pickle.DEFAULT_PROTOCOL):
    again, held = pickle.loads(pickle.dumps((handle, holder), protocol))
    assert held.experts is again
    assert again._options == handle._options
    assert torch.equal(again(*arguments), expected)
    for found, kept in zip(again._tensors, inputs.weights):
        assert (found.dtype, found.device) == (kept.dtype, kept.device)
        assert torch.equal(found.view(torch.uint8), kept.view(torch.uint8))
file = io.BytesIO()
torch.save(Model(inputs.weights), file)
file.seek(0)
model = torch.load(file, weights_only=False)
assert torch.equal(model(*arguments), expected)
model.gemm1_weights.view(torch.uint8).zero_()  # its own buffer, which its own handle reads
assert not model(*arguments).any()
print("as it was")
"""


def test_a_handle_is_pickled_and_loaded_again():
    """In a process of its own: nothing in the tree itself loads a pickle."""
    root = pathlib.Path(__file__).parent.parent
    command = [sys.executable, "-c", PICKLED]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.stdout == "as it was\n", done.stderr


def test_a_copied_handle_keeps_its_options(inputs):
    config = jax_moe.MoEConfig(top_k=4, scoring="softmax", swiglu_limit=0.5)
    weights = inputs.weights
    handle = TorchMoE(weights, config=config, backend="xla", expected_rows=3.0)
    again = copy.deepcopy(handle)
    assert again._options == handle._options
    changing = handle_arguments(inputs)
    np.testing.assert_array_equal(bits(again(*changing)), bits(handle(*changing)))


def test_the_state_of_a_module_with_a_handle(model, inputs, expected):
    """The handle is no part of it; loading writes to the buffers, which the handle reads."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(state) == set(ExpertWeights._fields)
    changing = handle_arguments(inputs)
    with torch.no_grad():
        model.gemm1_weights_scale.zero_()
    assert not model(*changing).any()
    model.load_state_dict(state)
    np.testing.assert_array_equal(bits(model(*changing)), bits(expected))


def test_a_copy_of_weights_that_could_not_be_shared(inputs, expected):
    strided = [tensor.repeat_interleave(2, dim=0)[::2] for tensor in inputs.weights]
    again = copy.deepcopy(TorchMoE(ExpertWeights(*strided)))
    np.testing.assert_array_equal(bits(again(*handle_arguments(inputs))), bits(expected))


def test_gate_first_weights_of_torch(inputs, expected):
    """`from_gate_up` swaps the halves of float8 and float32 tensors, and keeps every bit."""
    up_first = inputs.weights
    gate_first = [
        torch.cat(tuple(t.view(torch.uint8).chunk(2, dim=1))[::-1], dim=1) for t in up_first[:2]
    ]
    gate_first = [t.view(like.dtype) for t, like in zip(gate_first, up_first, strict=False)]
    before = [bits(t).copy() for t in gate_first]
    weights = ExpertWeights.from_gate_up(*gate_first, *up_first[2:])
    for found, wanted in zip(weights, up_first, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(bits(found), bits(wanted))
    assert weights.gemm2_weights is up_first.gemm2_weights
    for tensor, kept in zip(gate_first, before, strict=True):
        np.testing.assert_array_equal(bits(tensor), kept)
    result = TorchMoE(weights)(*handle_arguments(inputs))
    np.testing.assert_array_equal(bits(result), bits(expected))
    with pytest.raises(ValueError, match=r"gate_up_weights: expected \[E_local, 2\*n, m\]"):
        ExpertWeights.from_gate_up(gate_first[0][0], *gate_first[1:], *up_first[2:])


ROUTED = {"num_experts": 64}


@pytest.fixture(scope="module")
def choices(inputs):
    logits, bias = (to_jax(tensor) for tensor in (inputs.routing_logits, inputs.routing_bias))
    return [to_torch(array) for array in jax_moe.route(logits, bias, 2.5, backend="xla")]


def test_routed(inputs, expected, handle, choices):
    """The router taken out, bit for bit the same."""
    x, offset = (inputs.hidden_states, inputs.hidden_states_scale), inputs.local_expert_offset
    result = torch_moe_routed(*x, *inputs.weights, *choices, offset, **ROUTED)
    np.testing.assert_array_equal(bits(result), bits(expected))
    np.testing.assert_array_equal(bits(handle.routed(*x, *choices, offset, **ROUTED)), bits(result))
    out = torch.zeros_like(result)
    assert handle.routed(*x, *choices, offset, **ROUTED, num_tokens=7, out=out) is out
    np.testing.assert_array_equal(bits(out[:7]), bits(expected[:7]))
    assert not out[7:].any()


def test_routed_by_a_router_of_torch(inputs, handle):
    """Softmax top-k, as in the docstring; float32 input against the oracle."""
    weights, ids = torch.topk(inputs.routing_logits.softmax(dim=1), 8)
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1))
    result = handle.routed(x, None, ids.int(), weights, 8, **ROUTED)
    arrays = [to_jax(tensor) for tensor in (*inputs.weights, ids.int(), weights)]
    oracle = jax_moe.reference_routed(to_jax(x), None, *arrays, 8, **ROUTED)
    assert relative_error(result, to_torch(oracle)) < 0.05


def test_bad_choices_are_named(inputs, handle, choices):
    x, (ids, weights) = (inputs.hidden_states, inputs.hidden_states_scale), choices
    for bad, error, said in (
        ((ids.long(), weights), TypeError, r"topk_ids: expected int32 .*, got torch\.int64"),
        ((ids, weights.half()), TypeError, r"topk_weights: expected float32 \[T, k\]"),
        ((ids[:3], weights), ValueError, "topk_ids: expected int32"),
        ((None, weights), TypeError, r"topk_ids: expected a torch\.Tensor, got NoneType"),
    ):
        with pytest.raises(error, match=said):
            handle.routed(*x, *bad, 8, **ROUTED)
        with pytest.raises(error, match=said):
            torch_moe_routed(*x, *inputs.weights, *bad, 8, **ROUTED)
    with pytest.raises(TypeError, match="num_experts: expected an integer, got None"):
        handle.routed(*x, *choices, 8, num_experts=None)
    with pytest.raises(ValueError, match=r"local_expert_offset: expected 0\.\.56, got 57"):
        handle.routed(*x, *choices, 57, **ROUTED)


def test_precision_and_batch_invariance_reach_the_layer(inputs, monkeypatch):
    """By function, by handle and after a router of one's own; what they call is looked at."""
    seen = []

    def layer(*_, precision, batch_invariant, **__):
        seen.append((precision, batch_invariant))
        return jnp.zeros((20, 256), jnp.bfloat16)

    for name in ("apply", "apply_routed"):
        monkeypatch.setattr(jax_moe, name, layer)
    # Rows of no other test: nothing is compiled for them yet.
    options = {"precision": "high", "batch_invariant": True, "expected_rows": 3.25}
    handle = TorchMoE(inputs.weights, **options)
    x = inputs.hidden_states, inputs.hidden_states_scale
    routing = torch.zeros(20, 1, dtype=torch.int32), torch.ones(20, 1)
    handle(*token_arguments(inputs), *scalar_arguments(inputs))
    handle.routed(*x, *routing, 0, num_experts=8)
    assert copy.deepcopy(handle)._options == handle._options
    options["expected_rows"] = 3.5
    torch_moe(*inputs.arguments, **options)
    torch_moe_routed(*x, *inputs.weights, *routing, 0, num_experts=8, **options)
    assert seen == [("high", True)] * 4
    with pytest.raises(ValueError, match=r"precision: expected one of .*got 'best'"):
        TorchMoE(inputs.weights, precision="best")
    with pytest.raises(TypeError, match=r"batch_invariant: expected a bool, got 'yes' \(str\)"):
        TorchMoE(inputs.weights, batch_invariant="yes")


def test_options_that_equal_accepted_ones_are_still_checked(inputs):
    """What passed is kept by types: 1 equals True, and an array cannot be looked up."""
    for accepted, refused in [
        ({"batch_invariant": False}, {"batch_invariant": 0}),
        ({"expected_rows": 1.0}, {"expected_rows": True}),
        ({"expected_rows": 1.0}, {"expected_rows": np.ones(1)}),
        ({"expected_rows": 1.0}, {"expected_rows": np.timedelta64(1, "s")}),
    ]:
        TorchMoE(inputs.weights, **accepted)
        (name,) = refused
        with pytest.raises(TypeError, match=f"^{name}: expected a"):
            TorchMoE(inputs.weights, **refused)


def test_options_reach_the_layer(inputs):
    """A softmax router on bf16 logits without a bias, with clamp and power-of-two scales."""
    config = jax_moe.MoEConfig(
        top_k=4, scoring="softmax", renormalize=False, swiglu_limit=0.5, scale_format="ue8m0"
    )
    logits = inputs.routing_logits.bfloat16()
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1))
    arguments = (logits, None, x, None)
    result = TorchMoE(inputs.weights, config=config)(*arguments, 8, 1.0)
    arrays = [to_jax(tensor) for tensor in inputs.weights]
    expected = jax_moe.apply(
        to_jax(logits), None, to_jax(x), None, *arrays, 8, 1.0, config=config, backend="xla"
    )
    np.testing.assert_array_equal(bits(result), bits(to_torch(expected)))
    same = torch_moe(*arguments, *inputs.weights, 8, 1.0, config=config, expected_rows=3.0)
    assert relative_error(same, result) < 1e-2
    plain = jax_moe.MoEConfig(top_k=4, scoring="softmax", renormalize=False)
    called = {"config": plain, "swiglu_limit": 0.5, "scale_format": "ue8m0"}
    again = torch_moe(*arguments, *inputs.weights, 8, 1.0, **called)
    np.testing.assert_array_equal(bits(again), bits(result))
    with pytest.raises(ValueError, match=r"swiglu_limit: expected None or 0\.5, as in config"):
        TorchMoE(inputs.weights, config=config, swiglu_limit=7.0)


def test_numbers_cross_a_transfer_guard(inputs, handle, expected):
    weights, (offset, factor) = inputs.weights, scalar_arguments(inputs)
    tokens = inputs.hidden_states, inputs.hidden_states_scale
    router = inputs.routing_logits, inputs.routing_bias
    routing = jax_moe.route(*map(to_jax, router), factor)
    choices = [to_torch(array) for array in routing]
    out = torch.empty_like(expected)
    with jax.transfer_guard("disallow"):
        results = (
            torch_moe(*inputs.arguments),
            torch_moe(*inputs.arguments, out=out),
            torch_moe_routed(*tokens, *weights, *choices, offset, num_experts=256),
            handle(*handle_arguments(inputs)),
            TorchMoE(weights).routed(*tokens, *choices, offset, num_experts=256),
        )
    for result in results:
        np.testing.assert_array_equal(bits(result), bits(expected))


@pytest.mark.parametrize("transform", [jax.vmap, jax.grad])
def test_a_call_that_does_not_depend_on_what_jax_maps(inputs, handle, expected, transform):
    def call(x):
        np.testing.assert_array_equal(bits(handle(*handle_arguments(inputs))), bits(expected))
        with pytest.raises(RuntimeError, match=r"^routed_scaling_factor: .* that JAX traces"):
            handle(*handle_arguments(inputs)[:-1], x)
        return x

    transform(call)(np.ones(2, np.float32) if transform is jax.vmap else 1.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, in make_dual
@pytest.mark.parametrize("name", [*TOKEN_ARGUMENTS, *ExpertWeights._fields])
def test_dual_and_lazy_tensors_are_named(inputs, handle, name):
    tensor = named_arguments(inputs)[name]
    with forward_ad.dual_level():
        bad = [torch.nn.parameter.UninitializedBuffer(dtype=tensor.dtype)]
        if tensor.dtype == torch.float32:
            bad.append(forward_ad.make_dual(tensor, torch.ones_like(tensor)))
        for value in bad:
            given = replaced(inputs, **{name: value})
            with pytest.raises(ValueError, match=rf"^{name}: expected a tensor with"):
                torch_moe(*given.arguments)
            with pytest.raises(ValueError, match=rf"^{name}: expected a tensor with"):  # noqa: PT012
                used = TorchMoE(given.weights) if name in ExpertWeights._fields else handle
                used(*handle_arguments(given))
