"""Tensors whose memory JAX holds: where it goes, and how a program ends meanwhile."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from interop import TorchMoE, lending, to_jax  # noqa: E402
from jax_moe import ExpertWeights  # noqa: E402
from tests.moe_inputs import handle_arguments  # noqa: E402
from tests.torch_inputs import torch_inputs  # noqa: E402

RUNS = 30

# The weights are large, so XLA gives them back some time after the result is there.
SHORT_PROGRAM = """
    import gc
    import torch
    import interop

    E_local, H, I = 8, 7168, 2048
    e4m3 = lambda *shape: torch.zeros(*shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    arguments = [
        torch.randn(1, 256), torch.zeros(256, dtype=torch.bfloat16),
        e4m3(1, H), torch.ones(H // 128, 1),
        e4m3(E_local, 2 * I, H), torch.ones(E_local, 2 * I // 128, H // 128),
        e4m3(E_local, H, I), torch.ones(E_local, H // 128, I // 128),
    ]
    out = interop.torch_moe(*arguments, 0, 2.5, backend="xla")
    print(tuple(out.shape))
    del out, arguments
    gc.collect()
"""


@pytest.fixture
def busy_core() -> Iterator[None]:
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        spinning.kill()
        spinning.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("busy_core")
def test_short_programs_end_with_code_0():
    """Without `interop.lending` 4 of 6 such runs ended with 134 on a busy machine."""
    command = [sys.executable, "-c", textwrap.dedent(SHORT_PROGRAM)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for run in range(RUNS):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        ended = done.returncode, done.stdout
        assert ended == (0, "(1, 7168)\n"), f"run {run} of {RUNS}: {ended} {done.stderr[-2000:]}"


def lent() -> list[torch.Tensor]:
    return [alias for reference in lending._lent if (alias := reference()) is not None]


def addresses() -> set[int]:
    return {alias.data_ptr() for alias in lent()}


def test_what_is_imported_is_lent_until_it_comes_back():
    tensor = torch.ones(1 << 16)
    array = to_jax(tensor)
    assert tensor.data_ptr() in addresses()
    assert float(array.sum()) == 1 << 16
    del array
    gc.collect()
    deadline = time.monotonic() + lending._LAST_WAIT_S  # JAX's own thread gives it back
    while tensor.data_ptr() in addresses() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert tensor.data_ptr() not in addresses()


def test_what_came_back_is_forgotten(monkeypatch):
    monkeypatch.setattr(lending, "_look_through_at", 0)
    kept = [to_jax(torch.ones(64)) for _ in range(8)]
    for _ in range(2000):
        to_jax(torch.ones(64))
    assert len(lending._lent) <= 3 * lending._LOOKED_THROUGH
    assert {array.unsafe_buffer_pointer() for array in kept} <= addresses()


def test_at_exit_no_reference_of_jax_is_the_last(monkeypatch):
    """What is kept is never given back, so torch needs no GIL when JAX drops its reference."""
    monkeypatch.setattr(lending, "_LAST_WAIT_S", 0.0)
    tensor = torch.full((64,), 3.0)
    address, array = tensor.data_ptr(), to_jax(tensor)
    lending.keep_what_is_lent()
    del tensor, array
    gc.collect()
    (alias,) = (alias for alias in lent() if alias.data_ptr() == address)
    assert alias.tolist() == [3.0] * 64
    assert sys.getrefcount(alias) == 3  # torch's, the name's, the argument's


def test_the_last_look_waits_for_threads_that_came_before(monkeypatch):
    """References that others still hold are those of threads that wait for the GIL."""
    waited = []
    array = to_jax(torch.ones(64))
    (held,) = (a for a in lent() if a.data_ptr() == array.unsafe_buffer_pointer())

    def sleep(seconds: float) -> None:
        nonlocal held
        waited.append(seconds)
        held = None

    monkeypatch.setattr(lending.time, "sleep", sleep)
    lending.keep_what_is_lent()
    assert waited
    assert held is None
    assert float(array[0]) == 1.0


def share_all(weights: ExpertWeights) -> None:
    module = torch.nn.Module()
    for name, weight in weights._asdict().items():
        module.register_buffer(name, weight)
    module.share_memory()


def send(weights: ExpertWeights) -> None:
    torch.multiprocessing.get_context("spawn").SimpleQueue().put(weights.gemm2_weights)


MOVES = {
    "share_memory": (share_all, "gemm1_weights"),
    "queue": (send, "gemm2_weights"),
    "freed": (lambda w: w.gemm1_weights.untyped_storage().resize_(0), "gemm1_weights"),
    "grown": (lambda w: w.gemm2_weights_scale.resize_(10**6), "gemm2_weights_scale"),
}


@pytest.mark.parametrize(("move", "name"), MOVES.values(), ids=MOVES)
def test_a_handle_notices_that_memory_of_its_weights_moved(move, name):
    """In its kernels it would read memory that is not there, or that of others."""
    inputs = torch_inputs(2)
    x, arguments = inputs.hidden_states, handle_arguments(inputs)
    weights = ExpertWeights(*(tensor.clone() for tensor in inputs.weights))
    handle = TorchMoE(weights)
    handle(*arguments)
    move(weights)
    said = rf"^{name}: expected its memory where it was .* Make the TorchMoE again$"
    with pytest.raises(RuntimeError, match=said):
        handle(*arguments)
    ids = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=said):
        handle.routed(x, inputs.hidden_states_scale, ids, torch.ones(2, 1), 8, num_experts=64)


def test_a_handle_made_again_of_shared_memory():
    inputs = torch_inputs(2)
    weights = ExpertWeights(*(tensor.clone() for tensor in inputs.weights))
    before = TorchMoE(weights)(*handle_arguments(inputs))
    share_all(weights)
    handle = TorchMoE(weights)
    share_all(weights)  # is shared already, and stays where it is
    assert torch.equal(handle(*handle_arguments(inputs)), before)
