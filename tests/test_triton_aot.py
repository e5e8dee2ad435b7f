"""What the compilers make of the Triton kernels, for GPUs that are not here."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jax_moe
from jax_moe import DEEPSEEK_V3
from jax_moe.models import MODELS
from pallas_kernels.triton import down_projection, tilings, tune, up_projection
from pallas_kernels.triton.grouped_matmul import MatmulConfig
from pallas_kernels.triton.launch import call
from pallas_kernels.tuning import table_format
from pallas_kernels.tuning.table_format import Sizes
from tests import h100_target
from tests.moe_inputs import rank_specs

F8, F16, F32, I32 = jnp.float8_e4m3fn, jnp.float16, jnp.float32, jnp.int32
HOPPER_SMEM, ADA_SMEM = 232448, 101376
SHORT_K_SPILL = 32  # bytes, of 128-row tiles on Hopper where K has fewer than 16 blocks
FAR_SPILL = 8  # bytes, of the same tiles where an expert's gate is over 16 MiB behind its up half
WIDENED_SPILL = 152  # bytes, of 64-row tiles of f16 on sm_120, at DeepSeek-V3's sizes
HIDDEN, INTERMEDIATE, LOCAL = DEEPSEEK = table_format.DEEPSEEK_V3


def specs(*shapes):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]


def compile_up(config, capability, sizes=DEEPSEEK, tiles=900, rows=F8, **epilogue):
    def up(*arrays):
        launch = up_projection.launch(*arrays, config=config, num_sms=132, **epilogue)
        return call(launch, capability)

    hidden, intermediate, local = sizes
    arrays = specs(
        ((14107, hidden), rows),
        ((hidden // 128, 14107), F32),
        ((local, 2 * intermediate, hidden), F8),
        ((local, 2 * intermediate // 128, hidden // 128), F32),
        ((tiles * config.block_m,), I32),
        ((tiles,), I32),
        ((1,), I32),
    )
    (kernel,) = h100_target.compile_triton_kernels(up, *arrays)
    return kernel


def compile_down(config, capability, sizes=DEEPSEEK, tiles=900, rows=F8):
    def down(*arrays):
        return call(down_projection.launch(*arrays, config=config, num_sms=132), capability)

    m, (hidden, intermediate, local) = tiles * config.block_m, sizes
    arrays = specs(
        ((m, intermediate), rows),
        ((intermediate // 128, m), F32),
        ((local, hidden, intermediate), F8),
        ((local, hidden // 128, intermediate // 128), F32),
        ((tiles,), I32),
        ((1,), I32),
    )
    (kernel,) = h100_target.compile_triton_kernels(down, *arrays)
    return kernel


@pytest.mark.parametrize("block_m", tilings.GENERATIONS[90].block_ms)
@pytest.mark.parametrize(("compile_one", "index"), [(compile_up, 0), (compile_down, 1)])
def test_shipped_tilings_multiply_in_fp8_and_spill_nothing_on_hopper(block_m, compile_one, index):
    config = tilings.choose(block_m, 90, *DEEPSEEK)[index]
    kernel = compile_one(config, 90)
    assert kernel.architecture == "sm_90a"
    assert kernel.spill_bytes == 0, kernel
    assert kernel.smem_bytes == config.smem_bytes(matmul_reads_smem=True) <= HOPPER_SMEM
    residents = max(config.programs_per_sm, 1)
    assert residents * (kernel.smem_bytes + 1024) <= HOPPER_SMEM + 1024
    assert residents * kernel.registers * 32 * config.num_warps <= 65536
    assert kernel.instructions["QGMMA"] == 8  # two dots of four steps of 32 bytes
    assert "HMMA" not in kernel.instructions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "block_m"),
    [(capability, m) for capability, has in tilings.GENERATIONS.items() for m in has.block_ms],
)
def test_a_clamp_and_powers_of_two_spill_nothing(capability, block_m):
    config = tilings.choose(block_m, capability, *DEEPSEEK).up_projection
    kernel = compile_up(config, capability, swiglu_limit=7.0, scale_format="ue8m0")
    assert kernel.spill_bytes == 0, kernel
    assert kernel.smem_bytes == compile_up(config, capability).smem_bytes


ADA_LIKE = (89, 120)
F16_INSTRUCTION = {89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA", 120: "HMMA"}
SMEM = {89: ADA_SMEM, 90: HOPPER_SMEM, 100: HOPPER_SMEM, 103: HOPPER_SMEM, 120: ADA_SMEM}
CASES = [
    pytest.param(capability, block_m, marks=[] if is_quick else pytest.mark.slow)
    for capability, has in tilings.GENERATIONS.items()
    for block_m in has.block_ms
    if capability != 90
    for is_quick in [block_m == 64 and capability != 103]
]


@pytest.mark.parametrize(("capability", "block_m"), CASES)
def test_every_shipped_tiling_of_other_generations_fits_them(capability, block_m):
    check_generation(capability, block_m, DEEPSEEK)


WIDENED = [
    pytest.param(capability, block_m, marks=[] if is_quick else pytest.mark.slow)
    for capability, has in tilings.GENERATIONS.items()
    for block_m in has.block_ms
    if block_m <= tilings.MAX_WIDENED_BLOCK_M
    for is_quick in [capability == 90 and block_m == 64]
]


@pytest.mark.parametrize(("capability", "block_m"), WIDENED)
def test_tilings_of_16_bit_rows_fit_every_generation(capability, block_m):
    check_widened(capability, block_m, DEEPSEEK)


def check_widened(capability, block_m, sizes):
    """Weights come from registers, so no f16 form of them is in shared memory."""
    chosen, has = (
        tilings.choose_widened(block_m, capability, *sizes),
        tilings.GENERATIONS[capability],
    )
    for config, compile_one in zip(chosen, (compile_up, compile_down), strict=True):
        kernel = compile_one(config, capability, sizes, rows=F16)
        most = has.smem_needed(config, widened=True)
        assert kernel.smem_bytes <= most <= has.smem_bytes == SMEM[capability]
        if capability in (90, *ADA_LIKE):
            assert kernel.smem_bytes == most
        multiplied = {"QGMMA", "QMMA", "UTCQMMA", "HGMMA", "HMMA", "UTCHMMA"}
        assert multiplied & set(kernel.instructions) == {F16_INSTRUCTION[capability]}
        is_tight = capability == 120 and block_m == 64
        assert kernel.spill_bytes <= (WIDENED_SPILL if is_tight else 0), kernel


@pytest.mark.parametrize(
    ("stages", "programs", "block_m", "most"), [(2, 3, 16, 6), (3, 3, 64, 5), (8, 0, 32, 6)]
)
def test_programs_of_16_bit_rows_pool_the_stages_that_fit(stages, programs, block_m, most):
    """However deep a table's pipeline is."""
    config = MatmulConfig(block_m, 4, stages, programs)
    widened = tilings.widened(config, 90)
    assert widened == MatmulConfig(block_m, 8, most, min(programs, 1), swap_ab=True)


