"""The probes of the promoted floor: right results only, the faster contender, and who it was."""

from __future__ import annotations

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from bench import promoted, roofline
from bench.gpu_clock import Kernel, Sample
from bench.workloads import FULL, Sizes
from tests import h100_target

TINY = Sizes(num_experts=64, num_local_experts=8, hidden_size=256, intermediate_size=128)


class Clock:
    """Says that each further matmul takes 10 us more, and that a stage permutes for 90 us."""

    def __init__(self):
        self.us = 0.0

    def time(self, execution, iterations, *, cold):
        assert not cold
        execution.block(execution.call())
        self.us += 10.0
        kernels = (Kernel("moe_permute_rows", 0.0, 90.0), Kernel("k", 90.0, self.us))
        if execution.how == "jit":
            kernels = (kernels[0], kernels[1]._replace(name="moe_up_projection"))
        return [Sample(90.0 + self.us, 1, kernels)] * iterations


ROWS, HIDDEN, INTERMEDIATE = 256, TINY.hidden_size, TINY.intermediate_size


@pytest.fixture(scope="module")
def operands():
    """Made on the host, since drawing them compiles for seconds."""
    rng = np.random.default_rng(0)

    def values(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(jnp.float8_e4m3fn))

    def scales(*shape):
        return jnp.asarray(rng.uniform(0.01, 0.1, shape).astype(np.float32))

    def quantized(columns):
        return jax_moe.Quantized(values(ROWS, columns), scales(columns // 128, ROWS))

    weights = jax_moe.ExpertWeights(
        values(1, 2 * INTERMEDIATE, HIDDEN),
        scales(1, 2 * INTERMEDIATE // 128, HIDDEN // 128),
        values(1, HIDDEN, INTERMEDIATE),
        scales(1, HIDDEN // 128, INTERMEDIATE // 128),
    )
    return promoted.Operands(quantized(HIDDEN), quantized(INTERMEDIATE), weights)


def test_operands_have_the_layer_s_two_shapes_and_one_expert():
    made = jax.eval_shape(lambda: promoted.make_operands(FULL))
    rows, hidden, intermediate = promoted.ROWS, FULL.hidden_size, FULL.intermediate_size
    assert made.rows.values.shape == (rows, hidden)
    assert made.activations.scales.shape == (intermediate // 128, rows)
    assert made.weights.gemm1_weights.shape == (1, 2 * intermediate, hidden)
    assert rows % 128 == rows // 128 * (2 * intermediate // 256) % 132 == 0
    assert rows // 128 * (hidden // 256) % 132 == 0  # whole rounds of SMs


@pytest.fixture
def deep_gemm(monkeypatch):
    """DeepGEMM's dense matmul in plain torch, times a factor that a test may change."""
    torch = pytest.importorskip("torch")
    package = types.SimpleNamespace(factor=1.0)

    def fp8_gemm_nt(a, b, out, compiled_dims):
        (x, x_scale), (w, w_scale) = a, b
        assert x_scale.shape == (len(x), x.shape[1] // 128)
        assert x_scale.stride() == (1, len(x))  # as DeepGEMM's TMA reads it
        assert out.shape == (len(x), len(w))
        x = x.float() * x_scale.repeat_interleave(128, 1)
        w = w.float() * w_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        out.copy_((x @ w.t() * package.factor).to(torch.bfloat16))

    package.fp8_gemm_nt = fp8_gemm_nt
    monkeypatch.setitem(sys.modules, "deep_gemm", package)
    return package


@pytest.fixture
def both(operands, deep_gemm, monkeypatch):
    monkeypatch.setattr(promoted, "ROWS", ROWS)
    monkeypatch.setattr(promoted, "make_operands", lambda sizes: operands)
    found = {
        "DeepGEMM": promoted.of_deepgemm,
        "ours": lambda operands: promoted.of_ours(operands, backend="xla"),
    }
    monkeypatch.setattr(promoted, "contenders", lambda: found)
    return deep_gemm


on_cpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="DeepGEMM is imitated on a CPU")


@on_cpu
def test_the_faster_contender_counts_and_all_are_named(both):
    rate = promoted.measure(Clock(), TINY)
    flops = 2 * 256 * (256 * 256 + 128 * 256)
    assert "DeepGEMM 210.0 us; ours 70.0 us" in rate.probe  # ours without its permutation
    assert rate.flops_per_s == pytest.approx(flops / 70e-6)
    assert "256 x 256 x 256 and 256 x 128 x 256" in rate.probe


@on_cpu
def test_a_wrong_contender_has_no_speed(both, monkeypatch):
    both.factor = 1.1
    monkeypatch.setattr(promoted, "contenders", lambda: {"DeepGEMM": promoted.of_deepgemm})
    rate = promoted.measure(Clock(), TINY)
    assert "DeepGEMM: ValueError: expected a relative error up to 0.05, got 0.1" in rate.probe
    assert rate.flops_per_s is None


@on_cpu
def test_there_is_no_contender_on_a_cpu():
    assert promoted.contenders() == {}
    assert roofline.measure(None, TINY) is None


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="compiles for an absent H100")
def test_one_expert_compiles_for_an_h100_without_spills():
    hidden, intermediate, rows = FULL.hidden_size, FULL.intermediate_size, promoted.ROWS

    def layer(zero, rows_of_up, rows_of_down, w13, s13, w2, s2):
        ids = jnp.zeros((rows, 1), jnp.int32) + zero
        plan = jax_moe.plan_groups(
            ids, 0, num_local_experts=1, num_experts=1, expected_rows=rows, backend="mosaic"
        )
        assert plan.row_token.shape == (rows,)  # full tiles, and no others
        up = jax_moe.up_project(*rows_of_up, w13, s13, plan, backend="mosaic")
        return up, jax_moe.down_project(rows_of_down, w2, s2, plan, backend="mosaic")

    def spec(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    def quantized(columns):
        scales = spec(jnp.float32, columns // 128, rows)
        return jax_moe.Quantized(spec(jnp.float8_e4m3fn, rows, columns), scales)

    with jax_moe.assume_device("sm_90"):
        report = h100_target.compile_for_h100(
            layer,
            spec(jnp.int32),
            quantized(hidden),
            quantized(intermediate),
            spec(jnp.float8_e4m3fn, 1, 2 * intermediate, hidden),
            spec(jnp.float32, 1, 2 * intermediate // 128, hidden // 128),
            spec(jnp.float8_e4m3fn, 1, hidden, intermediate),
            spec(jnp.float32, 1, hidden // 128, intermediate // 128),
        )
    assert {kernel.spill_bytes for kernel in report.kernels} == {0}
    names = [kernel.name for kernel in report.kernels if "projection" in kernel.name]
    assert names == ["moe_up_projection", "moe_down_projection"]


@pytest.mark.gpu
@pytest.mark.timing
def test_the_promoted_rate_of_a_gpu_is_below_that_of_its_tensor_cores():
    pytest.importorskip("triton")
    from bench.gpu_clock import GpuClock

    found = roofline.measure(GpuClock(), FULL)
    assert found is not None
    if found.promoted_flops_per_s is None:
        pytest.skip(found.promoted_probe)
    assert 0.3 < found.promoted_flops_per_s / found.fp8_flops_per_s < 1.05, found
