"""Benchmark inputs: the same bits everywhere, the stated distributions, the stated load."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bench import gaussian, header, inputs, layers, parallel_inputs, routing, shared_expert
from bench.results import Results
from bench.settings import Settings
from bench.work import Work, work_of
from bench.workloads import FULL, REDUCED, SCALING, WORKLOADS, select
from jax_moe import DEEPSEEK_V3, models

E4M3 = ml_dtypes.float8_e4m3fn


def bits_of(array):
    return np.atleast_1d(np.asarray(array)).view(np.uint8)


def test_e4m3_rounding_equals_a_single_correct_rounding():
    grid = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    finite = np.unique(grid[np.isfinite(grid)])
    halfway = (finite[1:].astype(np.float64) + finite[:-1]) / 2
    near = np.concatenate([np.nextafter(halfway, np.inf), np.nextafter(halfway, -np.inf), halfway])
    x = np.concatenate([finite, near, np.linspace(-500, 500, 20001)]).astype(np.float32)
    found = jax.jit(gaussian.to_e4m3)(x)
    np.testing.assert_array_equal(bits_of(found), bits_of(np.clip(x, -448, 448).astype(E4M3)))


def test_gaussian_has_the_moments_and_tails_of_a_normal():
    x = np.asarray(gaussian.gaussian(gaussian.key_for(0, 1), (1000, 1000)))
    assert abs(x.mean()) < 0.004
    assert abs(x.std() - 1) < 0.003
    for bound, share in ((1, 0.3173), (2, 0.0455), (3, 0.0027)):
        assert abs((np.abs(x) > bound).mean() - share) < 0.002
    assert 4.2 < np.abs(x).max() < 4.4


@pytest.mark.parametrize("block_rows", [1, 128])
def test_quantized_gaussian_follows_from_the_random_bits_alone(block_rows):
    rows, columns, std = 256, 384, 0.03
    key = gaussian.key_for(3, 1, 4)
    values, scales = gaussian.quantized_gaussian(key, rows, columns, block_rows=block_rows, std=std)
    shape = (rows // block_rows, block_rows, columns // 128, 128)
    bits = np.asarray(jax.random.bits(key, shape, jnp.uint16))
    table = gaussian._half_normal_quantiles().astype(np.float64)
    magnitude = table[bits & 0x7FFF]
    amax = magnitude.max(axis=(1, 3))
    np.testing.assert_array_equal(scales, (std * amax / 448).astype(np.float32))
    wanted = (magnitude * (448 / amax)[:, None, :, None]).astype(np.float32)
    wanted = np.where(bits >> 15, -wanted, wanted).astype(E4M3).reshape(rows, columns)
    # The host rounds a product of f64, the device one of f32: a code apart at most, and rarely.
    apart = bits_of(values) != bits_of(wanted)
    assert apart.mean() < 1e-4
    dequantized = np.asarray(values).astype(np.float32).reshape(shape)
    dequantized = dequantized * np.asarray(scales)[:, None, :, None]
    assert abs(dequantized.std() / std - 1) < 0.02
    assert (
        np.abs(np.asarray(values).astype(np.float32)).reshape(shape).max(axis=(1, 3)).min() == 448
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["realistic", "flashinfer"])
def test_cpu_and_gpu_draw_the_same_bits(kind):
    workload = select(["80"])[0]
    drawn = []
    for device in (jax.devices("cpu")[0], jax.devices("gpu")[0]):
        with jax.default_device(device):
            weights = inputs.draw_weights(kind, REDUCED, 5)
            routed = routing.draw(workload, REDUCED, 5)
            drawn.append(inputs.make_arguments(kind, workload, REDUCED, 5, 1, weights, routed))
        jax.clear_caches()
    for cpu, gpu in zip(drawn[0].arguments, drawn[1].arguments, strict=True):
        np.testing.assert_array_equal(bits_of(cpu), bits_of(gpu))


@pytest.mark.parametrize("kind", ["realistic", "flashinfer"])
def test_arguments_have_the_shapes_and_the_distribution_that_the_kind_promises(kind):
    workload = select(["15"])[0]
    weights = inputs.draw_weights(kind, REDUCED, 0)
    routed = routing.draw(workload, REDUCED, 0)
    first, second = (
        inputs.head(inputs.make_arguments(kind, workload, REDUCED, 0, trial, weights, routed), 15)
        for trial in (0, 1)
    )
    tokens, hidden, intermediate = 15, REDUCED.hidden_size, REDUCED.intermediate_size
    assert first.hidden_states.shape == (tokens, hidden)
    assert first.hidden_states_scale.shape == (hidden // 128, tokens)
    assert first.weights.gemm1_weights.shape == (
        REDUCED.num_local_experts,
        2 * intermediate,
        hidden,
    )
    assert first.weights.gemm2_weights_scale.shape == (8, hidden // 128, intermediate // 128)
    assert first.routing_logits.shape == (tokens, REDUCED.num_experts)
    assert int(first.local_expert_offset) == REDUCED.offset(workload) == 8
    assert first.weights.gemm1_weights is second.weights.gemm1_weights
    assert (bits_of(first.hidden_states) != bits_of(second.hidden_states)).mean() > 0.9
    negative = float((weights.gemm1_weights_scale < 0).mean())
    largest = float(jnp.abs(first.hidden_states.astype(jnp.float32)).max())
    if kind == "realistic":
        assert negative == 0
        assert largest == 448
    else:
        assert 0.2 < negative < 0.8
        assert largest == 2


def brute_force_topk(logits, bias, config=DEEPSEEK_V3):
    """The rule, one token and one comparison at a time."""
    chosen = []
    for row in logits.astype(np.float64):
        score = (1 / (1 + np.exp(-row))).astype(np.float32) + bias.astype(np.float32)
        groups = score.reshape(config.n_group, -1)
        best_two = [sorted(group)[-1] + sorted(group)[-2] for group in groups]
        kept = sorted(range(config.n_group), key=lambda g: (-best_two[g], g))[: config.topk_group]
        size = groups.shape[1]
        allowed = [e for e in range(len(score)) if e // size in kept]
        chosen.append(sorted(allowed, key=lambda e: (-score[e], e))[: config.top_k])
    return np.array(chosen)


@pytest.mark.parametrize("sizes", [FULL, REDUCED])
def test_local_load_counts_what_the_routing_rule_gives(sizes):
    workload = select(["80"])[0]
    drawn = routing.draw(workload, sizes, 0)
    local = brute_force_topk(*drawn) - sizes.offset(workload)
    is_local = (local >= 0) & (local < sizes.num_local_experts)
    load = routing.local_load(drawn, workload, sizes)
    assert load.pairs == is_local.sum()
    assert load.active_experts == len(set(local[is_local]))
    assert load.tokens == is_local.any(axis=1).sum()
    assert load.max_per_expert == max(np.bincount(local[is_local]))


def test_every_workload_has_local_pairs_and_logits_lie_on_the_bf16_grid():
    for workload in WORKLOADS[:-2]:
        drawn = routing.draw(workload, FULL, 0)
        load = routing.local_load(drawn, workload, FULL)
        assert load.pairs >= min(workload.num_tokens, 2)
        on_grid = drawn.logits.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(drawn.logits, on_grid)
        assert len(np.unique(drawn.bias.astype(np.float32))) == 2


def test_draws_depend_on_the_seed_and_on_nothing_else():
    workload = select(["80"])[0]
    one, again, other = (routing.draw(workload, FULL, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.logits, again.logits)
    assert (one.logits != other.logits).mean() > 0.9


@pytest.mark.parametrize("sizes", [FULL, REDUCED])
def test_patterns_differ_in_balance_only(sizes):
    workload = select(["901"])[0]
    loads = {
        pattern: routing.local_load(routing.draw(workload, sizes, 0, pattern), workload, sizes)
        for pattern in ("balanced", "zipf", "one_hot")
    }
    assert {load.pairs for load in loads.values()} == {901}
    assert loads["balanced"].max_per_expert == -(-901 // sizes.num_local_experts)
    assert loads["one_hot"].active_experts == 1
    harmonic = sum(1 / r for r in range(1, sizes.num_local_experts + 1))
    assert abs(loads["zipf"].max_per_expert - 901 / harmonic) < 3
    with pytest.raises(ValueError, match="expected one of moments, balanced, zipf, one_hot"):
        routing.draw(workload, sizes, 0, "skewed")


def test_work_counts_each_byte_and_flop_once():
    hidden, intermediate = FULL.hidden_size, FULL.intermediate_size
    load = routing.LocalLoad(pairs=3, active_experts=2, max_per_expert=2, tokens=3)
    workload = select(["7"])[0]
    weights = 3 * intermediate * hidden
    scales = 4 * weights // 128**2
    token = hidden + 4 * hidden // 128 + 2 * hidden
    work = work_of(workload, FULL, load)
    assert work == Work(2 * (weights + scales) + 7 * token, 3 * 2 * weights)
    assert work.floor_us(read_bytes_per_s=1e12, fp8_flops_per_s=1e18) == pytest.approx(
        work.bytes / 1e6
    )
    assert work.floor_us(read_bytes_per_s=1e18, fp8_flops_per_s=1e12) == pytest.approx(
        work.flops / 1e6
    )


def test_select_takes_counts_prefixes_and_all():
    assert select(["all"]) == WORKLOADS
    assert len(WORKLOADS) == 19
    assert [w.num_tokens for w in select(["14107", "e05c6c03", "7"])] == [1, 7, 14107]
    assert [w.num_tokens for w in select(["e05c", "F7D6"])] == [1, 52]
    assert select(["482216"]) == select(["56"])  # digits, six of a uuid
    assert select(["80"]) == (next(w for w in WORKLOADS if w.num_tokens == 80),)
    assert [w.num_tokens for w in select(["all"], SCALING)] == [2**i for i in range(15)]
    # Five digits are a token count, and 2, 5 and 8 are the first of several uuids.
    for unknown in ("2", "5", "8", "48221", "3", "07", "zz", ""):
        with pytest.raises(ValueError, match=f"unknown workload '{unknown}'"):
            select([unknown])


def test_stand_ins_of_a_data_set_are_named(tmp_path):
    settings = Settings(("jax_moe",), inputs="dataset", dataset="/d")
    results = Results(tmp_path / "results.json", {"stand_ins": "stand-ins"}, "wall")
    assert header._routing_text(results, settings) == "from /d (stand-ins)"
    results.about.clear()
    assert header._routing_text(results, settings) == "from /d"


def _of_a_shared_expert():
    layer = shared_expert.make_layer(shared_expert.layer_config(models.DEEPSEEK_V3, REDUCED))
    x = jnp.zeros((4, REDUCED.hidden_size), jnp.bfloat16)
    forms = shared_expert.forms(layer, x)
    return [arguments for _, arguments in forms.values()], shared_expert.dense_inputs(x, layer)


@pytest.mark.parametrize(
    "specs",
    [
        lambda: parallel_inputs.input_specs(parallel_inputs.mesh_of(1), 4, REDUCED),
        lambda: jax.eval_shape(functools.partial(layers.make_model, 4, 2, REDUCED, own=True)),
        lambda: jax.eval_shape(_of_a_shared_expert),
    ],
    ids=["parallel", "layers", "shared_expert"],
)
def test_what_is_drawn_has_the_same_types_where_jax_has_64_bits(specs):
    expected = specs()
    with jax.enable_x64(True):
        assert specs() == expected
