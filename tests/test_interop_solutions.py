"""The registry of solutions: availability, the CPU ones against the oracle, DeepGEMM's glue."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")

import jax_moe  # noqa: E402
from interop import to_jax, to_torch, torch_definition  # noqa: E402
from interop.solutions import (  # noqa: E402
    SOLUTIONS,
    deepgemm,
    deepgemm_mega,
    flashinfer_cutlass,
    packages,
    sgl_library,
)
from jax_moe import MoEConfig, models  # noqa: E402
from tests import cuda_tools, fake_sgl_ops  # noqa: E402
from tests.moe_inputs import array_arguments, scalar_arguments  # noqa: E402
from tests.torch_inputs import relative_error, torch_inputs  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
NAMES = (
    "torch_reference",
    "sglang_v1",
    "sglang_v1_native_quant",
    "sglang_v1_zero_copy_swiglu",
    "sglang_v1_small_workspace",
    "sglang_v2",
    "deepgemm",
    "deepgemm64",
    "deepgemm128",
    "deepgemm_mega",
    "flashinfer_cutlass",
    "jax_v1",
    "jax_v2",
)


def test_every_solution_is_listed_under_its_name():
    assert tuple(SOLUTIONS) == NAMES
    assert all(name == solution.name for name, solution in SOLUTIONS.items())
    aspects = {tuple(solution.design) for solution in SOLUTIONS.values()}
    assert len(aspects) == 1, "the differences table needs the same aspects of all"


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_one_line(name):
    reason = SOLUTIONS[name].unavailable_reason()
    assert reason is None or (reason and "\n" not in reason)


def test_reasons_name_what_is_missing(monkeypatch, tmp_path):
    assert packages.missing("no_such_package", "no-such") == "package no-such is not installed"
    monkeypatch.setenv(sgl_library.PATH_VARIABLE, str(tmp_path / "gone.so"))
    assert sgl_library.find() is None
    reason = sgl_library.unavailable_reason()
    assert reason == f"JAX_MOE_SGL_LIBRARY names no file: {tmp_path / 'gone.so'}"
    with pytest.raises(RuntimeError, match=r"names no file: .*gone\.so"):
        sgl_library.load.__wrapped__()


def test_peers_say_which_package_or_version_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(deepgemm, "unavailable_reason", lambda: None)
    (tmp_path / "deep_gemm").mkdir()
    (tmp_path / "deep_gemm" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "0.1.4 or newer" in deepgemm_mega.unavailable_reason()
    kernel = tmp_path / "deep_gemm" / deepgemm_mega._KERNEL
    kernel.parent.mkdir(parents=True)
    kernel.touch()
    assert deepgemm_mega.unavailable_reason() is None
    monkeypatch.setattr(deepgemm, "unavailable_reason", lambda: "no")
    assert deepgemm_mega.unavailable_reason() == "no"

    here = {"flashinfer"}
    monkeypatch.setattr(
        flashinfer_cutlass, "missing", lambda name, what: None if name in here else f"no {what}"
    )
    assert flashinfer_cutlass.unavailable_reason() == "no apache-tvm-ffi"
    here.clear()
    assert flashinfer_cutlass.unavailable_reason() == "no flashinfer-python"


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "common_ops.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv(sgl_library.PATH_VARIABLE, str(broken))
    with pytest.raises(RuntimeError, match=r"lib\w+\.so\.13: not found|common_ops\.abi3\.so"):
        sgl_library.load.__wrapped__()


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
@pytest.mark.parametrize(
    ("name", "bound"), [("torch_reference", 1e-3), ("jax_v1", 0.04), ("jax_v2", 0.04)]
)
def test_cpu_solutions_match_the_oracle(name, bound, num_tokens):
    inputs = torch_inputs(num_tokens)
    arrays = [to_jax(tensor) for tensor in array_arguments(inputs)]
    solution = SOLUTIONS[name]
    if solution.framework == "torch":
        found = solution.run(*inputs.arguments)
    else:
        scalars = jnp.int32(inputs.local_expert_offset), jnp.float32(inputs.routed_scaling_factor)
        found = to_torch(jax.jit(solution.run)(*arrays, *scalars))
    assert found.dtype == torch.bfloat16
    assert found.shape == (num_tokens, 256)
    if num_tokens:
        expected = to_torch(jax_moe.reference(*arrays, *scalar_arguments(inputs)))
        assert relative_error(found, expected) < bound
        assert torch.equal(found[~expected.any(dim=1)], expected[~expected.any(dim=1)])


SGLANG = [name for name in NAMES if name.startswith("sglang")]


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
@pytest.mark.parametrize("name", SGLANG)
def test_the_sglang_pipelines_around_their_operators(monkeypatch, name, num_tokens):
    """The order and arguments of the calls; the operators themselves run on a GPU only."""
    monkeypatch.setattr(sgl_library, "load", lambda: fake_sgl_ops.OPS)
    inputs = torch_inputs(num_tokens)
    found = SOLUTIONS[name].run(*inputs.arguments)
    assert found.shape == (num_tokens, 256)
    assert found.dtype == torch.bfloat16
    if num_tokens:
        expected = torch_definition.run(*inputs.arguments)
        assert relative_error(found, expected) < 0.04
        assert not found[~expected.any(dim=1)].any()


def steps_of(monkeypatch, name):
    """What a solution calls between the GEMMs, and the size of the workspace that they get."""
    seen = []

    def watched(operator, function):
        def call(*arguments):
            seen.append(operator)
            if operator == "fp8_blockwise_scaled_grouped_mm":
                *_, workspace = arguments
                seen[-1] = workspace.numel()
            return function(*arguments)

        return call

    ops = {
        name: SimpleNamespace(default=watched(name, op.default))
        for name, op in vars(fake_sgl_ops.OPS).items()
    }
    monkeypatch.setattr(sgl_library, "load", lambda: SimpleNamespace(**ops))
    copies = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda *a, **k: copies.append(1) or cat(*a, **k))
    SOLUTIONS[name].run(*torch_inputs(4).arguments)
    first, last = (place for place, what in enumerate(seen) if isinstance(what, int))
    return {
        "workspace": {seen[first], seen[last]},
        "quantization": "sgl_per_token_group_quant_8bit" in seen[first:last],
        "swap": ("silu_and_mul" in seen[first:last], len(copies) - 1),  # one of the fake's own
    }


def test_each_variant_differs_from_the_first_pipeline_in_one_step(monkeypatch):
    found = {name: steps_of(monkeypatch, name) for name in SGLANG}
    first, second = found["sglang_v1"], found["sglang_v2"]
    assert first == {"workspace": {1 << 30}, "quantization": False, "swap": (True, 1)}
    assert second == {"workspace": {90_000}, "quantization": True, "swap": (False, 0)}
    for name, step in (
        ("sglang_v1_native_quant", "quantization"),
        ("sglang_v1_zero_copy_swiglu", "swap"),
        ("sglang_v1_small_workspace", "workspace"),
    ):
        assert found[name] == first | {step: second[step]}, name
        differing = [
            k for k, v in SOLUTIONS[name].design.items() if SOLUTIONS["sglang_v1"].design[k] != v
        ]
        assert len(differing) == 1, name
        assert SOLUTIONS[name].design[differing[0]] == SOLUTIONS["sglang_v2"].design[differing[0]]


@pytest.mark.parametrize("name", SGLANG)
def test_the_sglang_pipelines_fill_what_the_published_ones_fill(monkeypatch, name):
    """One fill per distinct stride and one for the output: at T=1 each costs about 1 us of 154."""
    hidden, intermediate, experts = 512, 128, 8
    inputs = torch_inputs(4, hidden_size=hidden, intermediate_size=intermediate)
    counter = fake_sgl_ops.FillCounter()
    monkeypatch.setattr(sgl_library, "load", lambda: counter.ops)
    with counter:
        found = SOLUTIONS[name].run(*inputs.arguments)
    strides = [((experts,), torch.int64)] * len({hidden, 2 * intermediate, intermediate})
    assert counter.fills == [*strides, ((4, hidden), torch.bfloat16)]
    assert relative_error(found, torch_definition.run(*inputs.arguments)) < 0.04


@pytest.mark.parametrize("has_switch", [True, False])
def test_deepgemm_launches_early_where_the_package_can(monkeypatch, has_switch):
    calls = []
    package = SimpleNamespace(
        set_mk_alignment_for_contiguous_layout=lambda rows: calls.append(("align", rows)),
        m_grouped_fp8_gemm_nt_contiguous=lambda *_, **__: calls.append(("gemm",)),
    )
    if has_switch:
        package.set_pdl = lambda on: calls.append(("pdl", on))
    monkeypatch.setitem(sys.modules, "deep_gemm", package)
    a = torch.zeros(64, 128, dtype=torch.float8_e4m3fn), torch.zeros(1, 64)
    weights = torch.zeros(1, 256, 128, dtype=torch.float8_e4m3fn), torch.zeros(1, 2, 1)
    out = deepgemm._grouped_gemm(64, 1, a, weights, torch.ones(1, dtype=torch.int32))
    assert out.shape == (64, 256)
    assert calls == [("align", 64)] + [("pdl", True)] * has_switch + [("gemm",)]


def test_deepgemm_says_which_routers_its_glue_computes():
    for name in ("deepseek-v3", "kimi-k2", "glm-5", "qwen3-235b", "qwen3-30b", "minimax-m2"):
        assert deepgemm.unsupported(models.get(name).config) is None, name
    for name, reason in (
        ("deepseek-v4-flash", "renormalized sigmoid or softmax"),
        ("longcat-flash", "renormalized sigmoid or softmax"),
        ("qwen3-next", "a power of two of experts per token only, got 10"),
        ("glm-5.3-flash", "no clamp"),
        ("deepseek-v3.1", "scales of any size only"),
    ):
        config = models.get(name).config
        assert reason in (deepgemm.unsupported(config) or ""), name
        assert all(reason in one.unavailable_reason() for one in deepgemm.solutions(config)), name


@pytest.mark.parametrize("num_experts", [1, 8, 9, 48, 96, 128, 160, 256, 288, 384, 512])
def test_a_router_without_groups_is_split_in_any(num_experts):
    n_group, kept = deepgemm.groups_of(MoEConfig(1), num_experts)
    assert n_group == kept <= 8
    assert num_experts % n_group == 0
    assert num_experts // n_group >= 2 or num_experts == n_group == 1
    assert deepgemm.groups_of(jax_moe.DEEPSEEK_V3, 256) == (8, 4)


def test_worst_case_rows_hold_every_routing():
    for counts in ([9] * 8, [72] + [0] * 7, [1] * 8, [65, 7] + [0] * 6):
        pairs = sum(counts)
        needed = sum(-(-count // 64) * 64 for count in counts)
        assert deepgemm.max_rows(-(-pairs // 8), 8, 64) >= needed


@pytest.mark.slow
def test_deepgemm_glue_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.deepgemm_glue"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("relative error") == 6


KERNELS = {
    "route_kernel": (
        {"logits": "*fp32", "bias": "*bf16", "weights": "*fp32", "factor": "fp32"},
        {"E": 256, "E_LOCAL": 32, "N_GROUP": 8, "TOPK_GROUP": 4, "TOP_K": 8}
        | {"GROUP_BLOCK": 32, "SOFTMAX": False},
        1,
    ),
    "gather_kernel": (
        {"hidden_scale": "*fp32", "row_scale": "*fp32"},
        {"ALIGN": 64, "E_LOCAL": 32, "E_BLOCK": 32, "TOP_K": 8, "WORDS": 1792, "SCALES": 56}
        | {"BLOCK": 1024, "SCALE_BLOCK": 64},
        4,
    ),
    "stage_kernel": (
        {"hidden_scale": "*fp32", "scales": "*fp32"},
        {"WORDS": 1792, "SCALES": 56, "BLOCK": 1024, "SCALE_BLOCK": 64},
        4,
    ),
    "swiglu_quantize_kernel": (
        {"gemm1": "*bf16", "values": "*fp8e4nv", "scales": "*fp32"},
        {"ALIGN": 128, "E_LOCAL": 32, "E_BLOCK": 32, "INTERMEDIATE": 2048, "ROWS": 8}
        | {"GROUPS": 4},
        4,
    ),
    "unpermute_kernel": (
        {"expert_outputs": "*bf16", "topk_weights": "*fp32", "output": "*bf16"},
        {"H": 7168, "TOP_K": 8, "BLOCK_H": 1024},
        4,
    ),
}
OTHERS = {  # of Kimi K2's rank, whose numbers of experts are no powers of two, and of Qwen3-30B
    "route_kernel": (
        {"E": 384, "E_LOCAL": 48, "TOPK_GROUP": 8, "GROUP_BLOCK": 64},
        {"E": 128, "E_LOCAL": 128, "TOPK_GROUP": 8, "GROUP_BLOCK": 16, "SOFTMAX": True},
    ),
    "gather_kernel": (
        {"E_LOCAL": 48, "E_BLOCK": 64},
        {"E_LOCAL": 128, "E_BLOCK": 128, "WORDS": 512, "SCALES": 16, "SCALE_BLOCK": 16},
    ),
    "swiglu_quantize_kernel": (
        {"E_LOCAL": 48, "E_BLOCK": 64},
        {"E_LOCAL": 128, "E_BLOCK": 128, "INTERMEDIATE": 768, "GROUPS": 1},
    ),
}
CASES = [(name, {}) for name in KERNELS] + [
    pytest.param(name, changes, marks=pytest.mark.slow)
    for name, all_changes in OTHERS.items()
    for changes in all_changes
]
INTEGERS = ("local_offset", "num_tokens", "num_rows")


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_deepgemm_glue_compiles_for_hopper_without_spills(name, changes):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from interop.solutions import deepgemm_kernels

    types, constants, num_warps = KERNELS[name]
    constants = constants | changes
    kernel = getattr(deepgemm_kernels, name)
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, "i32" if argument in INTEGERS else "*i32")
        for argument in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    report = cuda_tools.assemble(name, compiled.asm["ptx"], compiled.metadata.shared)
    assert report.spill_bytes == 0
