"""PyTorch and JAX on a GPU: the 19 workloads at full size, peers included, CUDA graphs, ties."""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax_moe  # noqa: E402
from interop import to_jax, to_torch, torch_definition, torch_moe  # noqa: E402
from interop.solutions import SOLUTIONS, sgl_library  # noqa: E402
from interop.workloads import captured_routing, workloads  # noqa: E402
from jax_moe.backends import unsupported_reason  # noqa: E402
from tests import torch_inputs  # noqa: E402
from tests.moe_inputs import array_arguments, scalar_arguments  # noqa: E402
from tests.torch_inputs import bits, matched_ratio, relative_error  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("full_size_torch")]

TWO_ULP = 2 * float(np.spacing(np.float32(5.0)))
PEERS = (
    *("sglang_v1", "sglang_v1_native_quant", "sglang_v1_zero_copy_swiglu"),
    *("sglang_v1_small_workspace", "sglang_v2", "deepgemm64", "deepgemm128"),
    *("deepgemm_mega", "flashinfer_cutlass"),
)
ROWS = {f"T={row.num_tokens}": row for row in workloads()}


@pytest.fixture(scope="module")
def weights():
    return torch_inputs.full_size_weights()


def check(found: torch.Tensor, expected: torch.Tensor, name: str = "found") -> None:
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all(), name
    assert matched_ratio(found, expected) >= 0.93, name
    assert relative_error(found, expected) <= 0.03, name
    idle = ~expected.any(dim=1)
    assert not found[idle].any(), "a token without local experts must be exactly zero"


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_all_solutions_on_the_published_workloads(row, weights):
    """One reference run a workload; every solution that is available here is held to it."""
    inputs = torch_inputs.full_size_inputs(row, weights)
    expected = torch_definition.run(*inputs.arguments)
    arrays = [to_jax(tensor) for tensor in array_arguments(inputs)]
    for backend in ("mosaic", "triton"):
        if unsupported_reason(backend) is None:
            check(
                to_torch(jax_moe.apply(*arrays, *scalar_arguments(inputs), backend=backend)),
                expected,
                backend,
            )
    for name in PEERS:
        solution = SOLUTIONS[name]
        if solution.unavailable_reason() is None:
            prepared = solution.prepare(inputs) if solution.prepare else inputs.arguments
            check(solution.run(*prepared), expected, name)


@pytest.mark.parametrize("name", ["jax_v1", "jax_v2"])
@pytest.mark.parametrize("row", [ROWS["T=7"], ROWS["T=901"]], ids=["T=7", "T=901"])
def test_the_published_designs_in_jax(row, name, weights):
    inputs = torch_inputs.full_size_inputs(row, weights)
    arrays = [to_jax(tensor) for tensor in array_arguments(inputs)]
    scalars = (
        jax.numpy.int32(inputs.local_expert_offset),
        jax.numpy.float32(inputs.routed_scaling_factor),
    )
    found = to_torch(jax.jit(SOLUTIONS[name].run)(*arrays, *scalars))
    check(found, torch_definition.run(*inputs.arguments))


def test_torch_moe_at_full_size(weights):
    inputs = torch_inputs.full_size_inputs(ROWS["T=80"], weights)
    expected = torch_definition.run(*inputs.arguments)
    result = torch_moe(*inputs.arguments)
    check(result, expected)
    out = torch.full_like(result, float("nan"))
    torch_moe(*inputs.arguments, out=out)
    np.testing.assert_array_equal(bits(out), bits(result))


@pytest.mark.parametrize("name", PEERS)
def test_peers_run_in_a_cuda_graph(name, weights):
    solution = SOLUTIONS[name]
    if reason := solution.unavailable_reason():
        pytest.skip(reason)
    inputs = torch_inputs.full_size_inputs(ROWS["T=80"], weights)
    arguments = solution.prepare(inputs) if solution.prepare else inputs.arguments
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            eager = solution.run(*arguments)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solution.run(*arguments)
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    np.testing.assert_array_equal(bits(captured), bits(eager))


def test_sglangs_gate_agrees_outside_of_ties(record_property):
    """Peers may break ties otherwise: such tokens are counted, not failed."""
    if reason := sgl_library.unavailable_reason():
        pytest.skip(reason)
    drawn = captured_routing(14107, np.random.default_rng(0))
    logits, bias = (torch_inputs.to_tensor(array, "cuda") for array in drawn)
    weights, ids = sgl_library.load().moe_fused_gate.default(
        logits, bias.float(), 8, 4, 8, 0, 2.5, False
    )
    ours = jax_moe.route(to_jax(logits), to_jax(bias), 1.0)
    ids, order = ids.long().sort(dim=1)
    our_ids, our_order = to_torch(ours.topk_ids).long().sort(dim=1)
    same = (ids == our_ids).all(dim=1)
    weights, our_weights = weights.gather(1, order), to_torch(ours.topk_weights)
    torch.testing.assert_close(
        weights[same], our_weights.gather(1, our_order)[same], rtol=1e-6, atol=0
    )

    biased = torch.sigmoid(logits) + bias.float()
    groups = biased.view(-1, 8, 32).topk(2).values.sum(dim=2).sort(dim=1, descending=True).values
    scores, our_scores = (biased.gather(1, i).sort(dim=1).values for i in (ids, our_ids))
    tied = ((scores - our_scores).abs() <= TWO_ULP).all(dim=1)
    tied |= groups[:, 3] - groups[:, 4] <= 2 * TWO_ULP
    assert bool((same | tied).all())
    differing = int((~same).sum())
    record_property("ties_broken_otherwise", differing)
    print(f"sglang's gate breaks the tie of {differing} of {len(same)} tokens otherwise")


def test_quantization_is_bit_equal_to_torch_and_sglang():
    x = torch.randn(300, 2048, device="cuda", dtype=torch.bfloat16)
    values, scales = torch_inputs.quantize(x)
    ours = jax_moe.quantize(to_jax(x))
    np.testing.assert_array_equal(bits(to_torch(ours.values)), bits(values))
    np.testing.assert_array_equal(bits(to_torch(ours.scales)), bits(scales))
