"""Routers, clamps and scale formats: every pair of options, on every backend."""

from __future__ import annotations

import inspect

import jax
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import DEEPSEEK_V3, MoEConfig
from tests import numpy_oracle
from tests.backend_cases import EVERYWHERE, running
from tests.moe_inputs import SMALL, array_arguments, make_inputs, relative_error, scalar_arguments
from tests.pairwise import covering, product

FACTOR = 1.5
OPTIONS = {
    "scoring": ["sigmoid", "softmax", "sqrtsoftplus"],
    "swiglu_limit": [None, 0.75],
    "scale_format": ["f32", "ue8m0"],
    "hidden_states": ["e4m3", "bf16"],
    "has_bias": [True, False],
    "renormalize": [True, False],
    "groups": [(1, 1), (4, 2)],
    "logits": [np.float32, ml_dtypes.bfloat16, np.float16],
}
PAIRS = covering(OPTIONS)
THE_FIVE = ("scoring", "swiglu_limit", "scale_format", "hidden_states", "has_bias")
# A few activations round to the neighbour, and bf16 rows, drawn anew here, have more of them than
# the e4m3 rows of test_backends: up to 0.0083 with triton on an H200.
# `mosaic` rounds them to bf16 on the way, as its oracle does: with scales that are powers of two,
# every sixteenth of those lies halfway between two e4m3 numbers.
TO_REQUANTIZING_ORACLE = {"xla": 0.004, "triton": 0.012, "mosaic": 0.02}


def config_of(row):
    n_group, topk_group = row["groups"]
    fields = {name: row[name] for name in ("scoring", "renormalize", "swiglu_limit")}
    return MoEConfig(4, n_group, topk_group, scale_format=row["scale_format"], **fields)


def inputs_of(row, num_tokens=41):
    inputs = make_inputs(num_tokens)
    # Scores of every size, so that the bias, where there is one, decides some choices and not all.
    inputs = inputs._replace(
        routing_logits=(inputs.routing_logits * 2).astype(row["logits"]),
        routed_scaling_factor=FACTOR,
    )
    if not row["has_bias"]:
        inputs = inputs._replace(routing_bias=None)
    if row["hidden_states"] == "bf16":
        x = np.random.default_rng(5).standard_normal(inputs.hidden_states.shape, np.float32)
        x = x.astype(ml_dtypes.bfloat16)
        inputs = inputs._replace(hidden_states=x, hidden_states_scale=None)
    return inputs


def check(case, row):
    config, inputs = config_of(row), inputs_of(row)
    with running(case) as backend:
        out = jax_moe.apply(*inputs.arguments, config=config, backend=backend)
        if backend != "xla":  # which is what the others are compared with
            routing = jax_moe.route(
                inputs.routing_logits, inputs.routing_bias, FACTOR, config=config, backend=backend
            )
            expected = jax_moe.route(
                inputs.routing_logits, inputs.routing_bias, FACTOR, config=config, backend="xla"
            )
            np.testing.assert_array_equal(routing.topk_ids, expected.topk_ids)
            np.testing.assert_allclose(routing.topk_weights, expected.topk_weights, rtol=1e-6)
    staged = ml_dtypes.bfloat16 if "mosaic" in case else np.float32
    requantized = numpy_oracle.layer(
        *inputs.arguments, config=config, requantize=True, staged=staged
    )
    bound = TO_REQUANTIZING_ORACLE[case.removeprefix("interpreted_")]
    assert relative_error(out, requantized) < bound
    exact = numpy_oracle.layer(*inputs.arguments, config=config)
    assert relative_error(out, exact) < (0.07 if row["scale_format"] == "ue8m0" else 0.06)


@pytest.mark.parametrize("scoring", OPTIONS["scoring"])
def test_the_oracles_agree(scoring):
    rows = [row for row in PAIRS if row["scoring"] == scoring and row["swiglu_limit"]]
    config, inputs = config_of(rows[0]), inputs_of(rows[0])
    oracle = jax_moe.reference(*inputs.arguments, config=config)
    assert relative_error(oracle, numpy_oracle.layer(*inputs.arguments, config=config)) < 0.003


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("row", PAIRS, ids=lambda row: "-".join(map(str, row.values())))
def test_every_pair_of_options(case, row):
    check(case, row)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("row", product({name: OPTIONS[name] for name in THE_FIVE}), ids=str)
def test_every_combination(case, row):
    check(case, {"renormalize": True, "groups": (1, 1), "logits": np.float32} | row)


def test_the_pairs_are_few_and_complete():
    names = list(OPTIONS)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            met = {(str(row[a]), str(row[b])) for row in PAIRS}
            assert len(met) == len(OPTIONS[a]) * len(OPTIONS[b]), (a, b)
    assert len(PAIRS) <= 12


