"""What the compilers make of the Triton kernels, for GPUs that are not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jax_moe
from jax_moe import DEEPSEEK_V3
from pallas_kernels.triton import down_projection, tilings, tune, up_projection
from pallas_kernels.triton.grouped_matmul import MatmulConfig
from pallas_kernels.triton.launch import call
from tests import h100_target
from tests.moe_inputs import rank_specs

F8, F32, I32 = jnp.float8_e4m3fn, jnp.float32, jnp.int32
HOPPER_SMEM, ADA_SMEM = 232448, 101376
HIDDEN, INTERMEDIATE, LOCAL = 7168, 2048, 32  # DeepSeek-V3's, which the tilings are made for


def specs(*shapes):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]


def compile_up(config, capability, tiles=900):
    def up(*arrays):
        return call(up_projection.launch(*arrays, config=config, num_sms=132), capability)

    arrays = specs(
        ((14107, HIDDEN), F8),
        ((HIDDEN // 128, 14107), F32),
        ((LOCAL, 2 * INTERMEDIATE, HIDDEN), F8),
        ((LOCAL, 2 * INTERMEDIATE // 128, HIDDEN // 128), F32),
        ((tiles * config.block_m,), I32),
        ((tiles,), I32),
        ((1,), I32),
    )
    (kernel,) = h100_target.compile_triton_kernels(up, *arrays)
    return kernel


def compile_down(config, capability, tiles=900):
    def down(*arrays):
        return call(down_projection.launch(*arrays, config=config, num_sms=132), capability)

    rows = tiles * config.block_m
    arrays = specs(
        ((rows, INTERMEDIATE), F8),
        ((INTERMEDIATE // 128, rows), F32),
        ((LOCAL, HIDDEN, INTERMEDIATE), F8),
        ((LOCAL, HIDDEN // 128, INTERMEDIATE // 128), F32),
        ((tiles,), I32),
        ((1,), I32),
    )
    (kernel,) = h100_target.compile_triton_kernels(down, *arrays)
    return kernel


@pytest.mark.parametrize("block_m", tilings.BLOCK_MS)
@pytest.mark.parametrize(("compile_one", "index"), [(compile_up, 0), (compile_down, 1)])
def test_shipped_tilings_multiply_in_fp8_and_spill_nothing_on_hopper(block_m, compile_one, index):
    config = tilings.choose(block_m, 90)[index]
    kernel = compile_one(config, 90)
    assert kernel.architecture == "sm_90a"
    assert kernel.spill_bytes == 0, kernel
    assert kernel.smem_bytes == config.smem_bytes <= HOPPER_SMEM
    residents = max(config.programs_per_sm, 1)
    assert residents * (kernel.smem_bytes + 1024) <= HOPPER_SMEM + 1024
    assert residents * kernel.registers * 32 * config.num_warps <= 65536
    assert kernel.instructions["QGMMA"] == 8  # two dots of four steps of 32 bytes
    assert "HMMA" not in kernel.instructions


@pytest.mark.parametrize(("capability", "smem"), [(89, ADA_SMEM), (100, HOPPER_SMEM)])
@pytest.mark.parametrize("rows_per_expert", [1, 12, 28, 440])
def test_every_tiling_compiles_for_other_generations(capability, smem, rows_per_expert):
    block_m = tilings.choose_block_m(rows_per_expert, capability)
    chosen = tilings.choose(block_m, capability)
    for kernel in (
        compile_up(chosen.up_projection, capability),
        compile_down(chosen.down_projection, capability),
    ):
        assert kernel.architecture.startswith(f"sm_{capability}")
        assert kernel.smem_bytes <= smem
        assert kernel.spill_bytes == 0, kernel
        assert kernel.fp8_instructions > 0
        assert "HMMA" not in kernel.instructions


@pytest.mark.parametrize(("num_tokens", "kernels"), [(80, 5), (14107, 6)])
def test_the_layer_is_one_cuda_graph_within_its_memory(num_tokens, kernels):
    def layer(*arguments):
        with jax_moe.assume_device("sm_90"):
            return jax_moe.apply(*arguments, backend="triton")

    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    report = h100_target.compile_for_h100(layer, *rank_specs(num_tokens))
    assert len(report.kernels) == kernels
    assert [k.name for k in report.kernels if k.spill_bytes] == []
    assert report.command_buffers == 1
    assert report.launches_outside_command_buffers == 0
    assert sum(report.launches.values()) <= kernels + 1
    with jax_moe.assume_device("sm_90"):
        bound = jax_moe.workspace_bytes(
            num_tokens, num_local_experts=LOCAL, backend="triton", config=DEEPSEEK_V3, **sizes
        )
    assert report.temp_bytes <= bound <= 2.5e9


def test_the_tilings_form_a_ladder():
    for capability in (89, 90, 100, 120):
        ladder = [tilings.choose_block_m(2.0**i, capability) for i in range(-4, 14)]
        assert ladder == sorted(ladder)
        for block_m in ladder:
            assert {c.block_m for c in tilings.choose(block_m, capability)} == {block_m}


def test_the_tuner_offers_what_is_shipped():
    for block_m in tilings.BLOCK_MS:
        for config in tilings.choose(block_m, 90):
            assert config.smem_bytes <= HOPPER_SMEM
            for field, values in tune.CHOICES.items():
                assert getattr(config, field) in values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_m", 48),
        ("num_warps", 3),
        ("num_stages", 0),
        ("programs_per_sm", -1),
        ("swap_ab", 2),
    ],
)
def test_a_tiling_out_of_range_is_refused(field, value):
    fields = {"block_m": 64, field: value}
    with pytest.raises(ValueError, match=f"{field}: expected one of .*, got {value}"):
        MatmulConfig(**fields)
