"""What the host pays for a call from PyTorch, piece by piece: `python -m interop.host_time`.

The device is idle before each measured call, so that launches do not queue up; small sizes, since
the host's work does not depend on them.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import torch

from interop import TorchMoE, TorchMoEWeights, dlpack, torch_moe

REPEATS = 300


def measure(device: str) -> dict[str, float]:
    """Median host time in microseconds of each piece, on "cpu" or "cuda"."""
    arguments = _arguments(device)
    tensor, where = arguments[2], torch.device(arguments[2].device)
    target = dlpack.jax_device(where)
    handle = TorchMoE(TorchMoEWeights(*arguments[4:8]))
    array = dlpack.to_jax(tensor)
    jax.block_until_ready(array)
    pieces: dict[str, Callable[[], Any]] = {
        "order the streams": lambda: dlpack.order_after_torch(where, target),
        "import one tensor, jax.dlpack": lambda: jax.dlpack.from_dlpack(tensor),
        "import one tensor, to_jax": lambda: dlpack.to_jax(tensor),
        "import one tensor, checked, stream ordered before": lambda: dlpack.import_buffer(
            dlpack.check_importable(tensor, "x"), target, None
        ),
        "export one array, torch.from_dlpack": lambda: torch.from_dlpack(array),
        "export one array, to_torch": lambda: dlpack.to_torch(array),
        "TorchMoE call": lambda: handle(*arguments[:4], *arguments[8:]),
        "torch_moe call": lambda: torch_moe(*arguments),
    }
    return {name: _median(piece, device) for name, piece in pieces.items()}


def _median(piece: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(REPEATS):
        if device == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        result = piece()
        times.append((time.perf_counter() - before) * 1e6)
        del result
    return statistics.median(times)


def _arguments(device: str) -> list[Any]:
    """One token, 64 experts of which 8 are local, H=256, I=128."""
    e4m3 = torch.float8_e4m3fn
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((1, 64), torch.float32),
        ((64,), torch.bfloat16),
        ((1, 256), e4m3),
        ((2, 1), torch.float32),
        ((8, 256, 256), e4m3),
        ((8, 2, 2), torch.float32),
        ((8, 256, 128), e4m3),
        ((8, 2, 1), torch.float32),
    ]
    tensors = [torch.ones(shape, device=device).to(dtype) for shape, dtype in shapes]
    return [*tensors, 8, 2.5]


def main() -> None:
    """Prints a table for the best device there is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"host time on {name}, median of {REPEATS}, us")
    for piece, microseconds in measure(device).items():
        print(f"{microseconds:8.1f}  {piece}")


if __name__ == "__main__":
    main()
