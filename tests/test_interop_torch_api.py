"""`torch_moe` and `TorchMoE` on a CPU: values, styles of passing, bad input, nothing kept."""

from __future__ import annotations

import gc
import time

import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402

import interop  # noqa: E402
import jax_moe  # noqa: E402
from interop import (  # noqa: E402
    TorchMoE,
    host_time,
    to_jax,
    to_torch,
    torch_moe,
    torch_moe_routed,
)
from interop.torch_call import _compiled  # noqa: E402
from jax_moe import ExpertWeights, memory  # noqa: E402
from tests import moe_inputs  # noqa: E402
from tests.moe_inputs import (  # noqa: E402
    array_arguments,
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
def expected(inputs):
    arrays = [to_jax(tensor) for tensor in array_arguments(inputs)]
    return to_torch(jax_moe.apply(*arrays, *scalar_arguments(inputs), backend="xla"))


@pytest.fixture(scope="module")
def handle(inputs):
    return TorchMoE(inputs.weights)


def test_value_returning(inputs, expected):
    result = torch_moe(*inputs.arguments)
    assert result.dtype == torch.bfloat16
    np.testing.assert_array_equal(bits(result), bits(expected))


def test_destination_passing(inputs, expected):
    out = torch.full((20, 256), float("nan"), dtype=torch.bfloat16)
    assert torch_moe(*inputs.arguments, out=out) is out
    np.testing.assert_array_equal(bits(out), bits(expected))
    wide = torch.zeros(20, 512, dtype=torch.bfloat16)
    torch_moe(*inputs.arguments, out=wide[:, ::2])
    np.testing.assert_array_equal(bits(wide[:, ::2]), bits(expected))
    assert not wide[:, 1::2].any()


def test_handle_equals_function(inputs, expected, handle):
    for _ in range(2):
        np.testing.assert_array_equal(bits(handle(*handle_arguments(inputs))), bits(expected))


def test_handle_follows_its_scalars(inputs, handle):
    once = handle(*token_arguments(inputs), 8, 2.5)
    twice = handle(*token_arguments(inputs), 8, 5.0)
    assert relative_error(twice.float(), 2 * once.float()) < 0.01
    elsewhere = handle(*token_arguments(inputs), 16, 2.5)
    expected = torch_moe(*array_arguments(inputs), 16, 2.5)
    np.testing.assert_array_equal(bits(elsewhere), bits(expected))
    assert not torch.equal(elsewhere, once)


def test_a_scalar_tensor_is_read_at_every_call(inputs, handle):
    offset, factor = torch.tensor(8), torch.tensor(2.5)
    once = handle(*token_arguments(inputs), offset, factor)
    offset.fill_(16)
    factor.fill_(5.0)
    expected = handle(*token_arguments(inputs), 16, 5.0)
    np.testing.assert_array_equal(
        bits(handle(*token_arguments(inputs), offset, factor)), bits(expected)
    )
    assert not torch.equal(once, expected)


def test_nothing_is_kept_between_calls(inputs):
    """The same memory with other values gives another result."""
    scale = inputs.weights.gemm1_weights_scale.clone()
    arguments = replaced(inputs, gemm1_weights_scale=scale).arguments
    first = torch_moe(*arguments).clone()
    scale.mul_(0.5)  # in place
    second = torch_moe(*arguments)
    assert not torch.equal(first, second)
    scale.mul_(2.0)
    np.testing.assert_array_equal(bits(torch_moe(*arguments)), bits(first))


def test_a_call_that_cannot_fit_is_refused_before_it_is_launched(inputs, handle, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "LEAST_ASKED", 0)
    monkeypatch.setattr(memory, "available_bytes", lambda device: asked.append(device) or 1000)
    monkeypatch.setattr(jax_moe, "apply", lambda *_, **__: pytest.fail("launched"))
    _compiled.cache_clear()
    try:
        for call in (torch_moe, handle):
            arguments = inputs.arguments if call is torch_moe else handle_arguments(inputs)
            with pytest.raises(MemoryError, match=r"torch_moe: needs up to [\d,]+ bytes .* 1,000"):
                call(*arguments)
    finally:
        _compiled.cache_clear()
    assert len(asked) == 2


def test_small_calls_are_not_asked_about(inputs, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: pytest.fail("asked"))
    assert torch_moe(*inputs.arguments).isfinite().all()


def test_inputs_are_released(inputs):
    hidden_states = inputs.hidden_states.clone()
    watched = StorageWeakRef(hidden_states.untyped_storage())
    result = torch_moe(*inputs._replace(hidden_states=hidden_states).arguments)
    del hidden_states
    give_up = time.monotonic() + 20  # the layer may still be running, and reads it until it ends
    while not watched.expired() and time.monotonic() < give_up:
        gc.collect()
        time.sleep(0.01)
    assert watched.expired()
    assert result.isfinite().all()


def test_a_freed_weight_is_named(inputs):
    """FSDP frees a shard's storage and keeps its tensor."""
    freed = inputs.weights.gemm2_weights.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^gemm2_weights: .* got a null pointer"):
        torch_moe(*replaced(inputs, gemm2_weights=freed).arguments)


def freed_number():
    number = torch.zeros((), dtype=torch.int32)
    number.untyped_storage().resize_(0)
    return number


@pytest.mark.parametrize("name", ["local_expert_offset", "routed_scaling_factor"])
@pytest.mark.parametrize(
    ("made", "got"),
    [
        (freed_number, "a tensor with memory, got a null pointer"),
        (lambda: torch.zeros(3).to_sparse(), "a number, got a sparse tensor"),
        (
            lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged),
            "a number, got a nested tensor",
        ),
    ],
)
def test_a_number_that_is_no_plain_tensor_is_named(inputs, name, made, got):
    with pytest.raises(ValueError, match=f"^{name}: expected {got}"):
        torch_moe(*inputs._replace(**{name: made()}).arguments)


