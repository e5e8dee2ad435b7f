"""Reading a model's `config.json`: known models, defaults, and what is refused by name."""

from __future__ import annotations

import pytest

from jax_moe import MoEConfig, huggingface, models, nn

DEEPSEEK_V31 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}
MINIMAX_M2 = {
    "model_type": "minimax_m2",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "shared_intermediate_size": 0,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    ("config", "name"),
    [(DEEPSEEK_V31, "deepseek-v3.1"), (QWEN3, "qwen3-30b"), (MINIMAX_M2, "minimax-m2")],
)
def test_published_files(config, name):
    model, found = models.get(name), huggingface.read(config)
    assert MoEConfig.from_hf(config) == model.config
    assert found.num_experts == model.num_experts
    assert (found.hidden_size, found.intermediate_size) == (
        model.hidden_size,
        model.intermediate_size,
    )
    assert found.routed_scaling_factor == model.routed_scaling_factor
    assert found.has_routing_bias == model.has_routing_bias
    assert found.num_shared_experts == model.num_shared_experts
    shared = model.num_shared_experts * model.intermediate_size
    assert found.shared_intermediate_size == shared


# Keys that files on the hub have beside those of transformers, as public code quotes them.
ON_THE_HUB = {
    "minimax_m2": {"shared_moe_mode": "sigmoid", "router_jitter_noise": 0.0},
    "ernie4_5_moe": {
        "moe_use_aux_free": True,
        "moe_gate": "topk",
        "moe_capacity": [64, 64, 64],
        "moe_num_shared_experts": 0,
    },
    "kimi_linear": {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1},
    "bailing_hybrid": {
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_enable_routed_scaling": True,
        "moe_shared_expert_intermediate_size": 384,
        "router_dtype": "fp32",
    },
    "exaone_moe": {"is_moe_layer": [False, True], "scoring_func": "sigmoid"},
    "hy_v3": {"route_norm": True, "expert_hidden_dim": 384, "moe_router_use_sigmoid": True},
    "dots1": {"scoring_func": "noaux_tc"},
    "deepseek_v4": {"expert_dtype": "fp8", "num_hash_layers": 3},
}
OF_ANY = {
    "hidden_size": 256,
    "moe_intermediate_size": 384,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}


