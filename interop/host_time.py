"""What the host pays for a call, piece by piece: `python -m interop.host_time [--full_size]`.

The device is idle before each measured call, so that launches do not queue up. The host's work
does not depend on the sizes; when a result is complete does, so `--full_size` takes the
definition's, with one token.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jax_moe
from interop import TorchMoE, TorchMoEWeights, dlpack, torch_moe

REPEATS = 300


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


def measure(device: str, sizes: Sizes = SMALL) -> dict[str, Cost]:
    """Costs of each piece with one token, on "cpu" or "cuda"."""
    arguments = _arguments(device, sizes)
    pieces = _bridge_pieces(arguments[2]) | _torch_calls(arguments) | _jax_calls(arguments)
    return {name: _median(piece, device) for name, piece in pieces.items()}


def _bridge_pieces(tensor: torch.Tensor) -> dict[str, Callable[[], Any]]:
    bridge = dlpack.bridge_of(tensor, "tensor")
    array = dlpack.to_jax(tensor)
    return {
        "order the streams": lambda: bridge.order_after_torch(bridge.current_stream()),
        "import one tensor, jax.dlpack": lambda: jax.dlpack.from_dlpack(tensor),
        "import one tensor, to_jax": lambda: dlpack.to_jax(tensor),
        "export one array, torch.from_dlpack": lambda: torch.from_dlpack(array),
        "export one array, to_torch": lambda: dlpack.to_torch(array),
    }


def _torch_calls(arguments: list[Any]) -> dict[str, Callable[[], Any]]:
    handle = TorchMoE(TorchMoEWeights(*arguments[4:8]))
    result = torch_moe(*arguments)
    changing = [*arguments[:4], *arguments[8:]]
    return {
        "TorchMoE": lambda: handle(*changing),
        "TorchMoE, out=": lambda: handle(*changing, out=result),
        "TorchMoE, num_tokens=": lambda: handle(*changing, num_tokens=1),
        "torch_moe": lambda: torch_moe(*arguments),
    }


def _jax_calls(arguments: list[Any]) -> dict[str, Callable[[], Any]]:
    """`jax_moe.apply`: what its two numbers may be, and how to wait for the result."""
    arrays = [dlpack.to_jax(tensor) for tensor in arguments[:8]]
    (where,) = arrays[0].devices()
    backend = "xla" if where.platform == "cpu" else "auto"
    apply = functools.partial(jax_moe.apply, backend=backend)
    numbers = arguments[8:]
    on_device = jax.device_put([np.int32(numbers[0]), np.float32(numbers[1])], where)
    on_host = [np.int32(numbers[0]), np.float32(numbers[1])]
    jitted, closed = jax.jit(apply), jax.jit(lambda *eight: apply(*eight, *numbers))
    dispatch = jax.jit(lambda *ten: ten[2].astype(jnp.bfloat16))
    kept = [jitted(*arrays, *on_device)]

    def keep_last() -> jax.Array:
        kept[0] = jitted(*arrays, *on_device)
        return kept[0]

    return {
        "jit of ten arrays, one small kernel": lambda: dispatch(*arrays, *on_device),
        "jit(apply), numbers on the device": lambda: jitted(*arrays, *on_device),
        "jit(apply), numbers closed over": lambda: closed(*arrays),
        "jit(apply), NumPy numbers": lambda: jitted(*arrays, *on_host),
        "jit(apply), Python numbers": lambda: jitted(*arrays, *numbers),
        "jit(apply), the last result alive": keep_last,
        "jit(apply), then poll is_ready": lambda: _poll(jitted(*arrays, *on_device)),
        "jit(apply), then wait through torch": lambda: _wait_in_torch(jitted(*arrays, *on_device)),
        "apply, eager": lambda: apply(*arrays, *numbers),
    }


def _poll(array: Any) -> jax.Array:
    while not array.is_ready():
        pass
    return array


def _wait_in_torch(array: jax.Array) -> torch.Tensor:
    tensor = dlpack.to_torch(array)
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor


def _median(piece: Callable[[], Any], device: str) -> Cost:
    """Of calls on an idle device, the first ones left out."""
    host, complete = [], []
    for _ in range(REPEATS + REPEATS // 10):
        if device == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        result = piece()
        returned = time.perf_counter()
        if isinstance(result, jax.Array):
            result.block_until_ready()
        elif device == "cuda":
            torch.cuda.synchronize()
        complete.append((time.perf_counter() - before) * 1e6)
        host.append((returned - before) * 1e6)
        del result
    return Cost(statistics.median(host[-REPEATS:]), statistics.median(complete[-REPEATS:]))


def _arguments(device: str, sizes: Sizes) -> list[Any]:
    """The ten arguments for one token."""
    e4m3 = torch.float8_e4m3fn
    E, E_local, H, I = sizes  # noqa: E741
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((1, E), torch.float32),
        ((E,), torch.bfloat16),
        ((1, H), e4m3),
        ((H // 128, 1), torch.float32),
        ((E_local, 2 * I, H), e4m3),
        ((E_local, 2 * I // 128, H // 128), torch.float32),
        ((E_local, H, I), e4m3),
        ((E_local, H // 128, I // 128), torch.float32),
    ]
    # 0x38 is 1 in e4m3; a tensor of floats would be four times the weights.
    tensors = [
        torch.full(shape, 0x38, dtype=torch.uint8, device=device).view(e4m3)
        if dtype == e4m3
        else torch.ones(shape, dtype=dtype, device=device)
        for shape, dtype in shapes
    ]
    return [*tensors, E_local, 2.5]


def main(argv: list[str]) -> None:
    """Prints a table for the best device there is."""
    parser = argparse.ArgumentParser(prog="python -m interop.host_time", description=__doc__)
    parser.add_argument("--full_size", action="store_true")
    sizes = FULL if parser.parse_args(argv).full_size else SMALL
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, one token, {sizes}, medians of {REPEATS} calls in us")
    print("    host complete")
    for piece, cost in measure(device, sizes).items():
        print(f"{cost.host:8.1f} {cost.complete:8.1f}  {piece}")


if __name__ == "__main__":
    main(sys.argv[1:])