def test_a_plan_of_wider_tiles_is_refused():
    with pytest.raises(ValueError, match=r'plan: expected one of plan_groups\(precision="high"\)'):
        tilings.choose_widened(128, 90, *DEEPSEEK)


@pytest.mark.slow
@pytest.mark.parametrize("capability", tilings.GENERATIONS)
@pytest.mark.parametrize(
    "sizes", sorted({Sizes(m.hidden_size, m.intermediate_size, 8) for m in MODELS}), ids=str
)
def test_the_largest_tiles_of_every_model_fit(capability, sizes):
    check_generation(capability, tilings.GENERATIONS[capability].block_ms[-1], sizes)
    check_widened(capability, tilings.MAX_WIDENED_BLOCK_M, sizes)


def test_few_steps_along_k_are_not_unrolled():
    """ptxas would, and spill 1,424 bytes: so the kernel hides from it how few they are."""
    sizes = Sizes(2048, 512, 8)
    kernel = compile_down(tilings.choose(128, 90, *sizes).down_projection, 90, sizes)
    assert kernel.instructions["QGMMA"] == 8
    assert kernel.spill_bytes <= SHORT_K_SPILL


def check_generation(capability, block_m, sizes):
    """Compiles both matmuls; 8 experts per rank are as good as more."""
    chosen, has = tilings.choose(block_m, capability, *sizes), tilings.GENERATIONS[capability]
    hidden, intermediate, _ = sizes
    assert has.smem_bytes == SMEM[capability]
    for config, kernel in (
        (chosen.up_projection, compile_up(chosen.up_projection, capability, sizes)),
        (chosen.down_projection, compile_down(chosen.down_projection, capability, sizes)),
    ):
        assert kernel.architecture.startswith(f"sm_{capability}")
        modelled = config.smem_bytes(matmul_reads_smem=has.matmul_reads_smem)
        assert modelled <= kernel.smem_bytes <= modelled + has.barrier_bytes <= has.smem_bytes
        is_tight = capability == 90 and block_m == 128
        is_short, is_far = intermediate < 2048, hidden * intermediate > 2**24
        most = SHORT_K_SPILL if is_short else FAR_SPILL if is_far else 0
        assert kernel.spill_bytes <= (most if is_tight else 0), kernel
        assert kernel.fp8_instructions > 0
        assert "HMMA" not in kernel.instructions


