"""The kernel backends under JAX's transformations: lowered for a GPU that is not here."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

import jax_moe
from pallas_kernels.mosaic.hopper.matmul_config import MatmulConfig
from tests.backend_cases import slow
from tests.moe_inputs import SMALL
from tests.test_api import TRITON_CALLS

TOKENS, EXPERTS, LOCAL_EXPERTS, HIDDEN, INTERMEDIATE = 16, 32, 8, 256, 128
BACKENDS = pytest.mark.parametrize("backend", ["mosaic", "triton"])


def specs(batch=(), tokens=TOKENS):
    """The eight arrays of `apply`; `batch` leads the shapes of the per-token ones."""
    f32, e4m3 = jnp.float32, jnp.float8_e4m3fn
    make = jax.ShapeDtypeStruct
    return (
        make((*batch, tokens, EXPERTS), f32),
        make((EXPERTS,), jnp.bfloat16),
        make((*batch, tokens, HIDDEN), e4m3),
        make((*batch, HIDDEN // 128, tokens), f32),
        make((LOCAL_EXPERTS, 2 * INTERMEDIATE, HIDDEN), e4m3),
        make((LOCAL_EXPERTS, 2 * INTERMEDIATE // 128, HIDDEN // 128), f32),
        make((LOCAL_EXPERTS, HIDDEN, INTERMEDIATE), e4m3),
        make((LOCAL_EXPERTS, HIDDEN // 128, INTERMEDIATE // 128), f32),
    )


def lower_for_hopper(function, *arguments):
    with jax_moe.assume_device("sm_90"):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


def layer(backend):
    return functools.partial(jax_moe.apply, config=SMALL, backend=backend)


@BACKENDS
def test_x64(backend):
    with jax.enable_x64(True):
        lowered = lower_for_hopper(lambda *arrays: layer(backend)(*arrays, 8, 2.5), *specs())
    assert lowered.out_info.dtype == jnp.bfloat16
    assert "custom_call" in lowered.as_text()


@BACKENDS
def test_vmap(backend):
    def each(*arrays):
        return layer(backend)(*arrays, 8, 2.5)

    axes = (0, None, 0, 0, None, None, None, None)
    lowered = lower_for_hopper(jax.vmap(each, in_axes=axes), *specs(batch=(3,)))
    assert lowered.out_info.shape == (3, TOKENS, HIDDEN)


@BACKENDS
def test_export(backend):
    """What was exported here can be read where there is a GPU."""
    with jax_moe.assume_device("sm_90"):
        function = jax.jit(lambda *arrays: layer(backend)(*arrays, 8, 2.5))
        exported = jax.export.export(function, platforms=("cuda",), disabled_checks=TRITON_CALLS)(
            *specs()
        )
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cuda",)
    assert again.out_avals[0].shape == (TOKENS, HIDDEN)


@pytest.mark.parametrize(
    ("backend", "check_vma", "tokens"),
    [
        ("mosaic", False, TOKENS),
        slow("mosaic", True, TOKENS),
        ("mosaic", True, 1500),  # tiles drawn by a warp of its own, in a `plgpu.warp_map`
        ("triton", False, TOKENS),
        ("triton", True, TOKENS),
    ],
)
def test_shard_map(backend, check_vma, tokens):
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))
    everywhere, split = PartitionSpec(), PartitionSpec("expert")

    def rank(*arrays):
        offset = jax.lax.axis_index("expert") * LOCAL_EXPERTS
        part = layer(backend)(*arrays, offset, 2.5)
        return jax.lax.psum(part.astype(jnp.float32), "expert")

    sharded = jax.shard_map(
        rank,
        mesh=mesh,
        in_specs=(*[everywhere] * 4, *[split] * 4),
        out_specs=everywhere,
        check_vma=check_vma,
    )
    lowered = lower_for_hopper(sharded, *specs(tokens=tokens))
    assert lowered.out_info.shape == (tokens, HIDDEN)


@BACKENDS
def test_a_derivative_is_one_clear_error(backend):
    def loss(logits, *arrays):
        return layer(backend)(logits, *arrays, 8, 2.5).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="forward"):
        lower_for_hopper(jax.grad(loss), *specs())


@pytest.mark.parametrize(
    ("split_k_steps", "steps", "segments"),
    [(14, 56, 4), (8, 16, 2), (8, 112, 7), (8, 88, 1), (7, 56, 8), (5, 56, 1), (None, 56, 1)],
)
def test_segments_are_few_however_long_k_is(split_k_steps, steps, segments):
    assert MatmulConfig(64, 4, split_k_steps=split_k_steps).segments(steps) == segments
