"""Randomized: shapes, configs, routing patterns and dtypes against the oracles."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import MoEConfig, buckets
from pallas_kernels.shapes import max_rows
from tests import numpy_oracle
from tests.moe_inputs import bits, make_inputs, relative_error
from tests.test_plan import check_plan, make_plan

FEW_COMPILES = hypothesis.settings(max_examples=2, deadline=None, derandomize=True)
MANY = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def layers(draw):
    """A config, the sizes that go with it, and how the tokens are spread."""
    n_group = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.integers(2, 6))
    topk_group = draw(st.integers(1, n_group))
    config = MoEConfig(draw(st.integers(1, topk_group * per_group)), n_group, topk_group)
    num_experts = n_group * per_group
    num_local_experts = draw(st.integers(1, num_experts))
    sizes = {
        "num_tokens": draw(st.integers(1, 40)),
        "num_experts": num_experts,
        "num_local_experts": num_local_experts,
        "offset": draw(st.integers(0, num_experts - num_local_experts)),
        "hidden_size": 128 * draw(st.integers(1, 3)),
        "intermediate_size": 128 * draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 2**16)),
    }
    dtype = draw(st.sampled_from([None, np.float32, np.float16, ml_dtypes.bfloat16]))
    return config, sizes, draw(st.sampled_from([0.0, 0.1, 10.0])), dtype


@FEW_COMPILES
@hypothesis.given(layers())
def test_layer(layer):
    check_layer(layer)


@pytest.mark.slow
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(layers())
def test_more_layers(layer):
    check_layer(layer)


def check_layer(layer):
    config, sizes, skew, dtype = layer
    inputs = make_inputs(**sizes)
    bias = np.random.default_rng(sizes["seed"]).standard_normal(sizes["num_experts"])
    inputs = inputs._replace(routing_bias=(skew * bias).astype(np.float32))
    if dtype is not None:
        x = inputs.hidden_states.astype(dtype)
        inputs = inputs._replace(hidden_states=x, hidden_states_scale=None)
    expected = numpy_oracle.layer(*inputs.arguments, config=config)
    clear = numpy_oracle.routing_gaps(inputs.routing_logits, inputs.routing_bias, config) > 1e-6
    hypothesis.assume(expected[clear].any())
    for out, tolerance in (
        (jax_moe.reference(*inputs.arguments, config=config), 0.003),
        (jax_moe.apply(*inputs.arguments, config=config, backend="xla"), 0.05),
    ):
        out = np.asarray(out, np.float64)[clear]
        assert not out[(expected[clear] == 0).all(axis=1)].any()
        assert relative_error(out, expected[clear]) < tolerance


@MANY
@hypothesis.given(st.data())
def test_quantizer(data):
    columns = 128
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
    group = data.draw(st.lists(numbers, min_size=1, max_size=8))
    x = np.resize(np.array(group, np.float32), (1, columns))
    found = jax_moe.quantize(x, backend="xla")
    values, scales = numpy_oracle.quantize(x)
    np.testing.assert_array_equal(bits(found.values), bits(values))
    np.testing.assert_array_equal(bits(found.scales), bits(scales))


@MANY
@hypothesis.given(st.data())
def test_plan(data):
    num_tokens, num_experts, num_local_experts, top_k = data.draw(
        st.sampled_from([(24, 12, 4, 3), (24, 12, 4, 3), (7, 1024, 512, 16)])
    )
    row = st.lists(st.integers(-1, num_experts), min_size=top_k, max_size=top_k)
    rows = data.draw(st.lists(row, min_size=1, max_size=num_tokens))
    ids = np.resize(np.array(rows, np.int32), (num_tokens, top_k))
    offset = data.draw(st.integers(0, num_experts - num_local_experts))
    plan = make_plan("xla", ids, offset, num_local_experts, num_experts)
    check_plan(plan, ids, offset, num_local_experts, num_experts)


@MANY
@hypothesis.given(
    st.integers(1, 20000), st.integers(1, 16), st.integers(1, 64), st.sampled_from([8, 64, 128])
)
def test_sizes_grow_with_tokens(num_tokens, top_k, num_local_experts, block_m):
    rows = max_rows(num_tokens, top_k, num_local_experts, block_m)
    pairs = num_tokens * min(top_k, num_local_experts)
    assert rows % block_m == 0
    assert pairs <= rows < pairs + num_local_experts * block_m
    assert rows <= max_rows(num_tokens + 1, top_k, num_local_experts, block_m)
    assert num_tokens <= buckets.bucket(num_tokens) <= buckets.bucket(num_tokens + 1)