@pytest.mark.parametrize(
    ("num_tokens", "kernels"), [(80, 5), pytest.param(14107, 6, marks=pytest.mark.slow)]
)
def test_the_layer_is_one_cuda_graph_within_its_memory(num_tokens, kernels):
    def layer(*arguments):
        with jax_moe.assume_device("sm_90"):
            return jax_moe.apply(*arguments, backend="triton")

    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    report = h100_target.compile_for_h100(layer, *rank_specs(num_tokens).arguments)
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F8, jnp.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
def test_the_layer_in_16_bits_is_one_cuda_graph_within_its_memory(num_tokens, dtype):
    inputs = rank_specs(num_tokens)
    if dtype != F8:
        x = jax.ShapeDtypeStruct(inputs.hidden_states.shape, dtype)
        inputs = inputs._replace(hidden_states=x, hidden_states_scale=None)

    def layer(*arguments):
        with jax_moe.assume_device("sm_90"):
            return jax_moe.apply(*arguments, backend="triton", precision="high")

    report = h100_target.compile_for_h100(layer, *inputs.arguments)
    assert {k.name: k.spill_bytes for k in report.kernels if k.spill_bytes} == {}
    assert report.command_buffers == 1
    assert report.launches_outside_command_buffers == 0
    sizes = {"num_local_experts": LOCAL, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    with jax_moe.assume_device("sm_90"):
        bound = jax_moe.workspace_bytes(num_tokens, backend="triton", precision="high", **sizes)
    assert report.temp_bytes <= bound


@pytest.mark.parametrize("capability", [*tilings.GENERATIONS, 86, 110, 121])
def test_the_tilings_form_a_ladder(capability):
    """Also for capabilities without a table of their own: the nearest older one's."""
    has = tilings.GENERATIONS[tilings.generation(capability)]
    ladder = [tilings.block_m(2.0**i, capability) for i in range(-4, 14)]
    assert ladder == sorted(ladder)
    assert tuple(dict.fromkeys(ladder)) == has.block_ms
    assert set(has.block_ms) <= set(tilings.BLOCK_MS)
    for block_m in ladder:
        chosen = tilings.choose(block_m, capability, *DEEPSEEK)
        assert {config.block_m for config in chosen} == {block_m}


@pytest.mark.parametrize(
    ("capability", "known"), [(86, 89), (89, 89), (90, 90), (101, 100), (103, 103), (121, 120)]
)
def test_a_gpu_gets_the_tilings_of_its_family(capability, known):
    assert tilings.generation(capability) == known


@pytest.mark.parametrize("capability", tilings.GENERATIONS)
def test_the_tuner_offers_what_is_shipped(capability):
    kernels = tilings.kernels(capability)
    for block_m in kernels.block_ms:
        for role, config in tilings.choose(block_m, capability, *DEEPSEEK)._asdict().items():
            kernels.check(role, config, DEEPSEEK)
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


@pytest.mark.parametrize("choose", [tilings.choose, tilings.choose_widened])
def test_a_batch_invariant_call_takes_no_tuned_table(monkeypatch, choose):
    shipped = choose(64, 90, *DEEPSEEK)
    fewer = (dataclasses.replace(one, num_stages=1) for one in tilings.choose(64, 90, *DEEPSEEK))
    measured = tilings.chosen(90, Sizes(*DEEPSEEK))
    measured = measured._replace(table={**measured.table, 64: table_format.Pair(*fewer)})
    monkeypatch.setattr(tilings, "chosen", lambda *_: measured)
    assert choose(64, 90, *DEEPSEEK) != shipped
    assert choose(64, 90, *DEEPSEEK, only_shipped=True) == shipped
