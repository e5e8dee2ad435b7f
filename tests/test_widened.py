"""The matmuls of 16-bit rows: in the CPU interpreter, and what the compilers make of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

import jax_moe
from jax_moe.types import Quantized
from pallas_kernels.mosaic import routing_and_rows, tilings
from pallas_kernels.mosaic.hopper import widened
from pallas_kernels.mosaic.hopper.down_projection import down_projection
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig
from pallas_kernels.mosaic.hopper.up_projection import up_projection
from pallas_kernels.mosaic.unpermute import unpermute
from tests import h100_target
from tests.backend_cases import running, slow
from tests.moe_inputs import SMALL, make_inputs, rank_specs, relative_error
from tests.test_kernels_interpreted import (
    SCALES_OF_A_REUSED_SLOT,
    exact_product,
    grouped_rows,
    run,
    weights,
)

# Weights that were read to registers: as their scales, ordered by the mbarrier of the slot.
REUSED_SLOTS = SCALES_OF_A_REUSED_SLOT | {"load", "product", "Pipeline.produce"}


def f16_rows(sizes, block_m, columns):
    rows, plan, live = grouped_rows(sizes, block_m, columns)
    values = rows.values.astype(np.float32) * (1 + 2**-10)  # 11 bits, which only f16 holds
    return Quantized(values.astype(np.float16), rows.scales), plan, live


@pytest.mark.parametrize(
    ("block_m", "tail_widths", "sizes"),
    [
        pytest.param(16, (), [5, 0, 20, 16], id="empty expert, full tile", marks=pytest.mark.slow),
        pytest.param(64, (32, 48), [33, 0, 65, 64], id="tile +-1, narrow tails"),
    ],
)
def test_both_projections_of_16_bit_rows(block_m, tail_widths, sizes):
    """Sums of few bits are exact in f32; activations keep 11 bits."""
    rows, plan, live = f16_rows(sizes, block_m, 256)
    empty = [expert for expert, size in enumerate(sizes) if size == 0]
    w, w_scale = weights(len(sizes), 256, 256, empty)
    config = MatmulConfig(block_m, num_stages=2, tail_widths=tail_widths, sms=2)
    project = functools.partial(run, config=config, known_races=REUSED_SLOTS)
    expected = exact_product(rows, plan, w, w_scale)[live]
    out = project(down_projection, rows, plan, w, w_scale)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[live], expected, rtol=1e-6, atol=1e-3)
    (values, scales), _ = project(up_projection, rows, plan, w, w_scale)
    up, gate = np.split(expected, 2, axis=1)
    expected = gate / (1 + np.exp(-np.clip(gate, -700, 700))) * up
    amax = np.abs(expected).max(axis=1)
    assert values.dtype == np.float16
    np.testing.assert_array_equal(scales[0, live], 2.0 ** (np.floor(np.log2(amax)) - 14))
    found = values[live].astype(np.float64) * scales[0, live][:, None]
    # Small ones of a row are denormal in f16.
    tolerance = np.abs(expected) * 2**-10 + scales[0, live][:, None] * 2**-24
    assert (np.abs(found - expected) <= tolerance).all()


def registers_of(layout, shape):
    """A thread's registers in a layout: what number each [warp, lane] has in each of their places.

    Elements are numbered row by row. The array of registers is Mosaic's.
    """
    numbers = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        kept = numbers.ndim - len(tile)
        pairs = zip(numbers.shape[kept:], tile, strict=True)
        numbers = numbers.reshape(
            *numbers.shape[:kept], *(n for size, t in pairs for n in (size // t, t))
        )
        outer = range(kept, numbers.ndim, 2)
        numbers = numbers.transpose(*range(kept), *outer, *(i + 1 for i in outer))
    ours = [*layout.partitioned_warp_dims, *layout.partitioned_lane_dims, layout.vector_dim]
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    numbers = np.moveaxis(numbers, ours, range(-len(ours), 0))
    for place, register in zip(
        np.ndindex(registers.shape),
        numbers.reshape(registers.size, 4, 32, layout.vector_length),
        strict=True,
    ):
        registers[place] = register
    return registers


@pytest.mark.parametrize(
    ("was", "becomes", "rename", "shape"),
    [
        (plgpu.Layout.WGMMA_UPCAST_2X, plgpu.Layout.WGMMA, "_as_pairs", (64, 128)),
        (widened._ORDERED, widened.ROW_LAYOUT, "_same", (8, 64)),
        (widened._ORDERED, widened.ROW_LAYOUT, "_same", (16, 128)),
    ],
    ids=["weights", "activations", "tokens"],
)
def test_renamed_registers_hold_columns_in_wgmma_order(was, becomes, rename, shape, monkeypatch):
    """A thread takes a column for the one in whose place `wgmma_order` puts it."""
    monkeypatch.setattr(mgpu.utils, "vector_slice", lambda register, part: register[..., part])
    monkeypatch.setattr(mgpu.utils, "vector_concat", lambda parts: np.concatenate(parts, axis=-1))
    meant = registers_of(becomes.to_mgpu(), shape)
    renamed = getattr(widened, rename)(registers_of(was.to_mgpu(), shape), meant.shape)
    columns = np.arange(shape[1], dtype=np.float16)
    order = np.asarray(widened.wgmma_order(columns)).astype(int)
    assert order[:16].tolist() == [0, 1, 8, 9, 4, 5, 12, 13, 2, 3, 10, 11, 6, 7, 14, 15]
    np.testing.assert_array_equal(widened.wgmma_order(columns[order]), columns)
    for held, wanted in zip(renamed.flat, meant.flat, strict=True):
        row, column = np.divmod(wanted, shape[1])
        np.testing.assert_array_equal(held, row * shape[1] + order[column])


@pytest.mark.slow
@pytest.mark.parametrize(("num_tokens", "expected_rows"), [(9, 2.0), (41, 20.0)])
def test_the_layer_in_the_interpreter(num_tokens, expected_rows):
    inputs = make_inputs(num_tokens)
    x = np.random.default_rng(5).standard_normal(inputs.hidden_states.shape, np.float32)
    inputs = inputs._replace(hidden_states=x.astype(ml_dtypes.bfloat16), hidden_states_scale=None)
    options = {"config": SMALL, "precision": "high", "expected_rows": expected_rows}
    with running("interpreted_mosaic") as backend:
        out = jax_moe.apply(*inputs.arguments, backend=backend, **options)
    assert relative_error(out, jax_moe.reference(*inputs.arguments, config=SMALL)) <= 0.004
    assert relative_error(out, jax_moe.apply(*inputs.arguments, backend="xla", **options)) <= 1e-3


@pytest.mark.parametrize(
    ("num_tokens", "dtype"),
    [
        slow(1, "float8_e4m3fn"),
        *(slow(t, "float8_e4m3fn") for t in (64, 901, 4096)),
        *(slow(t, "bfloat16") for t in (1, 64, 901, 4096)),
    ],
)
def test_the_layer_is_one_cuda_graph_of_kernels_that_do_not_spill(num_tokens, dtype, tmp_path):
    specs = rank_specs(num_tokens)
    if dtype != "float8_e4m3fn":
        x = jax.ShapeDtypeStruct(specs.hidden_states.shape, dtype)
        specs = specs._replace(hidden_states=x, hidden_states_scale=None)

    def layer(*arguments):
        with jax_moe.assume_device("sm_90"):
            return jax_moe.apply(*arguments, backend="mosaic", precision="high")

    report = h100_target.compile_for_h100(layer, *specs.arguments, dump=tmp_path)
    spilled = {kernel.name: kernel.spill_bytes for kernel in report.kernels if kernel.spill_bytes}
    assert spilled == {}
    is_in_one_launch = num_tokens <= routing_and_rows.MAX_TOKENS
    if dtype == "float8_e4m3fn":  # rows are widened beside the routing
        roots = h100_target.launches_that_wait_for_none(tmp_path)
        assert roots == (1 if is_in_one_launch else 2)
    if is_in_one_launch:
        assert sum(report.launches.values()) == 5
    multiplying = {kernel.name for kernel in report.kernels if "HGMMA" in kernel.instructions}
    assert multiplying == {"moe_up_projection", "moe_down_projection"}
    assert report.command_buffers == 1
    assert report.launches_outside_command_buffers == 0
    sizes = {"num_local_experts": 32, "hidden_size": 7168, "intermediate_size": 2048}
    with jax_moe.assume_device("sm_90"):
        bound = jax_moe.workspace_bytes(num_tokens, backend="mosaic", precision="high", **sizes)
    assert report.temp_bytes <= bound


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("sizes", [(7168, 2048, 32), (384, 128, 3), (2048, 768, 128)])
def test_tilings_fit(block_m, sizes):
    """Building the kernels raises nothing, such as for too much shared memory."""
    hidden, intermediate, experts = sizes
    pair = tilings.choose_widened(block_m, *sizes)
    _, plan, _ = grouped_rows([1] * experts, block_m, 128)
    shape = jax.ShapeDtypeStruct
    for project, config, n, k in (
        (up_projection, pair.up_projection, 2 * intermediate, hidden),
        (down_projection, pair.down_projection, hidden, intermediate),
    ):
        m = plan.row_token.shape[0]
        rows = Quantized(shape((m, k), jnp.float16), shape((k // 128, m), jnp.float32))
        w = shape((experts, n, k), jnp.float8_e4m3fn)
        scales = shape((experts, n // 128, k // 128), jnp.float32)
        jax.eval_shape(functools.partial(project, config=config), rows, plan, w, scales)


def test_tiles_that_do_not_fit_are_refused():
    rows, plan, _ = f16_rows([1], 128, 256)
    config = MatmulConfig(128, num_stages=2)
    with pytest.raises(ValueError, match="expected tiles of fewer than 128 tokens"):
        up_projection(rows, plan, *weights(1, 256, 256), config=config)
    with pytest.raises(ValueError, match=r'plan: expected one of plan_groups\(precision="high"\)'):
        tilings.choose_widened(128, 256, 128, 8)


def test_unpermute_adds_float32_rows():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((8, 256), np.float32)
    pair_row = np.array([[3, -1], [0, 7], [-1, -1]], np.int32)
    factors = rng.standard_normal((3, 2), np.float32)
    out = run(unpermute, rows, factors, pair_row, output_dtype="float32")
    expected = np.where(pair_row >= 0, factors, 0)[:, :, None] * rows[pair_row]
    np.testing.assert_allclose(out, expected.sum(1), rtol=1e-5, atol=1e-6)