REQUIRED = ["routing_logits", "hidden_states", "hidden_states_scale", *ExpertWeights._fields]


@pytest.mark.parametrize("name", REQUIRED)
def test_none_is_named(inputs, handle, name):
    changed = replaced(inputs, **{name: None})
    why = ", as hidden_states is torch.float8_e4m3fn" if name.endswith("states_scale") else ""
    message = f"^{name}: expected a torch.Tensor{why}, got NoneType"
    with pytest.raises(TypeError, match=message):
        torch_moe(*changed.arguments)

    def with_handle() -> None:
        used = TorchMoE(changed.weights) if name in ExpertWeights._fields else handle
        used(*handle_arguments(changed))

    with pytest.raises(TypeError, match=message):
        with_handle()


def test_live_rows(inputs, expected, handle):
    for live in (7, 3, 7, 20):
        out = handle(*handle_arguments(inputs), num_tokens=live)
        np.testing.assert_array_equal(bits(out[:live]), bits(expected[:live]))
        assert not out[live:].any()


def test_unquantized_activations(inputs):
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    result = torch_moe(*inputs._replace(hidden_states=x, hidden_states_scale=None).arguments)
    tokens = [to_jax(t) for t in (inputs.routing_logits, inputs.routing_bias, x)]
    weights = [to_jax(t) for t in inputs.weights]
    expected = jax_moe.reference(*tokens, None, *weights, *scalar_arguments(inputs))
    assert relative_error(result, to_torch(expected)) < 0.05


def test_no_tokens(handle):
    empty = torch_inputs(0)
    result = handle(*handle_arguments(empty))
    assert result.shape == (0, 256)
    assert result.dtype == torch.bfloat16
    assert torch_moe(*empty.arguments, out=result) is result


def test_strided_activations_are_copied_not_misread(inputs, expected):
    scale = inputs.hidden_states_scale.t().contiguous().t()
    assert not scale.is_contiguous()
    result = torch_moe(*inputs._replace(hidden_states_scale=scale).arguments)
    np.testing.assert_array_equal(bits(result), bits(expected))


