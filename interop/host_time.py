"""What the host pays for a call, piece by piece: `python -m interop.host_time [--full_size]`.

The device is idle before each measured call, so that launches do not queue up. The host's work
does not depend on the sizes; when a result is complete does, so `--full_size` takes the
definition's, with one token. Each way is called 300 times, or as often as fits in 2 s. Without
torch only the calls of JAX are measured.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_moe
from interop import torch_problem
from jax_moe import LayerInputs
from jax_moe.device import no_device
from pallas_kernels import interruption

if TYPE_CHECKING:
    import torch

Call = Callable[[], Any]
REPEATS = 300
MOST_SECONDS = 2.0  # of one piece; a layer of full size takes a CPU much longer


class Sizes(NamedTuple):
    """Experts, local experts, hidden and intermediate size."""

    E: int
    E_local: int
    H: int
    I: int  # noqa: E741


SMALL, FULL = Sizes(64, 8, 256, 128), Sizes(256, 32, 7168, 2048)


class Cost(NamedTuple):
    """Medians in us: until the call returned, and until its result was complete."""

    host: float
    complete: float


def measure(device: str, sizes: Sizes = SMALL) -> Iterator[tuple[str, Cost]]:
    """Costs of each piece with one token, on "cpu" or "cuda"; without torch on JAX's device."""
    if torch_problem() is not None:
        for name, call in _jax_calls(_jax_inputs(sizes)).items():
            yield name, _median(call, lambda: None, jax.block_until_ready)
        return
    import torch

    from interop import dlpack

    def idle() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def wait(result: Any) -> None:
        if isinstance(result, jax.Array):
            result.block_until_ready()
        else:
            idle()

    inputs = _torch_inputs(device, sizes)
    imported = jax.tree.map(
        lambda leaf: dlpack.to_jax(leaf) if isinstance(leaf, torch.Tensor) else leaf, inputs
    )
    pieces = _bridge_pieces(inputs.hidden_states) | _torch_calls(inputs)
    pieces |= _jax_calls(imported) | _waiting_in_torch(imported)
    for name, piece in pieces.items():
        yield name, _median(piece, idle, wait)


def _bridge_pieces(tensor: Any) -> dict[str, Call]:
    import torch

    from interop import dlpack

    bridge = dlpack.bridge_of(tensor, "tensor")
    array = dlpack.to_jax(tensor)
    return {
        "order the streams": lambda: bridge.order_after_torch(bridge.current_stream()),
        "import one tensor, jax.dlpack": lambda: jax.dlpack.from_dlpack(tensor),
        "import one tensor, to_jax": lambda: dlpack.to_jax(tensor),
        "export one array, torch.from_dlpack": lambda: torch.from_dlpack(array),
        "export one array, to_torch": lambda: dlpack.to_torch(array),
    }


def _torch_calls(inputs: LayerInputs) -> dict[str, Call]:
    from interop import TorchMoE, torch_moe

    handle = TorchMoE(inputs.weights)
    result = torch_moe(*inputs.arguments)
    changing = inputs._asdict()
    del changing["weights"]
    return {
        "TorchMoE": lambda: handle(**changing),
        "TorchMoE, out=": lambda: handle(**changing, out=result),
        "TorchMoE, num_tokens=": lambda: handle(**changing, num_tokens=1),
        "torch_moe": lambda: torch_moe(*inputs.arguments),
    }


def _with_numbers(inputs: LayerInputs, put: Callable[[Any], Any]) -> LayerInputs:
    """The inputs with the two numbers as `put` makes them of NumPy's."""
    return inputs._replace(
        local_expert_offset=put(np.int32(inputs.local_expert_offset)),
        routed_scaling_factor=put(np.float32(inputs.routed_scaling_factor)),
    )


def _on_device(inputs: LayerInputs) -> LayerInputs:
    (where,) = inputs.hidden_states.devices()
    return _with_numbers(inputs, functools.partial(jax.device_put, device=where))


def _apply(inputs: LayerInputs) -> Callable[[LayerInputs], jax.Array]:
    (where,) = inputs.hidden_states.devices()
    backend = "xla" if where.platform == "cpu" else "auto"
    return lambda inputs: jax_moe.apply(*inputs.arguments, backend=backend)


