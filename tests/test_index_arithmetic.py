"""Arrays of more than 2^31 elements: right, or refused by name before anything is compiled."""

from __future__ import annotations

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import DEEPSEEK_V3, LayerInputs, MoEConfig, backends
from pallas_kernels.mosaic import permute
from pallas_kernels.types import GroupPlan, Quantized
from tests import h100_target
from tests.moe_inputs import E4M3, rank_specs, relative_error

# T * top_k * H, E_local * 2 * I * H and E_local * H * I pass 2^31. The odd factors of H and I make
# every multiplication by a row's length show in the code.
TOKENS, LOCAL, HIDDEN, INTERMEDIATE = 37504, 160, 59 * 128, 17 * 128
PAIRS = TOKENS * DEEPSEEK_V3.top_k
PLAIN = MoEConfig(top_k=8, n_group=1, topk_group=1)

_PRODUCT = re.compile(r"^\s*(?:mul|mad)\.lo\.[su]32\s+(%\w+), (%\w+), (\d+)", re.MULTILINE)
_ASSIGNMENT = re.compile(r"^\s*(?:@!?%\w+ )?(\S+)\s+([{%][^;]*);", re.MULTILINE)


def narrow_products(ptx: str) -> list[str]:
    """Products in 32 bits of a row's length and something that is more than a lane's number."""
    sources = collections.defaultdict(list)
    for operation, operands in _ASSIGNMENT.findall(ptx):
        written, _, read = operands.partition("}, " if operands.startswith("{") else ", ")
        for register in re.findall(r"%\w+", written):
            sources[register].append((operation, re.findall(r"%[\w.]+", read)))

    @functools.cache
    def grows(register: str) -> bool:
        reached, open_ = set(), [register]
        while open_:
            name = open_.pop()
            if name.startswith(("%ctaid", "%nctaid")):
                return True
            if name not in reached:
                reached.add(name)
                for operation, read in sources[name]:
                    if operation.startswith("ld."):
                        return True
                    open_ += read
        return False

    return [
        match[0].strip()
        for match in _PRODUCT.finditer(ptx)
        if (int(match[3]) % HIDDEN == 0 or int(match[3]) % INTERMEDIATE == 0) and grows(match[2])
    ]


def test_the_rule_sees_a_row_that_is_multiplied_in_32_bits():
    loaded = "ld.global.b32 \t%r1, [%rd1];\nadd.s32 \t%r2, %r1, 1;\n"
    assert narrow_products(loaded + f"mul.lo.s32 \t%r3, %r2, {HIDDEN};")
    assert narrow_products(loaded + f"mad.lo.s32 \t%r3, %r2, {2 * INTERMEDIATE}, %r9;")
    assert narrow_products(f"mov.u32 \t%r1, %ctaid.x;\nmul.lo.s32 \t%r3, %r1, {HIDDEN};")
    assert narrow_products(loaded + f"mul.wide.s32 \t%rd3, %r2, {HIDDEN};") == []
    assert narrow_products(f"mov.u32 \t%r1, %tid.x;\nmul.lo.s32 \t%r3, %r1, {HIDDEN};") == []


@pytest.mark.parametrize("backend", ["triton", pytest.param("mosaic", marks=pytest.mark.slow)])
def test_rows_are_found_in_64_bits(backend):
    """The kernels' code for an H100, at sizes whose element counts do not fit in int32."""
    assert min(PAIRS * HIDDEN, LOCAL * HIDDEN * INTERMEDIATE) > 2**31

    def layer(*arguments):
        with jax_moe.assume_device("sm_90"):
            return jax_moe.apply(*arguments, backend=backend)

    specs = rank_specs(TOKENS, num_local=LOCAL, hidden=HIDDEN, intermediate=INTERMEDIATE)
    kernels = h100_target.ptx_for_h100(layer, *specs.arguments)
    assert len(kernels) >= 5
    assert {name: found for name, ptx in kernels.items() if (found := narrow_products(ptx))} == {}
    wide = re.compile(rf"\b(?:mul|mad)\.(?:wide\.[su]32|lo\.s64)\s.*\b{2 * HIDDEN}\b")
    assert wide.search(
        kernels["moe_unpermute_local" if backend == "mosaic" else "unpermute_kernel"]
    )


