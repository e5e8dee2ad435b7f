"""The same bits whatever was in memory, ran before, runs besides, and however it is launched."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import jax_moe
from jax_moe import DEEPSEEK_V3, backends
from tests.backend_cases import EVERYWHERE, running
from tests.moe_inputs import SMALL, array_arguments, bits, make_inputs, on_device, replaced

ON_A_GPU = jax.default_backend() == "gpu"
# Every tile height: 2, 32 and 256 rows expected of each of 32 experts. A CPU takes its time.
TOKENS = (128, 8, 1024 if ON_A_GPU else 256)
NAN, LARGE, ZERO = 0xFF, 0x7E, 0x00  # as bytes: NaN in every float type and -1; 448 in e4m3
KERNELS = [pytest.param(name, marks=pytest.mark.gpu) for name in ("mosaic", "triton")]

pytestmark = pytest.mark.xdist_group("repeatability")  # they share compiled programs


@functools.cache
def inputs_of(num_tokens):
    sizes = {"hidden_size": 512, "intermediate_size": 256} if ON_A_GPU else {}
    experts = {"num_experts": 32, "num_local_experts": 32, "offset": 0}
    return on_device(make_inputs(num_tokens, seed=num_tokens, **experts, **sizes))


def layer(backend):
    return functools.partial(jax_moe.apply, config=DEEPSEEK_V3, backend=backend)


@functools.cache
def first_bits(case, num_tokens):
    """What the first run gave."""
    with running(case) as backend:
        return bits(layer(backend)(*inputs_of(num_tokens).arguments))


def poison(byte):
    """Fills 400 MB in pieces of all sizes and frees them: what is allocated next holds them.

    The largest come first, or small ones would take parts of holes that they leave a rest of.
    """
    sizes = sorted([2**n for n in range(9, 27)] * 3, reverse=True)
    pieces = [jax.device_put(np.full(size, byte, np.uint8)) for size in sizes]
    jax.block_until_ready(pieces)


@pytest.mark.gpu
def test_the_poison_reaches_new_buffers():
    """A kernel that writes nothing shows what its output's memory held."""
    if reason := backends.unsupported_reason("mosaic"):
        pytest.skip(reason)
    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    held = jax.jit(lambda: plgpu.kernel(lambda out: None, out_type=shape, grid=(1,),
                                        grid_names=("block",), kernel_name="idle")())  # fmt: skip
    jax.block_until_ready(held())
    poison(NAN)
    assert np.isnan(np.asarray(held())).mean() > 0.99


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("byte", [NAN, LARGE, ZERO])
def test_memory_filled_before_each_call_changes_no_bit(backend, byte):
    large, small = TOKENS[2], TOKENS[1]
    for num_tokens in (large, small, large, TOKENS[0], small):
        expected = first_bits(backend, num_tokens)
        poison(byte)
        out = layer(backend)(*inputs_of(num_tokens).arguments)
        np.testing.assert_array_equal(bits(out), expected)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_a_donated_output_full_of_nan_changes_no_bit(backend):
    """XLA writes the result over the donated array."""
    inputs = inputs_of(TOKENS[0])

    def into(out, *arrays):
        return layer(backend)(*arrays, 0, 2.5)

    donating = jax.jit(into, donate_argnums=0, keep_unused=True)
    for _ in range(3):
        out = jnp.full(inputs.hidden_states.shape, jnp.nan, jnp.bfloat16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a CPU may not find a use for the buffer
            result = donating(out, *array_arguments(inputs))
        assert out.is_deleted()
        np.testing.assert_array_equal(bits(result), first_bits(backend, TOKENS[0]))


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_a_hundred_runs(case, num_tokens):
    runs = 20 if case == "xla" and num_tokens > 8 else 100
    expected = first_bits(case, num_tokens)
    with running(case) as backend:
        outs = [layer(backend)(*inputs_of(num_tokens).arguments) for _ in range(runs)]
    different = [i for i, out in enumerate(outs) if (bits(out) != expected).any()]
    assert different == []


@pytest.mark.parametrize("case", EVERYWHERE)
def test_jit_equals_eager(case):
    with running(case) as backend:
        out = jax.jit(layer(backend))(*inputs_of(8).arguments)
    np.testing.assert_array_equal(bits(out), first_bits(case, 8))


@pytest.mark.parametrize("case", EVERYWHERE)
def test_order_of_calls_and_other_work_between_them(case):
    """Nothing is waited for until the end, so calls queue up behind each other in every order."""
    work = jax.jit(lambda x: jnp.tanh(x @ x))
    busy = jnp.full((1024, 1024), 1e-3)
    orders = np.random.default_rng(0)
    outs = []
    with running(case) as backend:
        for _ in range(8):
            for num_tokens in orders.permutation(TOKENS):
                busy = work(busy)
                outs.append((num_tokens, layer(backend)(*inputs_of(num_tokens).arguments)))
    for num_tokens, out in outs:
        np.testing.assert_array_equal(bits(out), first_bits(case, num_tokens))


@pytest.mark.parametrize("case", EVERYWHERE)
def test_calls_from_several_threads(case):
    expected = {num_tokens: first_bits(case, num_tokens) for num_tokens in TOKENS}

    def call(num_tokens):
        with running(case) as backend:
            return num_tokens, layer(backend)(*inputs_of(num_tokens).arguments)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for num_tokens, out in pool.map(call, TOKENS * 8):
            np.testing.assert_array_equal(bits(out), expected[num_tokens])


@pytest.mark.parametrize("case", EVERYWHERE)
def test_independent_layers_in_one_program(case):
    """A CUDA graph may run them at the same time: what they share must not be written."""
    with running(case) as backend:
        both = jax.jit(
            lambda *all_inputs: [layer(backend)(*inputs.arguments) for inputs in all_inputs]
        )
        for _ in range(10):
            outs = both(*map(inputs_of, TOKENS[:2]))
            for num_tokens, out in zip(TOKENS[:2], outs, strict=True):
                np.testing.assert_array_equal(bits(out), first_bits(case, num_tokens))


@pytest.mark.parametrize("case", EVERYWHERE)
def test_layers_of_one_routing_in_one_program(case):
    """XLA plans them once and may run them at the same time; a K this long is cut on a GPU."""
    hidden_size = 3584 if ON_A_GPU else 256
    first = on_device(make_inputs(5, hidden_size=hidden_size))
    other = on_device(make_inputs(5, hidden_size=hidden_size, seed=1))
    second = replaced(
        first, gemm1_weights=other.weights.gemm1_weights, gemm2_weights=other.weights.gemm2_weights
    )
    with running(case) as backend:
        apply = functools.partial(jax_moe.apply, config=SMALL, backend=backend)
        expected = [bits(jax.jit(apply)(*inputs.arguments)) for inputs in (first, second)]
        both = jax.jit(lambda a, b: (apply(*a.arguments), apply(*b.arguments)))
        for _ in range(10):
            for out, alone in zip(both(first, second), expected, strict=True):
                np.testing.assert_array_equal(bits(out), alone)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["mosaic", "triton"])