@pytest.mark.parametrize("kind", ON_THE_HUB)
def test_what_files_on_the_hub_add_changes_nothing(kind):
    config = OF_ANY | {"model_type": kind, "intermediate_size": 384}
    if kind == "ernie4_5_moe":
        config["moe_num_shared_experts"] = 0
    assert huggingface.read(config | ON_THE_HUB[kind]) == huggingface.read(config)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "minimax_m2",
            {"shared_moe_mode": "sigmoid", "shared_intermediate_size": 128},
            "shared_mo",
        ),
        ("ernie4_5_moe", {"moe_gate": "top2"}, "moe_gate: not known for .* got 'top2'"),
        ("bailing_hybrid", {"moe_router_enable_shared_expert": False}, "moe_router_enable_shared"),
        ("deepseek_v4", {"expert_dtype": "fp4"}, "expert_dtype: not known for .* got 'fp4'"),
        ("hy_v3", {"expert_hidden_dim": 256}, "expert_hidden_dim: expected 384 as moe_intermedia"),
    ],
)
def test_what_they_add_is_refused_where_it_changes_something(kind, change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        huggingface.read(OF_ANY | {"model_type": kind, "intermediate_size": 384} | change)


def test_bits_that_files_on_the_hub_add():
    config = OF_ANY | {"model_type": "bailing_hybrid", "num_shared_experts": 2}
    assert not huggingface.read(config | {"moe_router_enable_expert_bias": False}).has_routing_bias
    wide = huggingface.read(config | {"moe_shared_expert_intermediate_size": 512})
    assert wide.shared_intermediate_size == 1024
    assert huggingface.read(config | {"use_grouped_topk": False}).router["n_group"] == 1


def test_the_part_about_text_is_read():
    whole = {"model_type": "kimi_k25", "text_config": DEEPSEEK_V31, "vision_config": {}}
    assert MoEConfig.from_hf(whole) == MoEConfig.from_hf(DEEPSEEK_V31)


TRANSFORMERS = {
    "deepseek_v3": ("DeepseekV3Config", "deepseek-v3"),
    "deepseek_v4": ("DeepseekV4Config", None),
    "glm4_moe": ("Glm4MoeConfig", None),
    "glm_moe_dsa": ("GlmMoeDsaConfig", "glm-5"),
    "qwen3_moe": ("Qwen3MoeConfig", None),
    "qwen3_next": ("Qwen3NextConfig", "qwen3-next"),
    "minimax_m2": ("MiniMaxM2Config", "minimax-m2"),
    "mixtral": ("MixtralConfig", "mixtral-8x7b"),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_defaults_are_those_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    name, model = TRANSFORMERS[kind]
    config = getattr(transformers, name)()
    found = huggingface.read(config.to_dict())
    assert found.hidden_size == config.hidden_size
    assert found.router["top_k"] == config.num_experts_per_tok
    for theirs, ours in (("norm_topk_prob", "renormalize"), ("n_group", "n_group")):
        if hasattr(config, theirs):
            assert found.router[ours] == getattr(config, theirs)
    if model is not None:
        assert MoEConfig.from_hf(config.to_dict()) == models.get(model).config


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "llama4"}, ValueError, "model_type: expected one of .*got 'llama4'"),
        ({"model_type": None}, ValueError, "model_type: expected one of"),
        ({"scoring_func": "relu"}, ValueError, "scoring_func: expected one of .*got 'relu'"),
        ({"topk_method": "magic"}, ValueError, "topk_method: expected .*got 'magic'"),
        ({"topk_method": "group_limited_greedy"}, ValueError, "topk_method: expected groups"),
        ({"hidden_act": "gelu"}, ValueError, "hidden_act: expected 'silu', got 'gelu'"),
        ({"zero_expert_num": 256}, ValueError, "zero_expert_num: not known for .*got 256"),
        ({"swiglu_alpha": 1.7}, ValueError, "swiglu_alpha: not known"),
        (
            {"num_experts": 128},
            ValueError,
            "num_experts: expected 256 as n_routed_experts says, got 128",
        ),
        ({"num_experts_per_tok": None}, ValueError, "num_experts_per_tok: expected a number"),
        ({"n_routed_experts": "many"}, TypeError, "n_routed_experts: expected an integer"),
        ({"n_shared_experts": -1}, ValueError, "n_shared_experts: expected 0 or more, got -1"),
        ({7: 8}, TypeError, r"config: expected names of text, got 7 \(int\)"),
        ({"routed_scaling_factor": "2.5"}, TypeError, "routed_scaling_factor: expected a real"),
        ({"routed_scaling_factor": float("nan")}, ValueError, "factor: expected a finite float32"),
        ({"quantization_config": {"scale_fmt": "x"}}, ValueError, "scale_fmt: expected"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        MoEConfig.from_hf(DEEPSEEK_V31 | change)


KIMI_LINEAR = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "moe_intermediate_size": 1024,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_expert_group": 1,
    "topk_group": 1,
    "moe_router_activation_func": "sigmoid",
}
SIZES = ("hidden_size", "moe_intermediate_size", "num_experts_per_token")
SPLIT = "into equal groups of at least 2, or to be 1, got"


