"""The known models' sizes and routers: what they promise, and that the layer takes them."""

from __future__ import annotations

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import LayerInputs, models, validate
from jax_moe.models import DEEPSEEK_V3, MODELS, Model

F8, F32 = jnp.float8_e4m3fn, jnp.float32


def specs(model: Model, num_tokens: int) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the eight arrays of one rank."""
    experts, hidden, inner = model.num_local_experts, model.hidden_size, model.intermediate_size
    shapes = (
        ((num_tokens, model.num_experts), F32),
        ((model.num_experts,), F32),
        ((num_tokens, hidden), F8),
        ((hidden // 128, num_tokens), F32),
        ((experts, 2 * inner, hidden), F8),
        ((experts, 2 * inner // 128, hidden // 128), F32),
        ((experts, hidden, inner), F8),
        ((experts, hidden // 128, inner // 128), F32),
    )
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_passes_the_checks_of_the_layer(model):
    def check(*arrays):
        inputs = LayerInputs.of(*arrays, model.num_experts - model.num_local_experts, 1.0)
        return validate.layer_inputs(inputs, model.config).local_expert_offset

    assert jax.eval_shape(check, *specs(model, 16)).shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_layer_can_be_traced_for_a_rank_of_every_model(model):
    def layer(*arrays):
        return jax_moe.apply(*arrays, 0, 1.0, config=model.config, backend="xla")

    out = jax.eval_shape(layer, *specs(model, 16))
    assert (out.shape, out.dtype) == ((16, model.hidden_size), jnp.bfloat16)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_fields_make_sense(model):
    assert model.num_experts % model.num_local_experts == 0
    assert model.num_experts % model.n_group == 0
    assert 1 <= model.topk_group <= model.n_group
    assert model.top_k <= model.num_experts // model.n_group * model.topk_group
    assert model.scoring in ("sigmoid", "softmax", "sqrtsoftplus")
    assert model.scale_format in ("f32", "ue8m0")
    assert model.swiglu_limit is None or model.swiglu_limit > 0
    fields = {field.name for field in dataclasses.fields(Model)}
    assert set(model.uncertain) <= fields - {"name", "aliases", "uncertain", "note"}


def test_deepseek_v3_is_the_layer_of_the_defaults():
    assert DEEPSEEK_V3.config == jax_moe.DEEPSEEK_V3
    assert DEEPSEEK_V3.unsupported == ()
    assert MODELS[0] is DEEPSEEK_V3


def test_names_and_aliases_find_their_model():
    assert len(set(models.names())) == len(models.names())
    assert {models.get(name) for name in models.names()} == set(MODELS)
    assert models.get("deepseek-r1") is DEEPSEEK_V3


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"model: expected one of deepseek-v3, .*kimi-k2.*'gpt-2'"):
        models.get("gpt-2")
    with pytest.raises(ValueError, match=r"model: expected one of .*got float64 \[2\]"):
        models.get(np.zeros(2))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen3-30b", {"scoring"}),
        ("deepseek-v3.1", {"scale_format"}),
        ("glm-5.3-flash", {"swiglu_limit"}),
        ("longcat-flash", {"scoring", "renormalize"}),
        ("kimi-k2", set()),
        ("deepseek-v2", {"scoring", "renormalize", "group_scoring"}),
    ],
)
def test_what_the_configuration_cannot_say_is_named(name, fields):
    """A field is either in the configuration, with the model's value, or among the unsupported."""
    model = models.get(name)
    known = {field.name for field in dataclasses.fields(model.config)}
    assert set(model.unsupported) == fields - known
    for field in (fields | {"top_k", "n_group", "topk_group"}) & known:
        assert getattr(model.config, field) == getattr(model, field)


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(models)
    assert (result.attempted, result.failed) == (3, 0)
