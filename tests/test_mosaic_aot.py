"""What the compilers make of the Mosaic kernels and the layer around them, at full size."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe.models import MODELS
from pallas_kernels.mosaic.hopper import zero_rows
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig
from pallas_kernels.mosaic.hopper.up_projection import up_projection
from tests import h100_target
from tests.backend_cases import slow
from tests.moe_inputs import rank_specs, replaced
from tests.test_kernels_interpreted import grouped_rows, weights

TOKENS = (1, 80, 901, 14107)  # at least one of each tile height
QUICK = (1, 14107)  # rows gathered on the way, and copied before; weights as rows, and tokens
SIZES = {"num_local_experts": 32, "hidden_size": 7168, "intermediate_size": 2048}


BOTH = {"swiglu_limit": 7.0, "scale_format": "ue8m0"}


def layer(*arguments, **options):
    with jax_moe.assume_device("sm_90"):
        return jax_moe.apply(*arguments, **options, backend="mosaic")


def specs_of(num_tokens, dtype="float8_e4m3fn", **sizes):
    specs = rank_specs(num_tokens, **sizes)
    if dtype == "float8_e4m3fn":
        return specs
    x = jax.ShapeDtypeStruct(specs.hidden_states.shape, dtype)
    return specs._replace(hidden_states=x, hidden_states_scale=None)


def programs():
    """For `python -m tests.h100_target tests.test_mosaic_aot:programs`."""
    for num_tokens in TOKENS:
        yield f"T={num_tokens}", layer, rank_specs(num_tokens).arguments


# One token in bf16: the quantizer is in the graph as well.
@pytest.mark.parametrize(
    ("num_tokens", "dtype"),
    [
        pytest.param(
            t,
            "bfloat16" if t == 1 else "float8_e4m3fn",
            marks=[] if t in QUICK else pytest.mark.slow,
        )
        for t in TOKENS
    ],
)
def test_the_layer_is_one_cuda_graph_of_kernels_that_do_not_spill(num_tokens, dtype):
    report = h100_target.compile_for_h100(layer, *specs_of(num_tokens, dtype).arguments)
    spilled = {kernel.name: kernel.spill_bytes for kernel in report.kernels if kernel.spill_bytes}
    assert spilled == {}, f"with ptxas {report.ptxas_version}:\n{report}"
    multiplying = {kernel.name for kernel in report.kernels if "QGMMA" in kernel.instructions}
    assert multiplying == {"moe_up_projection", "moe_down_projection"}
    unpermuting = {kernel.name for kernel in report.kernels if "unpermute" in kernel.name}
    assert unpermuting == {"moe_unpermute_local" if num_tokens > 1536 else "moe_unpermute"}
    assert set(report.launches) == {"kCustomCall"}, "no launch that clears memory"
    if num_tokens == 1:
        assert report.launches["kCustomCall"] == 5, "none that quantizes"
    assert report.command_buffers == 1
    assert report.launches_outside_command_buffers == 0
    with jax_moe.assume_device("sm_90"):
        bound = jax_moe.workspace_bytes(num_tokens, backend="mosaic", **SIZES)
    assert report.temp_bytes <= bound <= 2.5e9


@pytest.mark.parametrize("num_tokens", [1, slow(14107)])
def test_kernels_share_nothing_that_they_write(num_tokens):
    """XLA plans two layers of one routing once; what their kernels count in stays their own."""
    sharding = h100_target.h100_sharding()
    shared = rank_specs(num_tokens)
    specs = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding),
        (shared, shared.weights.gemm1_weights, shared.weights.gemm2_weights),
        is_leaf=lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
    )

    def two_layers(first, gemm1_weights, gemm2_weights):
        second = replaced(first, gemm1_weights=gemm1_weights, gemm2_weights=gemm2_weights)
        return layer(*first.arguments), layer(*second.arguments)

    with h100_target.no_compilation_cache():  # a program from there needs a GPU to be loaded
        program = jax.jit(two_layers).trace(*specs).lower().compile().as_text()
    assert len(re.findall(r"custom-call\(.*/moe_plan_place/", program)) == 1
    calls = re.findall(
        r"custom-call\((.*?)\), .*output_to_operand_aliasing=\{\{\d+\}: \((\d+), \{\}\)\}", program
    )
    written = [operands.split(", ")[int(position)].split("*/")[-1] for operands, position in calls]
    assert len(written) == len(set(written)) == 4, "two projections a layer, each with its own"


@pytest.mark.parametrize(("hidden_size", "epilogue"), [(384, {}), (512, BOTH)])
def test_zeros_are_written_in_words_that_divide_a_row(hidden_size, epilogue):
    config = MatmulConfig(128, num_stages=3, scheduler="dynamic")

    def run(pair_row, *arrays):
        work = zero_rows.zero_rows(pair_row, hidden_size)
        with jax_moe.assume_device("sm_90"):
            return up_projection(*arrays, config=config, side_job=work, **epilogue)

    rows, plan, _ = grouped_rows([128, 5], 128, columns=512)
    arguments = (np.zeros((131, 8), np.int32), rows, plan, *weights(2, 256, 512))
    specs = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arguments)
    (kernel,) = h100_target.compile_for_h100(run, *specs).kernels
    assert kernel.spill_bytes == 0


def test_work_without_a_warp_for_it_is_refused():
    with pytest.raises(ValueError, match="pair_row: expected at most 32 pairs per token, got 33"):
        zero_rows.zero_rows(np.zeros((2, 33), np.int32), 512)
    rows, plan, _ = grouped_rows([128, 5], 128, columns=512)
    work = zero_rows.zero_rows(np.zeros((2, 8), np.int32), 512)
    config = MatmulConfig(128, num_stages=3)
    with (
        jax_moe.assume_device("sm_90"),
        pytest.raises(ValueError, match="side_job: expected None"),
    ):
        up_projection(rows, plan, *weights(2, 256, 512), config=config, side_job=work)


@pytest.mark.parametrize("dtype", [slow("float32"), "bfloat16", slow("float16")])
def test_the_quantizer_does_not_spill(dtype):
    def quantize(x):
        with jax_moe.assume_device("sm_90"):
            return jax_moe.quantize(x, backend="mosaic")

    x = jax.ShapeDtypeStruct((901, 7168), dtype)
    (kernel,) = h100_target.compile_for_h100(quantize, x).kernels
    assert kernel.spill_bytes == 0


def test_few_rows_are_quantized_without_copies():
    """Copies of padded rows would keep launches of the layer out of its CUDA graph."""

    def quantize(x):
        with jax_moe.assume_device("sm_90"):
            return jax_moe.quantize(x, scale_format="ue8m0", backend="mosaic")

    for num_rows, launches in ((1, 1), (2, 2)):  # the second turns the scales of two rows over
        report = h100_target.compile_for_h100(
            quantize, jax.ShapeDtypeStruct((num_rows, 7168), jnp.bfloat16)
        )
        assert sum(report.launches.values()) == launches
        assert [kernel.spill_bytes for kernel in report.kernels] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
def test_a_clamp_and_powers_of_two_spill_nothing(num_tokens):
    def up_project(topk_ids, *arrays):
        with jax_moe.assume_device("sm_90"):
            plan = jax_moe.plan_groups(
                topk_ids, 0, num_local_experts=32, num_experts=256, backend="mosaic"
            )
            return tuple(jax_moe.up_project(*arrays, plan, **BOTH, backend="mosaic"))

    ids, specs = jax.ShapeDtypeStruct((num_tokens, 8), jnp.int32), rank_specs(num_tokens)
    report = h100_target.compile_for_h100(
        up_project,
        ids,
        specs.hidden_states,
        specs.hidden_states_scale,
        specs.weights.gemm1_weights,
        specs.weights.gemm1_weights_scale,
    )
    spilled = {kernel.name: kernel.spill_bytes for kernel in report.kernels}
    assert spilled["moe_up_projection"] == 0
    assert not any(spilled.values()), spilled


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_is_one_cuda_graph_of_kernels_that_do_not_spill(model, num_tokens, dtype):
    """With its clamp and scales; its router does not change the matmuls."""
    options = {"swiglu_limit": model.swiglu_limit, "scale_format": model.scale_format}
    specs = specs_of(
        num_tokens,
        dtype,
        num_experts=model.num_experts,
        num_local=model.num_local_experts,
        hidden=model.hidden_size,
        intermediate=model.intermediate_size,
    )
    config = jax_moe.MoEConfig(model.top_k, model.n_group, model.topk_group)

    def run(*arguments):
        return layer(*arguments, config=config, **options)

    report = h100_target.compile_for_h100(run, *specs.arguments)
    spilled = {kernel.name: kernel.spill_bytes for kernel in report.kernels if kernel.spill_bytes}
    assert spilled == {}, f"with ptxas {report.ptxas_version}:\n{report}"
    assert report.command_buffers == 1
    assert report.launches_outside_command_buffers == 0, f"\n{report}"
