"""The oracle in PyTorch against the one in JAX and the one in NumPy."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import MoEConfig
from tests import numpy_oracle
from tests.backend_cases import slow
from tests.moe_inputs import array_arguments, make_inputs, relative_error, scalar_arguments

torch = pytest.importorskip("torch")

from interop import torch_definition, torch_oracle  # noqa: E402
from tests.torch_inputs import to_tensor  # noqa: E402

ROUTER = ("top_k", "n_group", "topk_group", "scoring", "renormalize")
TWO_ULP = 2 * np.spacing(np.float32(2))


def options_of(config, names=(*ROUTER, "swiglu_limit")):
    fields = dataclasses.asdict(config)
    return {name: fields[name] for name in names}


@pytest.mark.parametrize(
    ("scoring", "has_bias"),
    [
        ("sigmoid", True),
        ("softmax", False),
        ("sqrtsoftplus", True),
        slow("sigmoid", False),
        slow("softmax", True),
        slow("sqrtsoftplus", False),
    ],
)
def test_routers(scoring, has_bias):
    rng = np.random.default_rng(0)
    for groups, renormalize in (((1, 1), True), ((4, 2), False)):
        config = MoEConfig(5, *groups, scoring=scoring, renormalize=renormalize)
        logits = (rng.standard_normal((997, 64)) * 2).astype(ml_dtypes.bfloat16)  # some tie
        bias = (rng.standard_normal(64) / 50).astype(np.float32) if has_bias else None
        tensors = [to_tensor(logits), None if bias is None else to_tensor(bias)]
        ids, weights = torch_oracle.route(*tensors, 2.0, **options_of(config, ROUTER))
        found = jax_moe.route(logits, bias, 2.0, config=config, backend="xla")
        clear = numpy_oracle.routing_gaps(logits, bias, config) > TWO_ULP
        clear |= not has_bias and groups == (1, 1)  # there logits are compared: exactly
        assert clear.mean() > 0.97
        np.testing.assert_array_equal(np.asarray(found.topk_ids)[clear], ids.numpy()[clear])
        np.testing.assert_allclose(found.topk_weights[clear], weights.numpy()[clear], rtol=2e-6)


def test_what_is_no_number_comes_after_minus_infinity():
    keys = torch.tensor([[torch.nan, -torch.inf, 1.0, torch.nan, -torch.inf]])
    last = torch.tensor([[False, True, False, False, False]])
    assert torch_oracle.best(keys, 5).tolist() == [[2, 1, 4, 0, 3]]
    assert torch_oracle.best(keys, 5, last).tolist() == [[2, 4, 0, 3, 1]]


@pytest.mark.parametrize("hidden_states", ["e4m3", "bf16"])
def test_layers(hidden_states):
    config = MoEConfig(4, 4, 2, scoring="sqrtsoftplus", swiglu_limit=0.75)
    inputs = make_inputs(23)
    if hidden_states == "bf16":
        x = np.random.default_rng(5).standard_normal((23, 256)).astype(ml_dtypes.bfloat16)
        inputs = inputs._replace(hidden_states=x, hidden_states_scale=None)
    arrays = [None if a is None else to_tensor(a) for a in array_arguments(inputs)]
    out = (
        torch_oracle.layer(*arrays, *scalar_arguments(inputs), **options_of(config)).float().numpy()
    )
    assert relative_error(out, numpy_oracle.layer(*inputs.arguments, config=config)) < 0.003


def test_the_definition_is_the_default():
    inputs = make_inputs(9, num_experts=64)
    arrays = [to_tensor(array) for array in array_arguments(inputs)]
    out = torch_oracle.layer(*arrays, *scalar_arguments(inputs)).float()
    assert (
        relative_error(out, torch_definition.run(*arrays, *scalar_arguments(inputs)).float())
        < 0.003
    )
