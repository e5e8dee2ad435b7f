"""Triton kernels on a GPU: JAX and PyTorch launch the same bits, each tiling is right."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_moe
from interop.triton_launch import launch_torch
from jax_moe import GroupPlan
from pallas_kernels.triton import (
    down_projection,
    group_quant,
    routing,
    tilings,
    unpermute,
    up_projection,
)
from pallas_kernels.triton import plan as plan_kernels
from pallas_kernels.triton.launch import call
from pallas_kernels.tuning.table_format import DEEPSEEK_V3
from tests.moe_inputs import SMALL, array_arguments, bits, make_inputs, on_device, relative_error

pytestmark = pytest.mark.gpu

# One for each tiling: 4 of 32 experts a token, 16 of them local.
TOKENS = (40, 100, 700, 2500)


def inputs_of(num_tokens: int) -> Any:
    sizes = {"hidden_size": 512, "intermediate_size": 256}
    return make_inputs(num_tokens, num_experts=32, num_local_experts=16, **sizes)


def capability() -> int:
    return int(jax.devices("gpu")[0].compute_capability.replace(".", ""))


def to_torch(array: jax.Array) -> torch.Tensor:
    array = np.asarray(array)
    name = array.dtype.name
    if name in ("float8_e4m3fn", "bfloat16"):
        return torch.from_numpy(bits(array).copy()).view(getattr(torch, name)).cuda()
    return torch.from_numpy(array.copy()).cuda()


def raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def launched_by_both(make_launch, *arrays, only=None, **limits):
    """JAX's outputs, after a check that PyTorch's have the same bits, in the rows `only`."""
    outputs = jax.jit(lambda *a: call(make_launch(*a, **limits)))(*arrays)
    peers = launch_torch(make_launch(*map(to_torch, arrays), **limits))
    for output, peer in zip(outputs, peers, strict=True):
        found = np.frombuffer(raw_bytes(peer), np.uint8).reshape(*output.shape, -1)
        expected = bits(output).reshape(*output.shape, 1).view(np.uint8)
        if only is not None:
            axis = 0 if output.shape[0] == len(only) else 1
            found, expected = (np.compress(only, x, axis) for x in (found, expected))
        np.testing.assert_array_equal(found, expected)
    return outputs


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_jax_and_torch_launch_the_same_bits(num_tokens):
    inputs = on_device(inputs_of(num_tokens))
    logits, bias, x, x_scale, w13, s13, w2, s2 = array_arguments(inputs)
    sizes = {"num_local_experts": 16, "num_experts": 32}
    groups = {"top_k": SMALL.top_k, "n_group": SMALL.n_group, "topk_group": SMALL.topk_group}
    launched_by_both(group_quant.launch, x.astype(jnp.bfloat16))
    ids, weights = launched_by_both(routing.launch, logits, bias, jnp.float32(2.5), **groups)

    block_m = tilings.block_m(num_tokens * SMALL.top_k / 32, capability())
    offset = jnp.int32(inputs.local_expert_offset)
    arrays = [ids, offset]
    if not plan_kernels.is_counted_by_all(*ids.shape):
        arrays += launched_by_both(plan_kernels.count_launch, ids, offset, **sizes)

    def plan_launch(ids, offset, counts=None, **sizes):
        return plan_kernels.plan_launch(ids, offset, counts, **sizes)

    plan = GroupPlan(*launched_by_both(plan_launch, *arrays, block_m=block_m, **sizes))
    live = np.asarray(plan.row_token) >= 0
    assert plan.block_m == block_m
    tiles = (plan.tile_expert, plan.num_tiles)
    up_config, down_config = tilings.choose(block_m, capability(), *DEEPSEEK_V3)
    limits = {"only": live, "num_sms": 7}
    up = launched_by_both(
        up_projection.launch, x, x_scale, w13, s13, plan.row_token, *tiles,
        config=up_config, **limits,
    )  # fmt: skip
    (down,) = launched_by_both(
        down_projection.launch, *up, w2, s2, *tiles, config=down_config, **limits
    )
    launched_by_both(unpermute.launch, down, weights, plan.pair_row)


def test_the_sizes_here_meet_every_tiling():
    met = {tilings.block_m(t * SMALL.top_k / 32, capability()) for t in TOKENS}
    assert met >= set(tilings.GENERATIONS[tilings.generation(capability())].block_ms)


@pytest.mark.parametrize("num_tokens", [1, 15, *TOKENS])
def test_layer_agrees_with_the_plain_backend_and_with_itself(num_tokens):
    inputs = on_device(inputs_of(num_tokens))
    found = jax_moe.apply(*inputs.arguments, config=SMALL, backend="triton")
    expected = jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla")
    assert relative_error(found, expected) < 1.5e-2
    again = jax_moe.apply(*inputs.arguments, config=SMALL, backend="triton")
    np.testing.assert_array_equal(bits(found), bits(again))


@pytest.mark.parametrize("num_tokens", [257, 1024])
def test_all_tokens_on_one_expert_and_on_none(num_tokens):
    inputs = inputs_of(num_tokens)
    logits = np.full((num_tokens, 32), -5, np.float32)
    logits[:, [9, 30, 31]] = 4.0  # one local expert of 8..23, two of other ranks
    inputs = on_device(inputs._replace(routing_logits=logits, routing_bias=logits[0] * 0))
    config = jax_moe.MoEConfig(top_k=3, n_group=1, topk_group=1)
    found = jax_moe.apply(*inputs.arguments, config=config, backend="triton")
    expected = jax_moe.apply(*inputs.arguments, config=config, backend="xla")
    assert relative_error(found, expected) < 1.5e-2
    nothing = inputs._replace(routing_logits=jnp.where(jnp.arange(32) == 9, -9.0, logits))
    only_others = jax_moe.MoEConfig(top_k=2, n_group=1, topk_group=1)
    assert not bits(jax_moe.apply(*nothing.arguments, config=only_others, backend="triton")).any()