def test_offsets_that_int32_does_not_reach_are_refused():
    """Scales are found by flat offsets: [H/128, T] must have at most 2^31 elements."""
    tokens, hidden = 2**26, 7168
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    with pytest.raises(ValueError, match=r"at most 2\^31 elements.* got \[56, 67108864\]"):
        jax.eval_shape(
            permute.permute_rows,
            Quantized(
                jax.ShapeDtypeStruct((tokens, hidden), E4M3),
                jax.ShapeDtypeStruct((hidden // 128, tokens), jnp.float32),
            ),
            GroupPlan(
                group_sizes=one,
                group_offsets=one,
                row_token=jax.ShapeDtypeStruct((128,), jnp.int32),
                pair_row=jax.ShapeDtypeStruct((tokens, 8), jnp.int32),
                tile_expert=one,
                num_tiles=one,
            ),
        )


@pytest.mark.parametrize("function", [jax_moe.apply, jax_moe.reference])
def test_more_logits_than_int32_reaches_are_refused_by_name(function):
    with pytest.raises(ValueError, match=r"routing_logits: expected T \* E of at most 2\^31"):
        jax.eval_shape(function, *rank_specs(2**23 + 1).arguments)


@pytest.fixture(scope="module")
def large():
    """80 local experts take all choices, the first tokens those whose rows lie last."""
    specs = rank_specs(49152, num_local=80)
    compared = 64

    @jax.jit
    def draw():
        keys = iter(jax.random.split(jax.random.key(0), 10))

        def e4m3(spec):
            """Any finite numbers below 2, in parts: the generator takes 16 times their memory."""
            parts = math.gcd(spec.shape[0], 1280)
            part = (spec.shape[0] // parts, *spec.shape[1:])
            raw = jax.lax.map(
                lambda key: jax.random.bits(key, part, jnp.uint8) & np.uint8(0b10111111),
                jax.random.split(next(keys), parts),
            )
            return jax.lax.bitcast_convert_type(raw.reshape(spec.shape), jnp.float8_e4m3fn)

        def scale(spec, size=1.0):
            return jax.random.uniform(next(keys), spec.shape, minval=0.5, maxval=1.5) * size

        expert, token = jnp.arange(256), jnp.arange(specs.hidden_states.shape[0])[:, None]
        logits = jax.random.normal(next(keys), specs.routing_logits.shape)
        logits = jnp.where((expert >= 64) & (token < compared), logits + 9.0, logits)
        return LayerInputs.of(
            jnp.where(expert < 80, logits, -20.0),
            jnp.zeros(256, jnp.bfloat16),
            e4m3(specs.hidden_states),
            scale(specs.hidden_states_scale),
            e4m3(specs.weights.gemm1_weights),
            scale(specs.weights.gemm1_weights_scale, 7168**-0.5),
            e4m3(specs.weights.gemm2_weights),
            scale(specs.weights.gemm2_weights_scale, 2048**-0.5),
            jnp.int32(0),
            jnp.float32(2.5),
        )

    inputs = draw()
    assert inputs.weights.gemm1_weights.size > 2**31
    chosen = np.argsort(-np.asarray(inputs.routing_logits), axis=1)[:, :8]
    assert (chosen < 64).sum() * 7168 > 2**31, "the rows of the compared tokens lie too early"
    first = inputs._replace(
        routing_logits=inputs.routing_logits[:compared],
        hidden_states=inputs.hidden_states[:compared],
        hidden_states_scale=inputs.hidden_states_scale[:, :compared],
    )
    return inputs, jax_moe.reference(*first.arguments, config=PLAIN)


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("backend", ["mosaic", "triton"])
def test_more_than_2_to_the_31_elements_on_a_gpu(backend, large):
    if reason := backends.unsupported_reason(backend):
        pytest.skip(reason)
    inputs, expected = large
    out = jax_moe.apply(*inputs.arguments, config=PLAIN, backend=backend)
    assert bool(jnp.isfinite(out).all())
    assert relative_error(out[: len(expected)], expected) < 0.03
    assert bool(out.any(axis=1).all())
