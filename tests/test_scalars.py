"""Scalar arguments: traced ones, and numbers of NumPy; the others are in test_validate.py."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import config, nn, scalars, validate


def test_traced_integers_that_int32_cannot_hold_are_clipped():
    """A cast alone would wrap them; what int32 holds stays as it is."""
    narrow = jax.jit(lambda value: scalars.integer("offset", value, 0, 24))
    found = [narrow(np.uint32(value)).item() for value in (7, 2**31, 2**32 - 1)]
    assert found == [7, 2**30, 2**30]
    with jax.enable_x64(True):
        found = [narrow(np.int64(value)).item() for value in (-(2**40), -5, 7, 2**40)]
    assert found == [-(2**30), -5, 7, 2**30]


def test_a_static_count_that_is_traced():
    ids = np.zeros((1, 2), np.int32)
    plan = functools.partial(jax_moe.plan_groups, ids, 0, num_local_experts=2)
    with pytest.raises(TypeError, match="num_experts: expected a static integer, got a traced int"):
        jax.jit(lambda count: plan(num_experts=count))(8)


NUMBERS = [
    pytest.param(ml_dtypes.bfloat16(2.5), True, id="bfloat16"),
    pytest.param(ml_dtypes.float8_e4m3fn(2.5), True, id="float8"),
    pytest.param(np.float16(2.5), True, id="float16"),
    pytest.param(np.True_, False, id="bool"),
    pytest.param(np.complex64(2.5), False, id="complex"),
    pytest.param(np.timedelta64(2, "s"), False, id="seconds"),
]
TAKERS = {
    "factor": lambda value: scalars.real("factor", value),
    "expected_rows": validate.expected_rows,
    "swiglu_limit": config.checked_swiglu_limit,
    "routed_scaling_factor": lambda value: (
        nn.LayerConfig(
            jax_moe.MoEConfig(2), 8, 128, 128, routed_scaling_factor=value
        ).routed_scaling_factor
    ),
}


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize(("value", "is_number"), NUMBERS)
def test_real_numbers_are_those_of_numpy_and_ml_dtypes(value, is_number, name):
    if is_number:
        assert TAKERS[name](value) == 2.5
    else:
        with pytest.raises(TypeError, match=f"{name}: expected a .*number"):
            TAKERS[name](value)


@pytest.mark.parametrize("name", ["expected_rows", "swiglu_limit", "routed_scaling_factor"])
@pytest.mark.parametrize("number", [jnp.float32(3), np.array(3.0)])
def test_real_numbers_that_are_static_are_no_arrays(number, name):
    with pytest.raises(TypeError, match=f"{name}: expected a number.*, got .*float"):
        TAKERS[name](number)


def test_integers_of_ml_dtypes():
    for value in (ml_dtypes.int4(2), np.array(2, ml_dtypes.int4)):
        assert scalars.integer("offset", value, 0, 24) == 2
    with pytest.raises(TypeError, match=r"offset: expected an integer, got .*timedelta"):
        scalars.integer("offset", np.timedelta64(2, "s"), 0, 24)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros((40, 50)), "float64 [40, 50]"),
        (jnp.zeros(3), "float32 [3]"),
        ([jnp.zeros(3), "a" * 9], "[float32 [3], 'aaaaaaaaa']"),
        (("a", 1), "('a', 1)"),
        ({"b": [1]}, "{'b': [1]}"),
        ("a" * 300, "'" + "a" * 199),
        (10**5000, "an integer of 16610 bits"),
        ([10**5000], "list"),
        (jax_moe.ExpertWeights(*[np.zeros(2)] * 4), "jax_moe.types.ExpertWeights"),
    ],
    ids=range(9),
)
def test_what_came_is_said_in_a_line(value, said):
    assert scalars.quoted(value) == said
    either = (said, f"{said} ({scalars.got(value)})")
    assert scalars.quoted_with_type(value) in either


def test_a_tensor_is_never_printed():
    """To print one whose storage was freed ends the process."""
    torch = pytest.importorskip("torch")
    freed = torch.zeros(7, 16)
    freed.untyped_storage().resize_(0)
    assert scalars.quoted(freed) == "torch.Tensor"
    assert scalars.quoted_with_type(freed).startswith("torch.Tensor (interop.torch_moe takes ")
    assert scalars.quoted([freed]) == "[torch.Tensor]"


def test_what_cannot_be_printed_is_said_by_its_type():
    class Silent:
        def __repr__(self):
            raise KeyError("no")

    for value in (Silent(), [Silent()]):
        assert scalars.quoted(value) == scalars.got(value)
