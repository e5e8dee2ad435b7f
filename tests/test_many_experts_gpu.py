"""One GPU that holds all experts of a model: the layer is right, and its glue stays short."""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import profiler

import jax_moe
from jax_moe import MoEConfig, backends
from tests.moe_inputs import E4M3, relative_error
from tests.test_plan import check_plan, draw_ids, make_plan

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("many_experts")]

# E = E_local, H, I, config: Qwen3-30B's experts, and the 11 GB of one DeepSeek-V3 layer.
MODELS = {
    128: (2048, 768, MoEConfig(top_k=8, n_group=1, topk_group=1)),
    256: (7168, 2048, jax_moe.DEEPSEEK_V3),
}
MOST_PLAN_AND_ROUTING_US = 40
MOST_RELATIVE_ERROR = 0.03


def random_weights(key, num_experts, rows, columns):
    """Gaussian e4m3 and even scales, an expert at a time: float32 of all would not fit."""

    def expert(key):
        return jax.random.normal(key, (rows, columns)).astype(E4M3)

    values = jax.jit(functools.partial(jax.lax.map, expert))(jax.random.split(key, num_experts))
    scales = jnp.full((num_experts, rows // 128, columns // 128), columns**-0.5, jnp.float32)
    return values, scales


@functools.cache
def weights(num_experts):
    hidden, intermediate, _ = MODELS[num_experts]
    up, down = jax.random.split(jax.random.key(0))
    return (
        *random_weights(up, num_experts, 2 * intermediate, hidden),
        *random_weights(down, num_experts, hidden, intermediate),
    )


def routing_inputs(num_experts, num_tokens):
    rng = np.random.default_rng(num_tokens)
    logits = jnp.asarray(rng.standard_normal((num_tokens, num_experts), np.float32))
    return logits, jnp.asarray(rng.standard_normal(num_experts) / 10, jnp.bfloat16)


@pytest.mark.parametrize("num_experts", MODELS)
@pytest.mark.parametrize("num_tokens", [64, 4096])
def test_layer(num_experts, num_tokens):
    hidden, _, config = MODELS[num_experts]
    x = jax.random.normal(jax.random.key(1), (num_tokens, hidden), jnp.bfloat16)
    x = jax_moe.quantize(x)
    inputs = jax_moe.LayerInputs.of(
        *routing_inputs(num_experts, num_tokens), *x, *weights(num_experts), 0, 2.5
    )
    expected = jax_moe.reference(*inputs.arguments, config=config)
    for backend in ("mosaic", "triton"):
        if backends.unsupported_reason(backend) is None:
            out = jax_moe.apply(*inputs.arguments, config=config, backend=backend)
            assert relative_error(out, expected) <= MOST_RELATIVE_ERROR, backend
    weights.cache_clear()


@pytest.mark.parametrize("backend", ["mosaic", "triton"])
@pytest.mark.parametrize(
    ("num_experts", "num_local_experts", "top_k", "offset"),
    [(256, 32, 8, 96), (512, 512, 16, 0), (1024, 300, 32, 700), (128, 128, 1, 0)],
)
@pytest.mark.parametrize("num_tokens", [64, 1000, 4096, 16384, 40000])
def test_plan(backend, num_experts, num_local_experts, top_k, offset, num_tokens):
    ids = draw_ids(num_tokens, num_experts, top_k)
    ids[::5, -1] = ids[::5, 0]
    plan = make_plan(backend, ids, offset, num_local_experts, num_experts)
    check_plan(plan, ids, offset, num_local_experts, num_experts)


def plan_and_routing_us(num_experts, num_tokens):
    """Their kernels together; the plan is checked."""
    config = MODELS[num_experts][2]

    @jax.jit
    def route_and_plan(logits, bias):
        routing = jax_moe.route(logits, bias, 2.5, config=config, backend="mosaic")
        sizes = {"num_local_experts": num_experts, "num_experts": num_experts}
        return routing, jax_moe.plan_groups(routing.topk_ids, 0, **sizes, backend="mosaic")

    inputs = routing_inputs(num_experts, num_tokens)
    (routing, plan), times = profiler.measure(route_and_plan, iterations=20)(*inputs)
    ids = np.asarray(routing.topk_ids)
    check_plan(jax.tree.map(np.asarray, plan), ids, 0, num_experts, num_experts)
    return statistics.median(times) * 1e3


@pytest.mark.timing
@pytest.mark.parametrize("num_experts", MODELS)
@pytest.mark.parametrize("num_tokens", [64, 4096])
def test_plan_and_routing_are_short(num_experts, num_tokens):
    if reason := backends.unsupported_reason("mosaic"):
        pytest.skip(reason)
    # A process of its own: CUPTI takes one subscriber, and other tests here are others.
    code = (
        "from tests.test_many_experts_gpu import plan_and_routing_us\n"
        f"print('us', plan_and_routing_us({num_experts}, {num_tokens}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("us ")[-1]) <= MOST_PLAN_AND_ROUTING_US, done.stdout
