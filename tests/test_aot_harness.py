"""The ahead-of-time harness itself, on kernels small enough to know every number in advance."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
import triton
import triton.language as tl
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.triton.launch import Launch, call
from tests import h100_target

F8 = jnp.float8_e4m3fn
ROWS, COLUMNS, DEPTH = 64, 64, 128


def fp8_matmul(x, w):
    """`x @ w.T` of one tile: one load each, one FP8 matrix instruction group, one store."""
    tiled = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))

    def body(x_gmem, w_gmem, out_gmem, x_smem, w_smem, out_smem, barrier):
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, barrier)
        plgpu.copy_gmem_to_smem(w_gmem, w_smem, barrier)
        plgpu.barrier_wait(barrier)

        def multiply(acc):
            plgpu.wgmma(acc, x_smem, w_smem.T)
            return acc[...]

        out_smem[...] = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32),
        scratch_types=[
            plgpu.SMEM((ROWS, DEPTH), F8, transforms=tiled),
            plgpu.SMEM((COLUMNS, DEPTH), F8, transforms=tiled),
            plgpu.SMEM((ROWS, COLUMNS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
        kernel_name="tile_matmul",
    )(x, w)


SPECS = (jax.ShapeDtypeStruct((ROWS, DEPTH), F8), jax.ShapeDtypeStruct((COLUMNS, DEPTH), F8))


def example():
    return fp8_matmul, SPECS


def test_reports_the_kernel_and_its_program():
    report = h100_target.compile_for_h100(fp8_matmul, *SPECS)
    (kernel,) = report.kernels
    assert kernel.name == "tile_matmul"
    assert kernel.architecture == "sm_90a"
    assert kernel.fp8_instructions == DEPTH // 32  # one QGMMA reduces 32 bytes of K
    assert kernel.instructions["EXIT"] >= 1
    assert kernel.spill_bytes == 0
    assert 0 < kernel.registers <= 255
    assert kernel.smem_bytes >= (ROWS + COLUMNS) * DEPTH + ROWS * COLUMNS * 4
    assert report.launches == {"kCustomCall": 1}
    assert report.command_buffers == 0  # XLA makes a graph of five launches or more
    assert report.launches_outside_command_buffers == 1
    assert report.temp_bytes == 0
    assert report.ptxas_version.startswith("13.")


def test_counts_launches_in_one_command_buffer_and_temporary_memory():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)

    def program(x):
        for _ in range(3):
            x = jnp.sort(x @ x, axis=0)
        return x

    report = h100_target.compile_for_h100(program, x)
    assert report.kernels == ()
    assert report.command_buffers == 1
    assert report.launches_outside_command_buffers == 0
    assert sum(report.launches.values()) >= 6  # three matmuls and three sorts at the least
    assert report.temp_bytes >= 256 * 256 * 4


def test_sees_spilled_registers():
    """Eight tiles of 64 values a thread, all alive at once, do not fit into 255 registers."""

    def body(x_gmem, out_gmem):
        tiles = [x_gmem[i] for i in range(8)]
        total = sum(tiles)
        for tile in tiles:
            total = total * tile
        out_gmem[...] = total

    tile = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    kernel = plgpu.kernel(body, out_type=tile, kernel_name="spiller")
    report = h100_target.compile_for_h100(kernel, jax.ShapeDtypeStruct((8, 64, 128), jnp.float32))
    assert report.kernels[0].spill_bytes > 0


@triton.jit
def _triton_tile(x, w, out, SIDE: tl.constexpr):
    index = tl.arange(0, SIDE)
    tile = index[:, None] * SIDE + index[None, :]
    product = tl.dot(tl.load(x + tile), tl.trans(tl.load(w + tile)))
    tl.store(out + tile, product)


@pytest.mark.parametrize(
    ("compute_capability", "architecture"), [(89, "sm_89"), (90, "sm_90a"), (100, "sm_100a")]
)
def test_reports_triton_kernels_of_every_generation(compute_capability, architecture):
    side = 128
    operand = jax.ShapeDtypeStruct((side, side), F8)

    def tile_matmul(x, w):
        out = jax.ShapeDtypeStruct((side, side), jnp.float32)
        tile = Launch(_triton_tile, (x, w), (), (out,), (1,), {"SIDE": side})
        return call(tile, compute_capability)

    (kernel,) = h100_target.compile_triton_kernels(tile_matmul, operand, operand)
    assert kernel.architecture == architecture
    assert kernel.smem_bytes > 0
    assert kernel.fp8_instructions > 0
    if compute_capability == 90:
        program = h100_target.compile_for_h100(tile_matmul, operand, operand)
        assert program.kernels == (kernel,)


def test_command_line_prints_json(capsys):
    assert h100_target.main(["tests.test_aot_harness:example", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["kernels"][0]["instructions"]["QGMMA"] == DEPTH // 32


@pytest.mark.parametrize("target", ["os:getcwd", "os:getpid", "os:uname"])
def test_command_line_refuses_a_function_of_another_form(target, capsys):
    with pytest.raises(SystemExit) as raised:
        h100_target.main([target])
    assert raised.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: target: expected (fn, specs) or a generator of (label, fn, specs), got " in last


@pytest.mark.parametrize("target", ["tests.test_aot_harness", ":x", ".tests:x", "tests:", "a b:x"])
def test_command_line_refuses_what_names_no_function(target, capsys):
    with pytest.raises(SystemExit):
        h100_target.main([target])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"error: target: expected module:function, got {target!r}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SPECS", ", got a tuple"),
        ("pytest", ", got a module"),
        ("ROWS", ", got a int"),
        ("fp8_matmul", ": missing a required argument: 'x'"),
    ],
)
def test_command_line_refuses_what_cannot_be_called_without_arguments(name, said, capsys):
    with pytest.raises(SystemExit):
        h100_target.main([f"tests.test_aot_harness:{name}"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"error: target: expected a function without arguments{said}")
