"""What XLA and the kernels' compilers make of the layer over several H100s, at full size."""

from __future__ import annotations

import re

import jax
import pytest
from jax.sharding import NamedSharding

import jax_moe
from tests import h100_target
from tests.moe_inputs import rank_specs, sharded_arguments

EXPERTS = 256
SIZES = {"hidden_size": 7168, "intermediate_size": 2048}


def compiled(folder, hosts, devices, num_tokens, exchange, rows=None, **options):
    """The report of one compilation and the scheduled HLO; `rows` is a dtype, None for e4m3."""
    names = ("host", "device") if exchange == "two_level" else ("expert",)
    axis_name = names if len(names) > 1 else names[0]
    mesh = h100_target.h100_mesh(hosts, devices, names)
    ranks = hosts * devices
    in_specs, _ = jax_moe.partition_specs(axis_name)
    inputs = rank_specs(ranks * num_tokens, num_local=EXPERTS)
    if rows is not None:
        x = jax.ShapeDtypeStruct(inputs.hidden_states.shape, rows)
        inputs = inputs._replace(hidden_states=x, hidden_states_scale=None)
    specs = [
        None
        if spec is None
        else jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=NamedSharding(mesh, where))
        for spec, where in zip(sharded_arguments(inputs), in_specs, strict=True)
    ]
    with jax_moe.assume_device("sm_90"):
        layer = jax_moe.expert_parallel(mesh, axis_name, exchange=exchange, **options)
        report = h100_target.compile_for_h100(layer, *specs, dump=folder)
        bound = jax_moe.workspace_bytes(
            num_tokens, num_local_experts=EXPERTS // ranks, num_ranks=ranks, **options, **SIZES
        )
    assert {kernel.spill_bytes for kernel in report.kernels} == {0}, report
    assert report.temp_bytes <= bound
    (hlo,) = folder.glob("*_gpu_after_optimizations.txt")
    return report, hlo.read_text()


def collectives(hlo):
    """Kind and the shapes of the results of each collective, in the order of the program."""
    found = re.findall(r"= (\S.*?) (all-gather|all-to-all|all-reduce|\S*permute)\(", hlo)
    return [(kind, re.findall(r"\w+\[[\d,]*\]", shapes)) for shapes, kind in found]


@pytest.mark.parametrize("devices", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_over_nvlink_the_layer_is_one_cuda_graph(tmp_path, devices):
    report, hlo = compiled(tmp_path, 1, devices, 32, "nvlink")
    assert report.command_buffers == 1
    assert report.launches_outside_command_buffers == 0
    assert sum(report.launches.values()) <= 14
    assert collectives(hlo) == []
    names = {kernel.name for kernel in report.kernels}
    assert {"moe_dispatch", "moe_combine"} <= names
    for kernel in report.kernels:
        if kernel.name in ("moe_dispatch", "moe_combine"):
            assert kernel.registers <= 128, "four blocks of a warpgroup per SM"


@pytest.mark.slow
def test_by_collectives_a_layer_of_few_tokens_is_one_gather_one_graph_and_one_all_to_all(tmp_path):
    report, hlo = compiled(tmp_path, 1, 4, 32, "collectives")
    (gather, all_to_all) = collectives(hlo)
    assert gather == ("all-gather", ["u8[128,7168]", "f32[224,32]", "s32[128,8]", "f32[128,8]"])
    assert all_to_all == ("all-to-all", ["bf16[4,32,7168]"])
    assert report.command_buffers == 1
    assert report.launches["kAllGather"] == report.launches["kAllToAll"] == 1
    assert not {kind for kind in report.launches if "Host" in kind or "Memcpy" in kind}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mosaic", "triton"])
def test_in_16_bits_rows_travel_as_such_and_sums_in_float32(tmp_path, backend):
    options = {"precision": "high", "backend": backend}
    _, hlo = compiled(tmp_path, 1, 4, 32, "collectives", rows="bfloat16", **options)
    (gather, all_to_all) = collectives(hlo)
    assert gather == ("all-gather", ["u16[128,7168]", "f32[224,32]", "s32[128,8]", "f32[128,8]"])
    assert all_to_all == ("all-to-all", ["f32[4,32,7168]"])


@pytest.mark.slow
def test_in_pieces_the_exchange_of_one_runs_beside_the_matmuls_of_another(tmp_path):
    """Four pieces: 8.7 GB in one would not fit the default bound of 4 GB."""
    report, hlo = compiled(tmp_path, 1, 8, 8192, "collectives")
    found = collectives(hlo)
    rows = [shapes for kind, shapes in found if kind == "all-gather" and "u8" in str(shapes)]
    assert rows == [["u8[16384,7168]"]] * 4, "pieces were combined"
    home = [shapes for kind, shapes in found if kind == "all-to-all"]
    assert home == [["bf16[8,2048,7168]"]] * 4, "pieces were combined"
    assert report.temp_bytes < 4e9
    order = [kind for _, kind in h100_target.thunk_order(tmp_path)]
    beside = re.findall(
        r"kAsyncStart (?:kAllGather|kAllToAll) (?:(?!kAsyncStart|kAsyncDone).)*"
        r"kCommandBuffer (?:(?!kAsyncStart|kAsyncDone).)*kAsyncDone",
        " ".join(order),
    )
    assert len(beside) >= 4, order


@pytest.mark.slow
def test_in_two_levels_a_row_crosses_once_per_pair_of_hosts(tmp_path):
    report, hlo = compiled(tmp_path, 2, 4, 32, "two_level")
    found = collectives(hlo)
    rows = [shapes[0] for kind, shapes in found if kind == "all-gather"]
    assert sorted(rows) == ["u8[256,7168]", "u8[64,7168]"], "over two hosts, over four devices"
    home = [shapes for kind, shapes in found if kind == "all-to-all"]
    assert sorted(home) == [["bf16[2,32,7168]"], ["bf16[4,64,7168]"]]
    assert report.command_buffers == 1


def test_kernels_that_count_tiles_are_traced_inside_of_shard_map():
    """Tiles of 128 rows are counted, by warps, which JAX refuses where references are varying."""
    inputs = rank_specs(4096, num_experts=32, num_local=32, hidden=256, intermediate=256)
    mesh = jax.make_mesh((1,), ("expert",))
    with jax_moe.assume_device("sm_90"):
        layer = jax_moe.expert_parallel(mesh, "expert", backend="mosaic")
        traced = jax.jit(layer).trace(*sharded_arguments(inputs))
    assert "moe_up_projection" in str(traced.jaxpr)
