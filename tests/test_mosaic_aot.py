"""What the compilers make of the Mosaic kernels and the layer around them, at full size."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

import jax_moe
from pallas_kernels.mosaic.hopper import zero_rows
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig
from pallas_kernels.mosaic.hopper.up_projection import up_projection
from tests import h100_target
from tests.moe_inputs import rank_specs
from tests.test_kernels_interpreted import grouped_rows, weights

TOKENS = (1, 80, 901, 14107)  # at least one of each tile height
SIZES = {"num_local_experts": 32, "hidden_size": 7168, "intermediate_size": 2048}


def layer(*arguments):
    with jax_moe.assume_device("sm_90"):
        return jax_moe.apply(*arguments, backend="mosaic")


def programs():
    """For `python -m tests.h100_target tests.test_mosaic_aot:programs`."""
    for num_tokens in TOKENS:
        yield f"T={num_tokens}", layer, rank_specs(num_tokens)


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_the_layer_is_one_cuda_graph_of_kernels_that_do_not_spill(num_tokens):
    report = h100_target.compile_for_h100(layer, *rank_specs(num_tokens))
    spilled = {kernel.name: kernel.spill_bytes for kernel in report.kernels if kernel.spill_bytes}
    assert spilled == {}, f"with ptxas {report.ptxas_version}:\n{report}"
    multiplying = {kernel.name for kernel in report.kernels if "QGMMA" in kernel.instructions}
    assert multiplying == {"moe_up_projection", "moe_down_projection"}
    unpermuting = {kernel.name for kernel in report.kernels if "unpermute" in kernel.name}
    assert unpermuting == {"moe_unpermute_local" if num_tokens > 1536 else "moe_unpermute"}
    assert report.command_buffers == 1
    assert report.launches_outside_command_buffers == 0
    with jax_moe.assume_device("sm_90"):
        bound = jax_moe.workspace_bytes(num_tokens, backend="mosaic", **SIZES)
    assert report.temp_bytes <= bound <= 2.5e9


@pytest.mark.parametrize("num_tokens", [1, 14107])
def test_kernels_share_nothing_that_they_write(num_tokens):
    """XLA plans two layers of one routing once; what their kernels count in stays their own."""
    sharding = h100_target.h100_sharding()
    shared = rank_specs(num_tokens)
    specs = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding),
        (shared, shared[4], shared[6]),
        is_leaf=lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
    )

    def two_layers(first, gemm1_weights, gemm2_weights):
        second = (*first[:4], gemm1_weights, first[5], gemm2_weights, *first[7:])
        return layer(*first), layer(*second)

    with h100_target.no_compilation_cache():  # a program from there needs a GPU to be loaded
        program = jax.jit(two_layers).trace(*specs).lower().compile().as_text()
    assert len(re.findall(r"custom-call\(.*/moe_plan_place/", program)) == 1
    calls = re.findall(
        r"custom-call\((.*?)\), .*output_to_operand_aliasing=\{\{\d+\}: \((\d+), \{\}\)\}", program
    )
    written = [operands.split(", ")[int(position)].split("*/")[-1] for operands, position in calls]
    assert len(written) == len(set(written)) == 4, "two projections a layer, each with its own"


@pytest.mark.parametrize("hidden_size", [384, 512])
def test_zeros_are_written_in_words_that_divide_a_row(hidden_size):
    config = MatmulConfig(128, num_stages=3, scheduler="dynamic")

    def run(pair_row, *arrays):
        work = zero_rows.zero_rows(pair_row, hidden_size)
        with jax_moe.assume_device("sm_90"):
            return up_projection(*arrays, config=config, side_job=work)

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_quantizer_does_not_spill(dtype):
    def quantize(x):
        with jax_moe.assume_device("sm_90"):
            return jax_moe.quantize(x, backend="mosaic")

    x = jax.ShapeDtypeStruct((901, 7168), dtype)
    (kernel,) = h100_target.compile_for_h100(quantize, x).kernels
    assert kernel.spill_bytes == 0
