"""What the compilers make of the plan and routing kernels for any number of experts."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.mosaic import plan, routing
from pallas_kernels.triton import plan as triton_plan
from pallas_kernels.triton import routing as triton_routing
from pallas_kernels.triton.launch import call
from tests import h100_target
from tests.backend_cases import slow

MAX_INSTRUCTIONS = 2500  # of a kernel, whatever the number of experts
F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32


def specs(*shapes):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]


def compile_plan(num_experts, num_local_experts, top_k, num_tokens, block_m):
    def run(topk_ids, offset):
        return plan.plan_groups(
            topk_ids,
            offset,
            num_local_experts=num_local_experts,
            num_experts=num_experts,
            block_m=block_m,
        )

    arrays = specs(((num_tokens, top_k), I32), ((), I32))
    return h100_target.compile_for_h100(run, *arrays).kernels


def router_specs(num_tokens, num_experts):
    return specs(((num_tokens, num_experts), F32), ((num_experts,), BF16), ((), F32))


def compile_routing(num_experts, top_k, n_group, topk_group, num_tokens, has_bias=True, **options):
    groups = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}

    def run(logits, bias, factor):
        return routing.route(logits, bias if has_bias else None, factor, **groups, **options)

    return h100_target.compile_for_h100(run, *router_specs(num_tokens, num_experts)).kernels


def compile_triton_plan(num_experts, num_local_experts, top_k, num_tokens, block_m):
    sizes = {"num_local_experts": num_local_experts, "num_experts": num_experts}

    def run(topk_ids, offset):
        counts = None
        if not triton_plan.is_counted_by_all(num_tokens, top_k):
            (counts,) = call(triton_plan.count_launch(topk_ids, offset, **sizes), 90)
        return call(triton_plan.plan_launch(topk_ids, offset, counts, block_m=block_m, **sizes), 90)

    arrays = specs(((num_tokens, top_k), I32), ((), I32))
    return h100_target.compile_triton_kernels(run, *arrays)


def compile_triton_routing(
    num_experts, top_k, n_group, topk_group, num_tokens, has_bias=True, **options
):
    groups = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}

    def run(logits, bias, factor):
        bias = bias if has_bias else None
        return call(triton_routing.launch(logits, bias, factor, **groups, **options), 90)

    return h100_target.compile_triton_kernels(run, *router_specs(num_tokens, num_experts))


def check(kernels, names):
    assert [kernel.name for kernel in kernels] == names
    for kernel in kernels:
        assert kernel.spill_bytes == 0, kernel
        assert sum(kernel.instructions.values()) <= MAX_INSTRUCTIONS, kernel


def check_plan(num_experts, num_local_experts, top_k, num_tokens):
    few = num_tokens <= 64
    sizes = (num_experts, num_local_experts, top_k, num_tokens, 16 if few else 128)
    check(compile_plan(*sizes), ["moe_plan_place"] if few else ["moe_plan_count", "moe_plan_place"])
    few = num_tokens * top_k <= 2048
    names = ["plan_kernel"] if few else ["count_kernel", "plan_kernel"]
    check(compile_triton_plan(*sizes), names)


def check_routing(*sizes, **options):
    check(compile_routing(*sizes, **options), ["moe_routing"])
    check(compile_triton_routing(*sizes, **options), ["routing_kernel"])


@pytest.mark.parametrize(
    ("num_local_experts", "top_k", "num_tokens"),
    [(128, 8, 64), slow(256, 8, 4096), (512, 16, 16384)],
)
def test_plan(num_local_experts, top_k, num_tokens):
    check_plan(512, num_local_experts, top_k, num_tokens)


@pytest.mark.parametrize("num_local_experts", [1, 48, 128, 256, 300, 1024, 4096])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 8), (4096, 1), (16384, 8), (10**6, 8)])
def test_a_plan_takes_little_shared_memory(num_tokens, top_k, num_local_experts):
    """Up to 32 KB of bits, whatever the sizes; an expert or a thread per column, half of them idle
    at most."""
    sizes = plan._sizes(num_tokens, top_k, num_local_experts)
    assert 4 * sizes.words * sizes.width <= 32 * 1024
    assert num_local_experts <= sizes.width < 2 * max(num_local_experts, 128)
    assert sizes.num_blocks * sizes.block_words * 32 >= num_tokens


@pytest.mark.parametrize(("num_experts", "top_k"), [(384, 8), (1024, 16)])
def test_routing(num_experts, top_k):
    check_routing(num_experts, top_k, 1, 1, 64)


@pytest.mark.slow
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrtsoftplus"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "n_group", "topk_group"),
    [(128, 8, 1, 1), (256, 8, 8, 4), (384, 8, 1, 1), (512, 10, 1, 1)],
)
def test_routing_by_other_scores(scoring, has_bias, num_experts, top_k, n_group, topk_group):
    sizes = (num_experts, top_k, n_group, topk_group, 64)
    options = {"scoring": scoring, "has_bias": has_bias, "renormalize": has_bias}
    mosaic, triton = compile_routing(*sizes, **options), compile_triton_routing(*sizes, **options)
    for kernel in (*mosaic, *triton):
        assert kernel.spill_bytes == 0, kernel
    check(mosaic, ["moe_routing"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_local_experts", "top_k", "num_tokens"),
    [
        *itertools.product((1, 8, 32, 48, 112, 128, 256, 512), (1, 8, 16), (1, 64, 4096)),
        *itertools.product((1, 32, 128, 512), (8, 32), (16384, 131072)),
    ],
)
def test_every_plan(num_local_experts, top_k, num_tokens):
    check_plan(1024, num_local_experts, top_k, num_tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_experts", "top_k"),
    [*itertools.product((8, 64, 128, 160, 256, 300, 384, 512, 768, 1024), (1, 2, 6, 8, 16))],
)
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 4), (4, 2), (8, 4)])
def test_every_routing(num_experts, top_k, n_group, topk_group):
    group_size, left = divmod(num_experts, n_group)
    if left or group_size < 2 or top_k > group_size * topk_group:
        pytest.skip("no such router")
    check_routing(num_experts, top_k, n_group, topk_group, 901)
