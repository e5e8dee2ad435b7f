"""Lowered layers kept for the next process: the same program, made anew whenever in doubt."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jax_moe
from jax_moe import DEEPSEEK_V3, backends, lowering_cache
from pallas_kernels import device
from tests import h100_target
from tests.moe_inputs import SMALL, bits, make_inputs, rank_specs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Everything is kept there, whatever device and settings this is."""
    monkeypatch.setattr(lowering_cache, "_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(backends.load("xla"), "KEEPS_LOWERED", True)
    monkeypatch.setattr(lowering_cache, "_PLATFORM", "cpu")
    jax.clear_caches()  # a layer that an earlier test compiled would not be kept
    return tmp_path / "cache"


def never(*_):
    raise AssertionError("traced again")


def product(x, nothing, y):
    assert nothing is None
    return x * y


def test_the_next_process_does_not_trace(folder):
    arguments = np.arange(6, dtype=np.float32), None, 2.5
    expected = jax.jit(product)(*arguments)
    first = jax.jit(lowering_cache.cached_lowering(product, SMALL))(*arguments)
    (file,) = folder.iterdir()
    kept = file.read_bytes()
    again = jax.jit(lowering_cache.cached_lowering(never, SMALL))(*arguments)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(again, expected)
    assert first.weak_type == again.weak_type == expected.weak_type
    assert file.read_bytes() == kept


def test_a_layer_gives_the_same_bits(folder):
    inputs = make_inputs(5)
    plain = jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla", num_tokens=4)
    assert len(list(folder.iterdir())) == 1
    jax.clear_caches()  # as another process: read from the file
    again = jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla", num_tokens=4)
    batched = jax.vmap(
        lambda logits: jax_moe.apply(
            *inputs._replace(routing_logits=logits).arguments, config=SMALL, backend="xla"
        )
    )
    np.testing.assert_array_equal(bits(plain), bits(again))
    np.testing.assert_array_equal(
        bits(batched(jnp.stack([inputs.routing_logits] * 2))[1]),
        bits(jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla")),
    )
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(
            lambda logits: (
                jax_moe.apply(*inputs._replace(routing_logits=logits).arguments, config=SMALL)
                .sum()
                .astype(float)
            )
        )(inputs.routing_logits)


def test_other_tilings_are_another_program(folder, monkeypatch):
    inputs, asked = make_inputs(5), []
    for number in range(2):
        monkeypatch.setattr(
            backends.load("xla"),
            "tiling_table",
            lambda *sizes: asked.append(sizes) or number,  # noqa: B023
        )
        jax.clear_caches()
        jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla")
    assert asked == [(256, 128, 8)] * 2
    assert len(list(folder.iterdir())) == 2


def digest(arguments, static=(DEEPSEEK_V3,)):
    leaves, structure = jax.tree.flatten(arguments)
    return lowering_cache._digest(leaves, (structure, *static))


def test_what_a_program_depends_on_is_in_its_name(monkeypatch):
    specs = (jax.ShapeDtypeStruct((4, 8), jnp.float32), None)
    gpu = SimpleNamespace(device_kind="H100", compute_capability="9.0", core_count=132)
    monkeypatch.setattr(device, "local_gpu", lambda: gpu)
    names = [digest(specs)]
    assert names[0] == digest(specs)
    names.append(digest(specs, (SMALL,)))
    names.append(digest(specs, (DEEPSEEK_V3, {})))  # a table of tilings
    for other in (
        (jax.ShapeDtypeStruct((4, 9), jnp.float32), None),
        (jax.ShapeDtypeStruct((4, 8), jnp.bfloat16), None),
        (jax.ShapeDtypeStruct((4, 8), jnp.float32, weak_type=True), None),
        (None, jax.ShapeDtypeStruct((4, 8), jnp.float32)),
    ):
        names.append(digest(other))
    with jax.enable_x64(True):
        names.append(digest(specs))
    changes = [
        (jax, "__version__", "0.0.0"),
        (lowering_cache, "_sources", lambda: "other"),
        (gpu, "core_count", 114),
        (gpu, "device_kind", "H200"),
    ]
    for place, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            names.append(digest(specs))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "damage", [b"", b"short", lambda data: data[:-1], lambda data: data + b"x"]
)
def test_a_damaged_file_is_made_anew(folder, damage):
    function = lowering_cache.cached_lowering(lambda x: x + 1)
    jax.jit(function)(1.0)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole) if callable(damage) else damage)
    with pytest.warns(UserWarning, match="damaged, made anew"):
        assert jax.jit(lambda x: function(x))(1.0) == 2
    assert list(folder.iterdir()) == [file]
    assert jax.jit(lowering_cache.cached_lowering(never))(1.0) == 2


