"""What initcheck sees of a store: two buffers written whole, each read by a kernel of its own.

    python -m tests.sanitizer_control

One is written by the threads, the other by a TMA store. Both come out right, so a report of a
reader is about a store that the tool does not see.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import launch

READERS = {"threads": "control_reads_thread_stores", "tma": "control_reads_tma_stores"}
_SHAPE = (1, 128)


def write_by_threads(source_gmem, out_gmem):
    """Plain loads, plain stores."""
    out_gmem[...] = plgpu.load(source_gmem, layout=plgpu.Layout.WG_STRIDED(_SHAPE, 1))


def write_by_tma(source_gmem, out_gmem, staging):
    """Plain loads, through shared memory, one TMA store."""
    staging[...] = plgpu.load(source_gmem, layout=plgpu.Layout.WG_STRIDED(_SHAPE, 1))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out_gmem)
    plgpu.wait_smem_to_gmem(0)


def run() -> dict[str, float]:
    """Writes and reads both buffers.

    Returns:
        The largest error of each, by the kind of store.

    Raises:
        AssertionError: A result is wrong.
    """
    source = np.arange(np.prod(_SHAPE), dtype=np.float32).reshape(_SHAPE)
    shape = jax.ShapeDtypeStruct(_SHAPE, jnp.float32)
    errors = {}
    for kind, writer in (("threads", write_by_threads), ("tma", write_by_tma)):
        scratch = [] if kind == "threads" else [plgpu.SMEM(_SHAPE, jnp.float32)]
        write = launch.kernel(
            writer, out_type=shape, scratch_types=scratch, kernel_name=f"control_writes_by_{kind}"
        )
        read = launch.kernel(write_by_threads, out_type=shape, kernel_name=READERS[kind])
        written = jax.jit(write)(source)
        errors[kind] = float(np.abs(np.asarray(jax.jit(read)(written)) - source).max())
    assert not any(errors.values()), errors
    return errors


if __name__ == "__main__":
    print(json.dumps({"backend": "control", "relative_errors": run()}), flush=True)
