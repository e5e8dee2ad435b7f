"""Environment of the test process; what is skipped without a GPU, and on another JAX."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import traceback
from collections.abc import Iterator

import pytest

from bench.environment import has_gpu_driver
from tests import h100_target

# JAX reads these at import, so they are set before any test module is loaded.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's would spin against the other workers
os.environ.setdefault("NPROC", "16")  # threads for the Mosaic GPU interpreter
os.environ.setdefault("JAX_MOE_TUNING", "off")  # test what is shipped, not what this user measured
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job that a shell runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is tested
if "," in (gpus := os.environ.get("CUDA_VISIBLE_DEVICES", "")):  # each worker takes one of them
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[worker % (gpus.count(",") + 1)]
if not has_gpu_driver():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # XLA compiles for seconds what then runs for milliseconds; h100_target asks for more.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    with contextlib.suppress(FileNotFoundError):  # no CUDA wheels here
        h100_target.prepare_environment()


# The interpreter of JAX 0.11.1 lacks primitives and kinds of loads that our kernels have.
_INTERPRETS = importlib.metadata.version("jax") != "0.11.1"
if not _INTERPRETS:
    os.environ["JAX_TRACEBACK_FILTERING"] = "off"  # to see where an error comes from


def _comes_from_the_interpreter(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    if any("pallas/mosaic_gpu/interpret" in frame.filename for frame in frames):
        return True
    return "MLIR translation rule for primitive 'layout_cast' not found" in str(error)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skips what another JAX cannot do: interpret, or dump what the harness reads."""
    try:
        return (yield)
    except Exception as error:
        if h100_target.NEEDS_THIS_JAX in str(error):
            pytest.skip(str(error))
        if not _INTERPRETS and _comes_from_the_interpreter(error):
            pytest.skip(
                f"JAX 0.11.1 cannot interpret it: {type(error).__name__} in its interpreter"
            )
        raise


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests on a machine without a GPU."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import jax

    if jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
