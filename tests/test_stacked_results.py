"""Results that become part of a larger array: of `lax.scan`, `vmap`, and written into a slice.

XLA lets a kernel write straight into the slice. That goes wrong where the kernel writes an operand
in place, as the last one does where tiles have 128 tokens (`pallas_kernels.mosaic.launch`).
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_moe
from tests import h100_target
from tests.backend_cases import slow
from tests.moe_inputs import SMALL, make_inputs

COUNTS = (40, 640)  # of tiles of 16 and, written in place, of 128 tokens


def scanned(layer, inputs):
    return lax.scan(lambda carry, _: (carry, layer(*inputs.arguments)), 0, length=3)[1]


def mapped(layer, inputs):
    stacked = jnp.stack([inputs.hidden_states] * 3)
    return jax.vmap(lambda x: layer(*inputs._replace(hidden_states=x).arguments))(stacked)


def updated(layer, inputs):
    """With places known when the program is compiled, and with one that is not."""
    out = jnp.zeros((3, *inputs.hidden_states.shape), jnp.bfloat16)
    for place in (0, 2):
        out = out.at[place].set(layer(*inputs.arguments))
    place = 1 + (inputs.routing_logits[0, 0] > jnp.inf).astype(jnp.int32)
    return lax.dynamic_update_index_in_dim(out, layer(*inputs.arguments), place, 0)


WAYS = {"scan": scanned, "vmap": mapped, "update": updated}


def stages_of(inputs, config, **options):
    """All results of the stages, by name."""
    x, scale, weights = inputs.hidden_states, inputs.hidden_states_scale, inputs.weights
    scalars = inputs.routed_scaling_factor, inputs.local_expert_offset
    routing = jax_moe.route(
        inputs.routing_logits, inputs.routing_bias, scalars[0], config=config, **options
    )
    plan = jax_moe.plan_groups(
        routing.topk_ids,
        scalars[1],
        num_local_experts=weights.num_local_experts,
        num_experts=inputs.routing_logits.shape[1],
        **options,
    )
    up = jax_moe.up_project(x, scale, *weights[:2], plan, **options)
    down = jax_moe.down_project(up, *weights[2:], plan, **options)
    output = jax_moe.unpermute(down, routing.topk_weights, plan, **options)
    return {"routing": routing, "plan": plan, "up": up, "down": down, "output": output}


def written(results):
    """What is written of the results of `stages_of`: the rows of local pairs."""
    pair_row = np.asarray(results["plan"].pair_row)
    rows = pair_row[pair_row >= 0]
    assert rows.size
    up, down = results["up"], results["down"]
    return [
        *map(np.asarray, results["routing"]),
        pair_row,
        np.asarray(up.values)[rows],
        np.asarray(up.scales)[:, rows],
        np.asarray(down)[rows],
        np.asarray(results["output"]),
    ]


@pytest.mark.parametrize("way", ["scan", slow("vmap"), slow("update")])
def test_no_kernel_that_writes_in_place_is_given_a_slice(way):
    with jax_moe.assume_device("sm_90"), h100_target.no_compilation_cache():
        layer = functools.partial(jax_moe.apply, config=SMALL, backend="mosaic")
        sharding = h100_target.h100_sharding()
        specs = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                jnp.shape(leaf), jax.dtypes.result_type(leaf), sharding=sharding
            ),
            make_inputs(COUNTS[1]),
        )
        traced = jax.jit(functools.partial(WAYS[way], layer)).trace(specs)
        program = traced.lower().compile().as_text()
    assert re.search("output_to_operand_aliasing.*moe_unpermute_local/", program)
    for computation in re.split(r"\n(?=%|ENTRY)", program):
        if re.match("%dynamic-slice-fusion", computation):
            assert "output_to_operand_aliasing" not in computation


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("precision", ["fast", "high"])
@pytest.mark.parametrize("backend", ["mosaic", "triton"])
@pytest.mark.parametrize("way", WAYS)
def test_a_slice_holds_the_bits_of_a_call(way, backend, precision, num_tokens):
    inputs = jax.tree.map(jnp.asarray, make_inputs(num_tokens))
    layer = functools.partial(jax_moe.apply, config=SMALL, backend=backend, precision=precision)
    wanted = np.asarray(jax.jit(layer)(*inputs.arguments)).view(np.uint16)
    found = np.asarray(jax.jit(functools.partial(WAYS[way], layer))(inputs)).view(np.uint16)
    assert wanted.any()
    for place in range(3):
        np.testing.assert_array_equal(found[place], wanted, err_msg=f"place {place}")


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("backend", ["mosaic", "triton"])
def test_slices_hold_the_bits_of_the_stages(backend, num_tokens):
    inputs = jax.tree.map(jnp.asarray, make_inputs(num_tokens))
    stages = functools.partial(stages_of, config=SMALL, backend=backend)
    wanted = written(jax.jit(stages)(inputs))
    stacked = jax.jit(lambda given: lax.scan(lambda c, _: (c, stages(given)), 0, length=3)[1])
    results = stacked(inputs)
    for place in range(3):
        found = written(jax.tree.map(lambda leaf, at=place: leaf[at], results))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