BAD = {
    "gemm1_weights": (lambda t: t.float().numpy(), TypeError, "gemm1_weights: expected a"),
    "routing_bias": (lambda t: t.to("meta"), ValueError, "routing_bias: expected a tensor on"),
    "gemm2_weights": (
        lambda t: t.to(torch.float8_e5m2), TypeError, "gemm2_weights: .*, got torch.float8_e5m2"
    ),
    "hidden_states_scale": (
        lambda t: t.requires_grad_(), ValueError, "hidden_states_scale: requires grad"
    ),
    "hidden_states": (lambda t: t[:, :128], ValueError, "hidden_states"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_tensors_are_named(inputs, name):
    spoil, error, message = BAD[name]
    spoiled = replaced(inputs, **{name: spoil(named_arguments(inputs)[name].clone())})
    with pytest.raises(error, match=message):
        torch_moe(*spoiled.arguments)


WANTED = {
    "routing_logits": "float32 or bfloat16 or float16 [T, E]",
    "routing_bias": "bfloat16 or float32 [E]",
    "hidden_states": "float8_e4m3fn or bfloat16 or float16 or float32 [T, H]",
    "hidden_states_scale": "float32 [H/128, T]",
    "gemm1_weights": "float8_e4m3fn [E_local, 2*I, H]",
    "gemm1_weights_scale": "float32 [E_local, 2*I/128, H/128]",
    "gemm2_weights": "float8_e4m3fn [E_local, H, I]",
    "gemm2_weights_scale": "float32 [E_local, H/128, I/128]",
    "topk_ids": "int32 [T, k]",
    "topk_weights": "float32 [T, k]",
}


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64, torch.bool])
def test_wrong_dtypes_are_named(inputs, handle, name, dtype):
    """By one error in every call that takes the argument, whether or not such arrays can cross."""
    choices = {"topk_ids": torch.zeros(20, 2, dtype=torch.int32), "topk_weights": torch.ones(20, 2)}
    given = named_arguments(inputs) | choices
    given[name] = given[name].to(torch.float32).to(dtype)
    weights = ExpertWeights(*(given[field] for field in ExpertWeights._fields))
    x = given["hidden_states"], given["hidden_states_scale"]
    router = given["routing_logits"], given["routing_bias"]
    ours = given["topk_ids"], given["topk_weights"]
    calls = {
        lambda: torch_moe(*router, *x, *weights, 8, 2.5): "routing hidden gemm",
        lambda: torch_moe_routed(*x, *weights, *ours, 8, num_experts=64): "hidden gemm topk",
        lambda: TorchMoE(weights): "gemm",
        lambda: handle(*router, *x, 8, 2.5): "routing hidden",
        lambda: handle.routed(*x, *ours, 8, num_experts=64): "hidden topk",
    }
    group = "gemm" if name in ExpertWeights._fields else name.split("_")[0]
    shape = list(given[name].shape)
    for call in (call for call, takes in calls.items() if group in takes):
        with pytest.raises(TypeError) as raised:
            call()
        assert str(raised.value) == f"{name}: expected {WANTED[name]}, got {dtype} {shape}"


OFFSET, FACTOR = "local_expert_offset", "routed_scaling_factor"
SCALARS = [
    (OFFSET, -1, ValueError, r"local_expert_offset: expected 0\.\.56, got -1"),
    (OFFSET, 57, ValueError, r"local_expert_offset: expected 0\.\.56, got 57"),
    (OFFSET, 1.5, TypeError, "local_expert_offset: expected an integer"),
    (OFFSET, torch.tensor([8, 8]), ValueError, r"local_expert_offset: .* scalar, got int64 \[2\]"),
    (FACTOR, "high", TypeError, "routed_scaling_factor: expected a real number"),
    (FACTOR, torch.nn.UninitializedBuffer(), ValueError, "factor: expected a tensor with memory"),
    (FACTOR, torch.ones(2), ValueError, r"routed_scaling_factor: .* scalar, got float32 \[2\]"),
    (
        FACTOR,
        torch.tensor(2.5, requires_grad=True),
        ValueError,
        "routed_scaling_factor: requires grad",
    ),
    (OFFSET, torch.tensor(8.0), TypeError, "local_expert_offset: expected an integer, got 8.0"),
    (FACTOR, float("nan"), ValueError, "routed_scaling_factor: expected a finite float32, got nan"),
    (FACTOR, 1e39, ValueError, r"routed_scaling_factor: expected a finite float32, got 1e\+39"),
    pytest.param(
        FACTOR,
        10**5000,
        ValueError,
        "routed_scaling_factor: .* integer of 16610 bits",
        id="huge factor",
    ),
    pytest.param(
        OFFSET,
        10**5000,
        ValueError,
        "local_expert_offset: .* integer of 16610 bits",
        id="huge offset",
    ),
]
BOOLS = [True, np.True_, np.array(True), torch.tensor(True)]