def test_beside_torch_on_other_streams(backend):
    """PyTorch keeps the GPU busy on two streams of its own meanwhile."""
    torch = pytest.importorskip("torch")
    if reason := backends.unsupported_reason(backend):
        pytest.skip(reason)
    expected = {num_tokens: first_bits(backend, num_tokens) for num_tokens in TOKENS}
    matrix = torch.rand(2048, 2048, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    outs = []
    for i in range(12):
        with torch.cuda.stream(streams[i % 2]):
            for _ in range(4):
                torch.mm(matrix, matrix)
        outs.append((TOKENS[i % 3], layer(backend)(*inputs_of(TOKENS[i % 3]).arguments)))
    for num_tokens, out in outs:
        np.testing.assert_array_equal(bits(out), expected[num_tokens])
    torch.cuda.synchronize()


PROCESS = """
    import hashlib, pathlib, sys, tempfile
    import jax
    from tests import h100_target, test_repeatability as here
    from tests.moe_inputs import bits

    backend, num_tokens = sys.argv[1], int(sys.argv[2])
    inputs = here.inputs_of(num_tokens)
    options, graphs = {}, 0
    with tempfile.TemporaryDirectory() as folder, h100_target.no_compilation_cache():
        if jax.default_backend() == "gpu":
            options["xla_dump_to"] = folder
        lowered = jax.jit(here.layer(backend)).lower(*inputs.arguments)
        compiled = lowered.compile(compiler_options=options)
        if options:
            graphs = h100_target.thunks(pathlib.Path(folder))[1]
    # A graph is captured on a later call than the first.
    outs = [compiled(*inputs.arguments) for _ in range(5)]
    found = {hashlib.sha256(bits(out).tobytes()).hexdigest() for out in outs}
    print(graphs, *found)
"""


def on_gpu(backend, graphs):
    """A test of its own group: a process starts and compiles in half a minute."""
    group = pytest.mark.xdist_group(f"repeatability_{backend}")
    name = f"{backend}, {'graphs' if graphs else 'no graphs'}"
    return pytest.param(backend, graphs, marks=[pytest.mark.gpu, group], id=name)


@pytest.mark.parametrize(
    ("case", "graphs"),
    [("xla", True), *[on_gpu(b, graphs) for b in ("mosaic", "triton") for graphs in (True, False)]],
)
def test_another_process(case, graphs):
    """With CUDA graphs and without: same GPU, same configuration, same bits."""
    expected = first_bits(case, TOKENS[0])
    flags = "" if graphs else "--xla_gpu_enable_command_buffer="
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), case, str(TOKENS[0])]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found_graphs, digest = done.stdout.split()
    assert digest == hashlib.sha256(expected.tobytes()).hexdigest()
    if ON_A_GPU:
        assert (int(found_graphs) > 0) == graphs