def test_a_folder_that_cannot_be_used_is_a_warning(folder):
    folder.write_text("a file")
    function = lowering_cache.cached_lowering(lambda x: x + 1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert jax.jit(function)(1.0) == 2
    messages = [str(warning.message) for warning in seen]
    assert [message.split(": ")[1] for message in messages] == ["not read", "not kept"]
    assert all(str(folder) in message for message in messages)


@pytest.fixture
def cache_at():
    """Where JAX keeps what it compiles, for one test."""
    before = jax.config.jax_compilation_cache_dir
    yield functools.partial(jax.config.update, "jax_compilation_cache_dir")
    jax.config.update("jax_compilation_cache_dir", before)


def test_when_layers_are_kept(tmp_path, monkeypatch, cache_at):
    monkeypatch.setattr(device, "local_gpu", lambda: object())
    cache_at(None)
    assert lowering_cache._folder() is None, "JAX's own cache is off"
    cache_at(str(tmp_path))
    assert lowering_cache._folder() == tmp_path
    kept = [name for name in backends.NAMES if backends.load(name).KEEPS_LOWERED]
    assert kept == ["mosaic"], "only Pallas takes long to lower"
    with h100_target.no_compilation_cache():
        assert lowering_cache._folder() is None
    with jax_moe.assume_device("sm_90"):
        assert lowering_cache._folder() is None
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    seen = []

    def inside(x):
        seen.append(lowering_cache._folder())
        return x

    for axes in ({"x", "y"}, {"x"}):
        jax.jit(
            jax.shard_map(
                inside,
                mesh=mesh,
                in_specs=PartitionSpec("x"),
                out_specs=PartitionSpec("x"),
                axis_names=axes,
            )
        )(jnp.ones(1))
    assert seen == [tmp_path, None], "a device by itself, or one of several along y"
    monkeypatch.setattr(device, "local_gpu", lambda: None)
    assert lowering_cache._folder() is None
    monkeypatch.setattr(device, "local_gpu", lambda: object())
    cache_at("gs://bucket/cache")
    assert lowering_cache._folder() is None


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [80, 14107])
def test_the_kept_program_is_the_layer_itself(num_tokens, folder, monkeypatch):
    """For an H100: the same instructions, in one CUDA graph, and no copy between them."""
    monkeypatch.setattr(lowering_cache, "_PLATFORM", "cuda")

    def layer():
        def run(*arguments):
            with jax_moe.assume_device("sm_90"):
                return jax_moe.apply(*arguments, backend="mosaic")

        return run

    specs = rank_specs(num_tokens)
    kept = h100_target.compile_for_h100(layer(), *specs.arguments)
    assert len(list(folder.iterdir())) == 1
    monkeypatch.undo()
    jax.clear_caches()
    plain = h100_target.compile_for_h100(layer(), *specs.arguments)
    assert [k.name for k in kept.kernels] == [k.name for k in plain.kernels]
    assert [k.instructions for k in kept.kernels] == [k.instructions for k in plain.kernels]
    assert (kept.launches, kept.command_buffers) == (plain.launches, plain.command_buffers)
    assert kept.launches_outside_command_buffers == 0
    assert kept.temp_bytes == plain.temp_bytes