@pytest.mark.parametrize("backend", ["mosaic", "triton"])
@pytest.mark.parametrize(
    "options",
    [{"scoring": "softmax"}, {"renormalize": False}],
    ids=str,
)
def test_an_option_of_the_router_is_another_program(backend, options):
    """Traced for a Hopper GPU, which needs none."""
    inputs = make_inputs(3)

    def program(config):
        def layer(*arrays):
            return jax_moe.apply(*arrays, *scalar_arguments(inputs), config=config, backend=backend)

        with jax_moe.assume_device("sm_90"):
            return str(jax.make_jaxpr(layer)(*array_arguments(inputs)))

    assert program(MoEConfig(4, 4, 2, **options)) != program(SMALL)


def test_options_are_arguments_too():
    """The same program, by the configuration or by the arguments."""
    inputs = make_inputs(7)
    options = {"swiglu_limit": 0.5, "scale_format": "ue8m0"}
    with_options = MoEConfig(4, 4, 2, **options)
    routing = jax.ShapeDtypeStruct((7, 4), np.int32), jax.ShapeDtypeStruct((7, 4), np.float32)

    def program(function, **static):
        arguments = (
            (inputs.hidden_states, inputs.hidden_states_scale, *inputs.weights, *routing, 8)
            if "num_experts" in static
            else inputs.arguments
        )
        return str(jax.make_jaxpr(lambda *arrays: function(*arrays, **static))(*arguments))

    for function, own in ((jax_moe.apply, {"backend": "xla"}), (jax_moe.reference, {})):
        by_config = program(function, config=with_options, **own)
        assert program(function, config=SMALL, **options, **own) == by_config
        assert program(function, config=with_options, **options, **own) == by_config
        assert program(function, config=SMALL, **own) != by_config
    for function, own in (
        (jax_moe.apply_routed, {"backend": "xla"}),
        (jax_moe.reference_routed, {}),
    ):
        own["num_experts"] = 32
        assert program(function, **options, **own) != program(function, **own)


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        ({"swiglu_limit": 7}, {"swiglu_limit": 8}, ValueError, r"swiglu_limit: expected None or 7"),
        ({"scale_format": "ue8m0"}, {"scale_format": "f32"}, ValueError, "None or 'ue8m0'"),
        ({}, {"swiglu_limit": 0}, ValueError, "swiglu_limit: expected a positive .*got 0"),
        ({}, {"swiglu_limit": np.nan}, ValueError, "swiglu_limit: expected a positive .*got nan"),
        ({}, {"swiglu_limit": 1e39}, ValueError, "swiglu_limit: expected a positive"),
        ({}, {"swiglu_limit": 1e-46}, ValueError, "swiglu_limit: expected a positive .*got 1e-46"),
        ({}, {"swiglu_limit": 10**400}, ValueError, "got an integer of 1329 bits"),
        ({}, {"swiglu_limit": "7"}, TypeError, "swiglu_limit: expected a number or None, got '7'"),
        ({}, {"swiglu_limit": True}, TypeError, "swiglu_limit: expected a number or None"),
        ({}, {"scale_format": "e8m0"}, ValueError, "scale_format: expected one of .*got 'e8m0'"),
    ],
)
def test_bad_options_are_refused_by_name(config, options, error, message):
    inputs = make_inputs(2)
    for function in (jax_moe.apply, jax_moe.reference):
        with pytest.raises(error, match=message):
            function(*inputs.arguments, config=MoEConfig(4, 4, 2, **config), **options)
    if not config:
        ids, weights = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
        for function in (jax_moe.apply_routed, jax_moe.reference_routed):
            with pytest.raises(error, match=message):
                function(
                    inputs.hidden_states,
                    inputs.hidden_states_scale,
                    *inputs.weights,
                    ids,
                    weights,
                    8,
                    num_experts=32,
                    **options,
                )


def test_values_that_python_does_not_print_are_refused_by_name():
    inputs = make_inputs(2).arguments
    for value in (10**5000, [10**5000]):
        for name in ("backend", "precision", "scale_format", "swiglu_limit", "batch_invariant"):
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*, got "):
                jax_moe.apply(*inputs, **{name: value})
        for name in ("top_k", "scoring", "renormalize", "scale_format", "swiglu_limit"):
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*, got "):
                MoEConfig(**{name: value})
        with pytest.raises((TypeError, ValueError), match=r"^name: expected .*, got "):
            jax_moe.assume_device(value).__enter__()
        with pytest.raises(ValueError, match=r"^model: expected .*, got "):
            jax_moe.models.get(value)


def test_the_same_words_everywhere():
    both = {"scale_format", "swiglu_limit"}
    functions = (
        jax_moe.apply,
        jax_moe.apply_routed,
        jax_moe.reference,
        jax_moe.reference_routed,
        jax_moe.up_project,
        MoEConfig,
    )
    for function in functions:
        assert both <= set(inspect.signature(function).parameters), function
    assert "scale_format" in inspect.signature(jax_moe.quantize).parameters
    assert MoEConfig(8, 8, 4, 128, "sigmoid", True, None, "f32") == DEEPSEEK_V3
