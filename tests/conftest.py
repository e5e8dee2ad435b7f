"""Environment of the test process; what is skipped without a GPU, and on another JAX."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from bench.environment import has_gpu_driver
from tests import h100_target

# JAX reads these at import, so they are set before any test module is loaded.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's would spin against the other workers
os.environ.setdefault("NPROC", "16")  # threads for the Mosaic GPU interpreter
os.environ.setdefault("JAX_MOE_TUNING", "off")  # test what is shipped, not what this user measured
if not has_gpu_driver():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with contextlib.suppress(FileNotFoundError):  # no CUDA wheels here
        h100_target.prepare_environment()


OF_KERNELS = {
    "test_kernels_interpreted",
    "test_kernels_lowering",
    "test_ladder",
    "test_many_experts",
    "test_mosaic_aot",
    "test_parallel_aot",
    "test_parallel_kernels",
    "test_zero_rows",
}
"""Files that call the Mosaic kernels without asking the backend whether they run on this JAX."""


def refusals() -> list[str]:
    """What the errors say of tests that cannot run on this JAX; none on the one developed with."""
    import jax

    if jax.__version__ == h100_target.JAX:
        return []
    from jax_moe.backends import mosaic
    from pallas_kernels.mosaic import hopper

    reason = mosaic.unsupported_reason("gpu", hopper.COMPUTE_CAPABILITY)
    return [h100_target.ONLY_THIS_JAX, *([reason] if reason else [])]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skips tests that fail because this JAX is another one, by the reason that they meet."""
    try:
        return (yield)
    except Exception as error:
        for reason in refusals():
            if reason in str(error):
                pytest.skip(reason)
        raise


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests on a machine without a GPU, and kernels that this JAX does not lower."""
    if len(found := refusals()) > 1:
        for item in items:
            if item.path.stem in OF_KERNELS:
                item.add_marker(pytest.mark.skip(reason=found[-1]))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import jax

    if jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