@pytest.mark.parametrize("function", [MoEConfig.from_hf, nn.LayerConfig.from_hf])
@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (KIMI_LINEAR, {"moe_router_activation_func": "relu"}, "moe_router_activation_func: exp"),
        (KIMI_LINEAR, {"num_experts_per_token": 0}, "num_experts_per_token: expected 1 or more"),
        (KIMI_LINEAR, {"moe_intermediate_size": 0}, "moe_intermediate_size: expected 1 or more"),
        (
            KIMI_LINEAR,
            {"topk_group": 3},
            r"^topk_group: expected 1..num_expert_group \(= 1\), got 3",
        ),
        (KIMI_LINEAR, {"topk_group": 0}, "^topk_group: expected 1 or more, got 0"),
        (
            KIMI_LINEAR,
            {"num_expert_group": 0, "topk_group": 2},
            "^num_expert_group: expected 1 or more, got 0",
        ),
        (
            KIMI_LINEAR,
            {"num_expert_group": 3},
            f"config: expected num_expert_group to split the 256 experts of num_experts {SPLIT} 3",
        ),
        (
            KIMI_LINEAR,
            {"num_experts_per_token": 300},
            "config: expected num_experts_per_token of at most 256, which .*, got 300",
        ),
        (
            DEEPSEEK_V31,
            {"moe_intermediate_size": 2**30, "n_shared_experts": 5},
            r"n_shared_experts \* moe_intermediate_size: expected at most 1073741824, got 5368",
        ),
        (MIXTRAL, {"intermediate_size": None}, "^intermediate_size: expected a number .*got null"),
        (
            {key: value for key, value in MIXTRAL.items() if key != "num_local_experts"},
            {},
            "n_routed_experts or num_experts or num_local_experts or .*: expected a number",
        ),
        (
            {"model_type": "deepseek_v3"} | {k: KIMI_LINEAR[k] for k in SIZES},
            {"num_experts": 12},
            f"expected the default n_group to split the 12 experts of num_experts {SPLIT} 8",
        ),
    ],
)
def test_messages_have_the_names_of_the_file(function, config, change, message):
    with pytest.raises(ValueError, match=message):
        function(config | change)


KEYS = {key: field for field, keys in huggingface._NAMES.items() for key in keys}
HOSTILE = (None, 5, "x", [], {}, float("nan"), True, 10**5000, [10**5000])
FLAGS = ("renormalize", "has_routing_bias", "is_grouped")
TEXTS = ("topk_method", "scoring", "hidden_act", "model_type", "scale_fmt")
PARTS = ("text_config", "quantization_config")


@pytest.mark.parametrize("function", [MoEConfig.from_hf, nn.LayerConfig.from_hf])
@pytest.mark.parametrize("key", [*KEYS, "model_type", *PARTS, "scale_fmt"])
def test_a_value_of_another_type_is_refused_by_name(function, key):
    field = KEYS.get(key, key)
    usual = {name: value for name, value in QWEN3.items() if KEYS.get(name, name) != field}
    for value in HOSTILE:
        if key == "scale_fmt":
            config = usual | {"quantization_config": {key: value}}
        else:
            config = usual | {"num_experts_per_tok": 4} | {key: value}
            if field == "top_k" and key != "num_experts_per_tok":
                del config["num_experts_per_tok"]
        kind = bool if field in FLAGS else dict if field in PARTS else int
        may_fit = value is None or (type(value) is kind and field not in TEXTS)
        names = {key, field, *huggingface._NAMES.get(field, ())}
        if key == "text_config" and value == {}:
            names = {"model_type"}  # of which there is none
        message = refusal(function, config)
        if message is None:
            assert may_fit
            assert value != 10**5000
        else:
            said, _, found = message.partition(", got ")
            assert any(name in said for name in names), message
            assert found


def refusal(function, config):
    """What a refused configuration is told; None of one that is taken."""
    try:
        function(config)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def test_no_shared_experts_are_none_whatever_the_default_is():
    assert huggingface.read(DEEPSEEK_V31 | {"n_shared_experts": None}).num_shared_experts == 0


def test_a_null_is_none_where_that_is_the_default():
    """MiMo-V2-Flash publishes a null factor; its own code makes it 1."""
    mimo = DEEPSEEK_V31 | {"model_type": "mimo_v2_flash", "routed_scaling_factor": None}
    assert huggingface.read(mimo).routed_scaling_factor == 1
    for key, kind in (
        ("routed_scaling_factor", "deepseek_v3"),
        ("n_group", "deepseek_v3"),
        ("norm_topk_prob", "mimo_v2_flash"),
        ("scoring_func", "mimo_v2_flash"),
        ("hidden_act", "mimo_v2_flash"),
        ("swiglu_limit", "deepseek_v4"),
    ):
        given = DEEPSEEK_V31 | {"model_type": kind, key: None}
        with pytest.raises(ValueError, match=f"{key}: expected a value .* {kind} .*, got null"):
            MoEConfig.from_hf(given)


def test_no_mapping():
    with pytest.raises(TypeError, match="config: expected a mapping, got str"):
        MoEConfig.from_hf("config.json")
