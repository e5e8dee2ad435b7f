"""Every Mosaic GPU kernel in the CPU interpreter, at toy sizes, with race detection.

The layer as a whole, on this path, is in test_backends.py. `uninitialized memory is NaN` and
`out-of-bounds reads raise` in the interpreter, so a stray read shows.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import special

import jax_moe
from jax_moe.types import GroupPlan, Quantized
from pallas_kernels.mosaic import group_quant, membership, permute, routing, unpermute
from pallas_kernels.mosaic import plan as plan_kernels
from pallas_kernels.mosaic.hopper.down_projection import down_projection
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig
from pallas_kernels.mosaic.hopper.up_projection import up_projection
from tests import numpy_oracle, race_detector
from tests.backend_cases import slow
from tests.moe_inputs import bits
from tests.test_plan import check_plan, draw_ids

E4M3 = ml_dtypes.float8_e4m3fn

# The detector wants a proxy fence between plain reads of shared memory and the TMA copy that
# reuses it. On the GPU the mbarrier hand-off of the slot orders the two.
SCALES_OF_A_REUSED_SLOT = {"accumulate.<locals>.step", "_copy_step"}
# The last rows of an odd count are quantized by two blocks, to the same bits.
OVERLAPPING_ROWS = {"store"}  # `layouts.store`


def run(kernel, *args, known_races=frozenset(), **options):
    with race_detector.output() as text:
        jitted = jax.jit(functools.partial(kernel, interpret=race_detector.INTERPRET, **options))
        result = jax.tree.map(np.asarray, jitted(*args))
    accesses = re.findall(r"^ *(?:read|write) of .*\(([^()]*)\)$", text.getvalue(), re.MULTILINE)
    assert ("RACE DETECTED" in text.getvalue()) == bool(accesses)
    assert set(accesses) <= set(known_races)
    return result


def grouped_rows(sizes, block_m, columns, seed=0):
    """Integers times powers of two, a scale of its own for each (row, block); NaN as padding.

    Returns the rows, their plan, whose tokens are in the order of the rows, and the live rows.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array(sizes, np.int32)
    tiles = -(-sizes // block_m)
    offsets = (np.cumsum(tiles) - tiles).astype(np.int32) * block_m
    num_rows = -(-(int(tiles.sum()) + 1) * block_m // 32) * 32
    tile_expert = np.zeros(num_rows // block_m, np.int32)
    tile_expert[: tiles.sum()] = np.repeat(np.arange(len(sizes)), tiles)
    live = np.zeros(num_rows, bool)
    for offset, size in zip(offsets, sizes, strict=True):
        live[offset : offset + size] = True
    values = np.full((num_rows, columns), np.nan, np.float32)
    values[live] = rng.integers(-3, 4, (live.sum(), columns))
    scales = np.full((columns // 128, num_rows), np.nan, np.float32)
    scales[:, live] = 2.0 ** rng.integers(-3, 4, (columns // 128, live.sum()))
    row_token = np.where(live, np.arange(num_rows), -1).astype(np.int32)
    num_tiles = np.array([tiles.sum()], np.int32)
    pair_row = np.zeros((1, 1), np.int32)  # matmuls do not read it
    plan = GroupPlan(sizes, offsets, row_token, pair_row, tile_expert, num_tiles)
    return Quantized(values.astype(E4M3), scales), plan, live


def weights(experts, rows, columns, empty=(), seed=1):
    rng = np.random.default_rng(seed)
    values = rng.integers(-2, 3, (experts, rows, columns)).astype(np.float32)
    values[list(empty)] = np.nan  # an expert without rows must not be read into a result
    scales = 2.0 ** rng.integers(-3, 3, (experts, rows // 128, columns // 128))
    return values.astype(E4M3), scales.astype(np.float32)


def exact_product(rows, plan, values, scales):
    """`f64[M, N]`, every live row times its expert's weights."""
    x = rows.values.astype(np.float64).reshape(len(rows.values), -1, 128)
    x = (x * rows.scales.T[:, :, None]).reshape(rows.values.shape)
    experts, n, k = values.shape
    w = values.astype(np.float64).reshape(experts, n // 128, 128, k // 128, 128)
    w = (w * scales[:, :, None, :, None]).reshape(values.shape)
    out = np.full((len(x), n), np.nan)
    for expert, (offset, size) in enumerate(zip(plan.group_offsets, plan.group_sizes, strict=True)):
        out[offset : offset + size] = x[offset : offset + size] @ w[expert].T
    return out


SIZES = [
    pytest.param(16, (), [5, 0, 20, 16], id="empty expert, full tile"),
    pytest.param(16, (), [0, 0, 0, 0], id="no rows"),
    pytest.param(64, (32, 48), [33, 0, 65, 64], id="tile +-1, narrow tails"),
    pytest.param(128, (32, 64, 96), [0, 130, 0, 0], id="one expert takes all"),
]


@pytest.mark.parametrize(("block_m", "tail_widths", "sizes"), SIZES)
@pytest.mark.parametrize("hidden_size", [slow(256), 384])
def test_down_projection_is_exact(block_m, tail_widths, sizes, hidden_size):
    """Representable values and distinct scales: the bf16 result must be right to the bit."""
    rows, plan, live = grouped_rows(sizes, block_m, columns=256)
    empty = [expert for expert, size in enumerate(sizes) if size == 0]
    w, w_scale = weights(len(sizes), hidden_size, 256, empty)
    config = MatmulConfig(block_m, num_stages=2, tail_widths=tail_widths, sms=2)
    out = run(
        down_projection, rows, plan, w, w_scale, config=config, known_races=SCALES_OF_A_REUSED_SLOT
    )
    expected = exact_product(rows, plan, w, w_scale)[live].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out[live], expected)


def test_sums_of_segments_are_exact():
    """Four steps of K in two segments, as where tiles may be split; the interpreter splits none."""
    rows, plan, live = grouped_rows([5, 0, 17], 16, columns=512)
    w, w_scale = weights(3, 256, 512, empty=[1])
    config = MatmulConfig(16, num_stages=2, sms=2, split_k_steps=2)
    out = run(
        down_projection, rows, plan, w, w_scale, config=config, known_races=SCALES_OF_A_REUSED_SLOT
    )
    expected = exact_product(rows, plan, w, w_scale)[live].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out[live], expected)


@pytest.mark.parametrize(("block_m", "tail_widths", "sizes"), SIZES)
def test_up_projection(block_m, tail_widths, sizes):
    rows, plan, live = grouped_rows(sizes, block_m, columns=256)
    empty = [expert for expert, size in enumerate(sizes) if size == 0]
    w, w_scale = weights(len(sizes), 512, 256, empty)
    config = MatmulConfig(block_m, num_stages=3, tail_widths=tail_widths, sms=2)
    (values, scales), _ = run(
        up_projection, rows, plan, w, w_scale, config=config, known_races=SCALES_OF_A_REUSED_SLOT
    )
    up, gate = np.split(exact_product(rows, plan, w, w_scale)[live], 2, axis=1)
    expected = gate / (1 + np.exp(-np.clip(gate, -700, 700))) * up
    blocks = expected.reshape(len(expected), 2, 128)
    amax = np.abs(blocks).max(axis=2)
    np.testing.assert_allclose(scales.T[live] * 448, amax, rtol=0.005)  # bf16 before the amax
    found = values[live].astype(np.float64).reshape(blocks.shape) * scales.T[live][:, :, None]
    # Half an ulp of e4m3 at the top of its range is 16 of 448; bf16 adds 1 / 256.
    assert (np.abs(found - blocks) <= amax[:, :, None] * (16 / 448 + 1 / 256)).all()


def test_up_projection_clamps_and_rounds_scales_up():
    """A full tile of 128 tokens and a narrow one, so both epilogues; NaN in one row of each."""
    rows, plan, live = grouped_rows([0, 130], 128, columns=128)
    rows.scales[0, [5, 129]] = np.nan
    arrays = rows, plan, *weights(2, 256, 128)
    found, _ = run(
        functools.partial(up_projection, swiglu_limit=4.0, scale_format="ue8m0"),
        *arrays,
        config=MatmulConfig(128, num_stages=2, tail_widths=(32,), sms=1),
        known_races=SCALES_OF_A_REUSED_SLOT,
    )
    up, gate = np.split(exact_product(*arrays)[live], 2, axis=1)
    assert (gate > 4).any()
    assert (abs(up) > 4).any()
    gate, up = np.minimum(gate, 4), np.clip(up, -4, 4)
    expected = gate * special.expit(gate) * up
    expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    values, scales = numpy_oracle.quantize(expected, "ue8m0")
    finite = np.flatnonzero(np.isfinite(expected).all(axis=1))
    assert set(range(130)) - set(finite) == {5, 129}
    # XLA's maximum may drop a NaN on a CPU: then the values hold it.
    assert np.isnan(found.values[[5, 129]].astype(np.float32) * found.scales.T[[5, 129]]).all()
    np.testing.assert_array_equal(found.scales[:, finite], scales[:, finite])
    found, values = (part[finite].astype(np.float32) for part in (found.values, values))
    assert (found == values).mean() > 0.99
    np.testing.assert_allclose(found, values, rtol=1 / 8, atol=2**-9)  # one step of e4m3


def test_matmul_config_rejects_what_does_not_fit():
    with pytest.raises(ValueError, match="block_m: expected 16 or a multiple of 32"):
        MatmulConfig(block_m=24, num_stages=4)
    with pytest.raises(ValueError, match="num_stages: expected at least 2, got 1"):
        MatmulConfig(block_m=64, num_stages=1)
    with pytest.raises(ValueError, match="split_k_steps: expected None, or at least 1"):
        MatmulConfig(block_m=16, num_stages=4, split_k_steps=2, scheduler="dynamic")
    with pytest.raises(ValueError, match="scheduler: expected 'static' or 'dynamic', got 'fair'"):
        MatmulConfig(block_m=16, num_stages=4, scheduler="fair")
    with pytest.raises(ValueError, match="tail_widths: expected ascending multiples of 16"):
        MatmulConfig(block_m=64, num_stages=4, tail_widths=(32, 16))
    rows, plan, _ = grouped_rows([1], 128, columns=256)
    w, w_scale = weights(1, 256, 256)
    with pytest.raises(ValueError, match=r"needs \d+ bytes of shared memory of 232448"):
        down_projection(rows, plan, w, w_scale, config=MatmulConfig(block_m=128, num_stages=6))
    with pytest.raises(ValueError, match="expected the plan's block_m=128, got block_m=64"):
        down_projection(rows, plan, w, w_scale, config=MatmulConfig(block_m=64, num_stages=2))


@pytest.mark.parametrize("rows", [1, 3, 21])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_group_quant_bits(rows, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 256)) * 10 ** rng.uniform(-4, 4, (rows, 1))
    x[0, :128] = 0
    x[-1, 128:132] = 447.9, -0.0, 464, 1e-40
    x = x.astype(dtype)
    values, scales = run(group_quant.quantize, x, known_races=OVERLAPPING_ROWS)
    expected_values, expected_scales = numpy_oracle.quantize(x.astype(np.float32))
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(values.view(np.uint8), expected_values.view(np.uint8))


@pytest.mark.parametrize(("columns", "is_padded"), [(384, True), (512, False), (640, False)])
def test_a_row_of_a_group_for_each_warp_is_quantized_without_copies(columns, is_padded):
    x = jax.ShapeDtypeStruct((1, columns), jnp.float32)
    assert ("pad[" in str(jax.make_jaxpr(group_quant.quantize)(x))) == is_padded


def test_group_quant_by_powers_of_two():
    rng = np.random.default_rng(0)
    exponents = rng.integers(-126, 128, (47, 1)) + rng.integers(-10, 1, (47, 256))
    x = np.ldexp(rng.uniform(-1, 1, (47, 256)), exponents).astype(np.float32)
    above, below = (np.nextafter(np.float32(448), np.float32(to)) for to in (449, 447))
    x[:5, :128] = np.array([448, above, below, 0, 1e-40])[:, None]
    x[5, 3], x[6, 200], x[7, 0] = np.nan, np.inf, -np.inf
    found = run(
        functools.partial(group_quant.quantize, scale_format="ue8m0"),
        x,
        known_races=OVERLAPPING_ROWS,
    )
    np.testing.assert_array_equal(found.scales[0, :5], [1, 2, 1, 2.0**-126, 2.0**-126])
    for part, expected in zip(found, numpy_oracle.quantize(x, "ue8m0"), strict=True):
        is_nan = np.isnan(expected.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(part.astype(np.float32)), is_nan)
        np.testing.assert_array_equal(bits(part)[~is_nan], bits(expected)[~is_nan])


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "n_group", "topk_group"),
    [
        (5, 256, 8, 8, 4),
        slow(3, 32, 4, 4, 2),
        (6, 40, 3, 1, 1),
        slow(5, 256, 8, 4, 2),  # groups of two registers
        (3, 72, 3, 3, 2),  # groups that share a register
        # From here on too many experts, groups or choices for registers.
        slow(5, 384, 8, 1, 1),
        (4, 301, 10, 7, 3),
        (3, 1024, 16, 2, 1),  # groups that are read in steps
        (3, 128, 33, 1, 1),  # more choices than lanes
        slow(3, 70, 5, 35, 34),  # more groups than lanes
    ],
)
def test_routing(num_tokens, num_experts, top_k, n_group, topk_group):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((num_tokens, num_experts)).astype(np.float32)
    logits[0] = 0.5  # ties everywhere: the lowest ids win
    logits[1, ::3] = np.nan
    logits[2, 1::2] = -120  # reciprocals that are denormal
    bias = np.where(rng.random(num_experts) < 0.4, 4.96875, 4.9375).astype(ml_dtypes.bfloat16)
    options = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}
    ids, topk_weights = run(routing.route, logits, bias, np.float32(2.5), **options)
    config = jax_moe.MoEConfig(**options)
    expected = jax_moe.route(logits, bias, 2.5, config=config, backend="xla")
    np.testing.assert_array_equal(ids, expected.topk_ids)
    np.testing.assert_allclose(topk_weights, expected.topk_weights, rtol=1e-6)


# `_COUNTED_BY_ALL`, `_MAX_BLOCKS` and `_MAX_PAIRS_PER_THREAD`
ONE_LAUNCH, TWO_LAUNCHES, MANY_BLOCKS = (10**6, 64, 16), (0, 2, 1), (0, 64, 16)


@pytest.mark.parametrize(
    (
        "counted_by_all", "max_blocks", "pairs_per_thread",
        "num_tokens", "num_experts", "num_local_experts", "top_k", "offset", "block_m",
    ),
    [
        (*ONE_LAUNCH, 5, 32, 8, 4, 8, 16),
        slow(*TWO_LAUNCHES, 5, 32, 8, 4, 8, 16),
        slow(*ONE_LAUNCH, 70, 32, 8, 4, 24, 32),
        (*TWO_LAUNCHES, 70, 32, 8, 4, 24, 32),
        (*ONE_LAUNCH, 3, 600, 300, 3, 250, 16),  # more experts than threads
        (*MANY_BLOCKS, 70, 2000, 256, 3, 70, 16),  # histogram in steps, no column to spare
        slow(*ONE_LAUNCH, 290, 8, 5, 1, 0, 1),  # more words of tokens than are unrolled
        (*TWO_LAUNCHES, 290, 8, 5, 1, 0, 1),
    ],
)  # fmt: skip
def test_plan(
    num_tokens, num_experts, num_local_experts, top_k, offset, block_m,
    counted_by_all, max_blocks, pairs_per_thread, monkeypatch,
):  # fmt: skip
    monkeypatch.setattr(plan_kernels, "_COUNTED_BY_ALL", counted_by_all)
    monkeypatch.setattr(plan_kernels, "_MAX_BLOCKS", max_blocks)
    monkeypatch.setattr(membership, "_MAX_PAIRS_PER_THREAD", pairs_per_thread)
    ids = draw_ids(num_tokens, num_experts, top_k)
    ids[num_tokens // 2, -1] = ids[num_tokens // 2, 0]
    ids[1], ids[0, 0] = -1, offset + num_local_experts - 1  # the last expert has tokens
    plan, zeros = run(
        plan_kernels.plan_with_zeros,
        ids,
        np.int32(offset),
        num_local_experts=num_local_experts,
        num_experts=num_experts,
        block_m=block_m,
        zeros=(264, 2),
    )
    check_plan(plan, ids, offset, num_local_experts, num_experts)
    assert [array.tolist() for array in zeros] == [[0] * 264, [0] * 2]


@pytest.mark.parametrize("num_blocks", [3, 28, 29])
def test_permute(num_blocks):
    """Experts of two tiles, of none and of one; tokens of two, of one and of no expert."""
    rng = np.random.default_rng(0)
    block_m, live = 128, 3 * 128
    pair_row = np.full((133, 2), -1, np.int32)
    pair_row[2:132, 0] = np.arange(130)
    pair_row[[0, 70, 131], [0, 1, 1]] = 2 * block_m + np.arange(3)
    token, choice = np.nonzero(pair_row >= 0)
    taken = pair_row[token, choice]
    row_token = np.full(5 * block_m, -1, np.int32)
    row_token[taken] = token
    row_token[live:] = rng.choice([2**30, 133, -(2**30), 0], 2 * block_m)  # unwritten memory
    x = rng.standard_normal((133, num_blocks * 128)).astype(E4M3)
    x_scale = rng.random((num_blocks, 133)).astype(np.float32)
    plan = GroupPlan(
        np.array([130, 0, 3], np.int32),
        np.array([0, 256, 256], np.int32),
        row_token,
        pair_row,
        np.array([0, 0, 2, 0, 0], np.int32),
        np.array([3], np.int32),
    )
    rows, row_scales = run(permute.permute_rows, Quantized(x, x_scale), plan)
    np.testing.assert_array_equal(rows[taken].view(np.uint8), x[token].view(np.uint8))
    np.testing.assert_array_equal(row_scales[:, taken], x_scale[:, token])
    padding = np.setdiff1d(np.arange(live), taken)
    for found, given in zip(row_scales[:, padding], x_scale, strict=True):
        assert np.isin(found, given).all(), "padding has scales of the same block"
    assert np.isnan(row_scales[:, live:]).all(), "nothing is written past the live tiles"


@pytest.mark.parametrize(
    ("num_tiles", "num_rows", "message"),
    [
        (2, 128, "plan: expected block_m a multiple of 128, got 64"),
        (1, 0, "plan: expected block_m a multiple of 128, got 0"),
        (2, 257, "plan: expected whole tiles of 128 rows, got 257 rows"),
    ],
)
def test_permute_refuses_tiles_that_do_not_fit(num_tiles, num_rows, message):
    one = np.ones(1, np.int32)
    plan = GroupPlan(
        one, one, np.zeros(num_rows, np.int32), one[None], np.zeros(num_tiles, np.int32), one
    )
    tokens = Quantized(np.zeros((1, 128), E4M3), np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match=message):
        permute.permute_rows(tokens, plan)


@pytest.mark.parametrize("few_tokens", [0, 256])
@pytest.mark.parametrize(("top_k", "hidden_size"), [(2, 256), (8, 2048), (11, 384)])
def test_combine(few_tokens, top_k, hidden_size, monkeypatch):
    """All rows that are not local, among them those of tokens without one, hold NaN."""
    monkeypatch.setattr(unpermute, "_FEW_TOKENS", few_tokens)
    rng = np.random.default_rng(0)
    pair_row = np.where(rng.random((6, top_k)) < 0.4, rng.permutation(6 * top_k).reshape(6, -1), -1)
    pair_row[2] = -1
    token, choice = np.nonzero(pair_row >= 0)
    taken = pair_row[token, choice]
    outputs = np.full((6 * top_k, hidden_size), np.nan, ml_dtypes.bfloat16)
    outputs[taken] = rng.standard_normal((len(taken), hidden_size))
    topk_weights = rng.random((6, top_k)).astype(np.float32)
    topk_weights[pair_row < 0] = np.nan
    with monkeypatch.context() as patched:
        patched.delattr(unpermute, "_sum_row" if few_tokens else "_sum_part")  # not to be used
        found = run(unpermute.unpermute, outputs, topk_weights, pair_row.astype(np.int32))
    expected = np.zeros((6, hidden_size), np.float32)
    for t, k in zip(token, choice, strict=True):
        expected[t] += topk_weights[t, k] * outputs[pair_row[t, k]].astype(np.float32)
    np.testing.assert_array_equal(found, expected.astype(ml_dtypes.bfloat16))

    idle = (pair_row < 0).all(axis=1)
    assert idle[2]
    zeroed = np.full((6, hidden_size), np.nan, ml_dtypes.bfloat16)
    zeroed[idle] = 7  # so that it is seen who wrote them
    expected[idle] = 7
    pairs = topk_weights, pair_row.astype(np.int32)
    found = run(
        lambda z, *rest, **how: unpermute.unpermute(*rest, zeroed=z, **how), zeroed, outputs, *pairs
    )
    np.testing.assert_array_equal(found, expected.astype(ml_dtypes.bfloat16))


def test_outputs_are_jax_arrays():
    """The wrappers take numpy and jax arrays alike."""
    x = jnp.ones((4, 128), jnp.bfloat16)
    values, scales = group_quant.quantize(x, interpret=race_detector.INTERPRET)
    assert values.dtype == jnp.float8_e4m3fn
    assert scales.shape == (1, 4)