@pytest.mark.parametrize(("name", "value", "error", "message"), SCALARS)
def test_bad_scalars_are_named(inputs, name, value, error, message):
    with pytest.raises(error, match=message):
        torch_moe(*inputs._replace(**{name: value}).arguments)


@pytest.mark.parametrize("value", BOOLS, ids=["python", "numpy", "array", "torch"])
def test_bools_are_no_numbers(inputs, handle, value):
    """`num_tokens=True` left one live row."""
    changing = handle_arguments(inputs)
    with pytest.raises(TypeError, match="num_tokens: expected an integer, got"):
        torch_moe(*inputs.arguments, num_tokens=value)
    with pytest.raises(TypeError, match="num_tokens: expected an integer, got"):
        handle(*changing, num_tokens=value)
    with pytest.raises(TypeError, match="local_expert_offset: expected an integer, got"):
        torch_moe(*array_arguments(inputs), value, 2.5)
    with pytest.raises(TypeError, match="routed_scaling_factor: expected a real number, got"):
        handle(*token_arguments(inputs), 8, value)


def test_integers_of_any_number_of_digits_are_named(inputs):
    with pytest.raises(ValueError, match=r"num_tokens: expected 0\.\.20, got an integer of 16610"):
        torch_moe(*inputs.arguments, num_tokens=10**5000)


def test_torch_scalars_count_as_numbers(inputs, expected):
    result = torch_moe(
        *array_arguments(inputs), torch.tensor(8), torch.tensor(2.5, dtype=torch.float64)
    )
    np.testing.assert_array_equal(bits(result), bits(expected))


def test_a_call_while_jax_traces_is_refused(inputs):
    with pytest.raises(RuntimeError, match=r"while JAX traces: call this outside of jax\.jit"):
        jax.jit(lambda x: (torch_moe(*inputs.arguments), x)[1])(1.0)


def test_the_same_is_refused_without_a_handle(inputs):
    with pytest.raises(NotImplementedError, match="backend='mosaic'"):
        torch_moe(*inputs.arguments, backend="mosaic")
    with pytest.raises(TypeError, match=r"config: expected a jax_moe\.MoEConfig, got dict"):
        torch_moe(*inputs.arguments, config={})


def test_the_old_name_of_the_weights():
    with pytest.warns(DeprecationWarning, match=r"TorchMoEWeights is now called jax_moe\.Expert"):
        assert interop.TorchMoEWeights is ExpertWeights
    assert {"torch_moe", "torch_moe_routed", "TorchMoE", "to_jax"} <= set(dir(interop))
    assert "TorchMoEWeights" not in interop.__all__


def test_a_destination_that_requires_grad_is_named(inputs):
    out = torch.zeros(20, 256, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(ValueError, match="out: requires grad"):
        torch_moe(*inputs.arguments, out=out)
    with torch.no_grad():
        assert torch_moe(*inputs.arguments, out=out) is out


@pytest.mark.slow
def test_host_times_are_measured(monkeypatch):
    monkeypatch.setattr(host_time, "REPEATS", 2)
    costs = dict(host_time.measure("cpu"))
    assert {"TorchMoE", "torch_moe", "apply, eager"} <= costs.keys()
    assert all(0 < cost.host <= cost.complete for cost in costs.values())


def test_inputs_come_from_the_shared_generator():
    """The torch inputs are the NumPy ones: no second generator to keep right."""
    arrays = moe_inputs.make_inputs(5, num_experts=64)
    tensors = torch_inputs(5)
    np.testing.assert_array_equal(
        moe_inputs.bits(arrays.weights.gemm1_weights), bits(tensors.weights.gemm1_weights)
    )
