"""A call that cannot fit is refused before it is launched, with the numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import jax
import pytest

import jax_moe
from jax_moe import entry, memory
from tests.moe_inputs import SMALL, array_arguments, make_inputs, on_device

GIB = 2**30


class Gpu:
    """A device with the statistics of JAX's GPU allocator."""

    local_hardware_id = 0

    def __init__(self, **stats: int) -> None:
        self.stats = stats

    def __str__(self) -> str:
        return "cuda:0"

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats or None


def growing(limit: int, used: int, pool: int | None = None) -> dict[str, int]:
    """Statistics in GiB."""
    found = {"bytes_limit": limit * GIB, "bytes_in_use": used * GIB}
    return found if pool is None else found | {"pool_bytes": pool * GIB}


@pytest.mark.parametrize(
    ("stats", "free", "expected"),
    [
        ({}, 70, None),  # a CPU
        (growing(60, used=20), 70, 40),
        (growing(60, used=20, pool=60), 0, 40),  # all preallocated
        (growing(60, used=5, pool=8), 70, 55),  # the pool can grow up to its limit,
        (growing(60, used=5, pool=8), 1, 4),  # and only into what another framework leaves
        (growing(60, used=5, pool=8), None, 55),
    ],
)
def test_what_is_available(monkeypatch, stats, free, expected):
    monkeypatch.setattr(memory, "free_bytes", lambda device: None if free is None else free * GIB)
    found = memory.available_bytes(Gpu(**stats))
    assert found == (None if expected is None else expected * GIB)


def test_the_message_has_both_numbers():
    small = Gpu(bytes_limit=GIB, bytes_in_use=GIB // 2)
    said = "stage: needs up to 805,306,368 bytes of memory on cuda:0, got 536,870,912 available"
    with pytest.raises(MemoryError, match=said):
        memory.require(small, 3 * GIB // 4, "stage")
    memory.require(small, GIB // 2, "stage")
    memory.require(Gpu(), 2**60, "stage")  # a CPU does not tell
    memory.require(Gpu(bytes_limit=0, bytes_in_use=0), memory.LEAST_ASKED - 1, "stage")


def test_a_call_is_refused_before_anything_is_allocated(monkeypatch):
    inputs = on_device(make_inputs(200, hidden_size=512))
    monkeypatch.setattr(memory, "LEAST_ASKED", 0)
    monkeypatch.setattr(
        entry, "jax_device_of", lambda arrays: Gpu(bytes_limit=1000, bytes_in_use=500)
    )
    monkeypatch.setattr(entry, "_pad_tokens", lambda *_: pytest.fail("padded"))
    monkeypatch.setattr(entry, "_jitted", lambda *_, **__: pytest.fail("launched"))
    before = len(jax.live_arrays())
    with pytest.raises(MemoryError, match=r"apply: needs up to [\d,]+ bytes .* 500 available"):
        jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla")
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("num_tokens", [200, 256])
def test_the_bytes_cover_workspace_copies_and_result(monkeypatch, num_tokens):
    asked = []
    monkeypatch.setattr(memory, "require", lambda device, needed, what: asked.append(needed))
    for inputs in (make_inputs(num_tokens), on_device(make_inputs(num_tokens))):
        jax_moe.apply(*inputs.arguments, config=SMALL, backend="xla")
    workspace = jax_moe.workspace_bytes(
        256, num_local_experts=8, hidden_size=256, intermediate_size=128, config=SMALL,
        backend="xla",
    )  # fmt: skip
    result = 2 * 256 * 256
    copies = 0 if num_tokens == 256 else 256 * (4 * 32 + 256 + 4 * 2) + 2 * num_tokens * 256
    on_host = sum(value.nbytes for value in array_arguments(make_inputs(num_tokens)))
    assert asked == [workspace + result + copies + on_host, workspace + result + copies]


def test_a_traced_call_does_not_ask(monkeypatch):
    monkeypatch.setattr(memory, "require", lambda *_: pytest.fail("asked"))
    inputs = on_device(make_inputs(3))
    jax.jit(lambda *a: jax_moe.apply(*a, config=SMALL, backend="xla")).lower(*inputs.arguments)


SMALL_AND_LARGE_CALL = """
    import jax, jax.numpy as jnp, numpy as np
    import jax_moe
    from jax_moe import memory
    from tests.moe_inputs import SMALL, make_inputs, on_device

    inputs = on_device(make_inputs(8, hidden_size=7168))
    many = 100_000
    large = inputs._replace(
        routing_logits=jnp.zeros((many, 32)),
        hidden_states=jnp.zeros((many, 7168), jnp.float8_e4m3fn),
        hidden_states_scale=jnp.ones((56, many)),
    )
    jax.block_until_ready(large)

    def large_call_is_refused():
        try:
            jax_moe.apply(*large.arguments, config=SMALL)
        except MemoryError as error:
            print(error)
        else:
            raise SystemExit("no error")
"""

ON_A_SMALL_GPU = """
    device = jax.devices()[0]
    small = jax.block_until_ready(jax_moe.apply(*inputs.arguments, config=SMALL))
    used = device.memory_stats()["bytes_in_use"]
    large_call_is_refused()
    assert device.memory_stats()["bytes_in_use"] == used
    again = jax_moe.apply(*inputs.arguments, config=SMALL)
    assert (np.asarray(again) == np.asarray(small)).all()
    del large
    assert memory.free_bytes(device) > 0
    free = memory.available_bytes(device)
    taken = jax.block_until_ready(jnp.zeros(2**28, jnp.uint8))
    assert abs(free - memory.available_bytes(device) - 2**28) < 2**27
"""

BESIDE_TORCH = """
    import torch

    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - 2**31, dtype=torch.uint8, device="cuda")
    large_call_is_refused()
    jax.block_until_ready(jax_moe.apply(*inputs.arguments, config=SMALL))
    del held
    torch.cuda.empty_cache()
    jax.block_until_ready(jax_moe.apply(*large.arguments, config=SMALL))
"""


def refusal_of(script: str, **variables: str) -> str:
    """What a process prints that expects one call to be refused."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SMALL_AND_LARGE_CALL + script)],
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.gpu
def test_too_little_memory_on_a_gpu():
    """JAX may take 3 % of the GPU: what fits runs, what does not is refused and leaves no trace."""
    assert "apply: needs up to " in refusal_of(
        ON_A_SMALL_GPU, XLA_PYTHON_CLIENT_MEM_FRACTION="0.03"
    )


@pytest.mark.gpu
@pytest.mark.timing  # it takes the memory of the tests beside it
def test_torch_holds_the_memory_of_the_gpu():
    """The same with JAX at liberty to take all that PyTorch leaves."""
    pytest.importorskip("torch")
    assert "apply: needs up to " in refusal_of(BESIDE_TORCH)