def _jax_calls(inputs: LayerInputs) -> dict[str, Call]:
    """`jax_moe.apply`: what its two numbers may be, and how to wait for the result."""
    apply, on_device = _apply(inputs), _on_device(inputs)
    on_host = _with_numbers(inputs, lambda number: number)
    names = ("local_expert_offset", "routed_scaling_factor")
    numbers = {name: getattr(inputs, name) for name in names}
    left_out: dict[str, Any] = dict.fromkeys(names)
    arrays = inputs._replace(**left_out)
    jitted = jax.jit(apply)
    closed = jax.jit(lambda arrays: apply(arrays._replace(**numbers)))
    dispatch = jax.jit(lambda inputs: inputs.hidden_states.astype(jnp.bfloat16))
    kept = [jitted(on_device)]

    def keep_last() -> jax.Array:
        kept[0] = jitted(on_device)
        return kept[0]

    return {
        "jit of ten arrays, one small kernel": lambda: dispatch(on_device),
        "jit(apply), numbers on the device": lambda: jitted(on_device),
        "jit(apply), numbers closed over": lambda: closed(arrays),
        "jit(apply), NumPy numbers": lambda: jitted(on_host),
        "jit(apply), Python numbers": lambda: jitted(inputs),
        "jit(apply), the last result alive": keep_last,
        "jit(apply), then poll is_ready": lambda: _poll(jitted(on_device)),
        "apply, eager": lambda: apply(inputs),
    }


def _poll(array: Any) -> jax.Array:
    while not array.is_ready():
        pass
    return array


def _waiting_in_torch(inputs: LayerInputs) -> dict[str, Call]:
    import torch

    from interop import dlpack

    jitted, on_device = jax.jit(_apply(inputs)), _on_device(inputs)

    def call() -> torch.Tensor:
        tensor = dlpack.to_torch(jitted(on_device))
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        return tensor

    return {"jit(apply), then wait through torch": call}


def _median(piece: Call, idle: Call, wait: Callable[[Any], Any]) -> Cost:
    """Of calls on an idle device, the first ones left out."""
    host: list[float] = []
    complete: list[float] = []
    end = time.perf_counter() + MOST_SECONDS
    while len(host) < REPEATS + REPEATS // 10:
        interruption.check()
        if len(host) > 3 and time.perf_counter() > end:
            break
        idle()
        before = time.perf_counter()
        result = piece()
        returned = time.perf_counter()
        wait(result)
        complete.append((time.perf_counter() - before) * 1e6)
        host.append((returned - before) * 1e6)
        del result
    kept = len(host) * 10 // 11
    return Cost(statistics.median(host[-kept:]), statistics.median(complete[-kept:]))


def _shapes(sizes: Sizes) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of the eight arrays for one token."""
    E, E_local, H, I = sizes  # noqa: E741
    return [
        ((1, E), "float32"),
        ((E,), "bfloat16"),
        ((1, H), "float8_e4m3fn"),
        ((H // 128, 1), "float32"),
        ((E_local, 2 * I, H), "float8_e4m3fn"),
        ((E_local, 2 * I // 128, H // 128), "float32"),
        ((E_local, H, I), "float8_e4m3fn"),
        ((E_local, H // 128, I // 128), "float32"),
    ]


def _jax_inputs(sizes: Sizes) -> LayerInputs:
    arrays = [jnp.ones(shape, dtype) for shape, dtype in _shapes(sizes)]
    arguments: list[Any] = [*arrays, sizes.E_local, 2.5]
    return LayerInputs.of(*arguments)


def _torch_inputs(device: str, sizes: Sizes) -> LayerInputs:
    import torch

    e4m3 = torch.float8_e4m3fn
    # 0x38 is 1 in e4m3; a tensor of floats would be four times the weights.
    tensors = [
        torch.full(shape, 0x38, dtype=torch.uint8, device=device).view(e4m3)
        if dtype == "float8_e4m3fn"
        else torch.ones(shape, dtype=getattr(torch, dtype), device=device)
        for shape, dtype in _shapes(sizes)
    ]
    arguments: list[Any] = [*tensors, sizes.E_local, 2.5]
    return LayerInputs.of(*arguments)


def main(argv: list[str]) -> None:
    """Prints a table for the best device there is."""
    parser = argparse.ArgumentParser(prog="python -m interop.host_time", description=__doc__)
    parser.add_argument(
        "--full_size", action="store_true", help="of DeepSeek-V3 on one of 8 ranks, 1.4 GB"
    )
    sizes = FULL if parser.parse_args(argv).full_size else SMALL
    problem = torch_problem()
    try:
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    except (AssertionError, RuntimeError) as error:
        sys.exit(f"python -m interop.host_time: {no_device(error)}")
    name = jax.devices()[0].device_kind
    if problem is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, one token, {sizes}, medians of up to {REPEATS} calls in us", flush=True)
    if problem is not None:
        print(f"calls of JAX only: {problem}")
    print(f"{'host':>10} {'complete':>10}", flush=True)
    for piece, cost in measure(device, sizes):
        print(f"{cost.host:10.1f} {cost.complete:10.1f}  {piece}", flush=True)


if __name__ == "__main__":
    interruption.exit_with(lambda: main(sys.argv[1:]))
