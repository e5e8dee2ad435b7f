"""What initcheck sees of a store: buffers written whole, each read by a kernel of its own.

    python -m tests.sanitizer_control control

The first is written by threads, the others by TMA stores, plain ones and, as the down-projection
makes them, of swizzled tiles. All come out right, so a report of a reader is about a store that
this version of the tool does not see.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_moe import backends
from pallas_kernels import interruption
from pallas_kernels.mosaic import launch

READERS = {kind: f"control_reads_{kind}" for kind in ("thread_stores", "tma_stores", "tma_tiles")}
_SHAPE = (64, 128)
_ROW = (1, 128)
_TILE = (64, 64)
_LAYOUT = plgpu.Layout.WG_STRIDED(_SHAPE, 8)
_TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_SCRATCH = {
    "thread_stores": [],
    "tma_stores": [plgpu.SMEM(_SHAPE, jnp.bfloat16)],
    "tma_tiles": [plgpu.SMEM(_TILE, jnp.bfloat16, transforms=_TILED)],
}


def copy_by_threads(source_gmem, out_gmem):
    """Plain loads, plain stores."""
    out_gmem[...] = plgpu.load(source_gmem, layout=_LAYOUT)


def read_a_row(source_gmem, out_gmem):
    """The first row only: few reports, none of which the tool then has to drop."""
    out_gmem[...] = plgpu.load(source_gmem.at[pl.ds(0, 1)], layout=plgpu.Layout.WG_STRIDED(_ROW, 1))


def copy_by_tma(source_gmem, out_gmem, staging):
    """Plain loads, through shared memory, one TMA store."""
    staging[...] = plgpu.load(source_gmem, layout=_LAYOUT)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out_gmem)
    plgpu.wait_smem_to_gmem(0)


def copy_by_tma_tiles(source_gmem, out_gmem, staging):
    """Plain loads, through shared memory, a TMA store for each swizzled tile."""
    for first in range(0, _SHAPE[1], _TILE[1]):
        columns = pl.ds(first, _TILE[1])
        staging[...] = plgpu.load(
            source_gmem.at[:, columns], layout=plgpu.Layout.WGMMA, optimized=False
        )
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, out_gmem.at[:, columns])
        plgpu.wait_smem_to_gmem(0)


_WRITERS = {
    "thread_stores": copy_by_threads,
    "tma_stores": copy_by_tma,
    "tma_tiles": copy_by_tma_tiles,
}


def kernels(kind: str):
    """The kernel that writes in one of the ways, and the one that reads what it wrote."""
    shape = jax.ShapeDtypeStruct(_SHAPE, jnp.bfloat16)
    write = launch.kernel(
        _WRITERS[kind],
        out_type=shape,
        scratch_types=_SCRATCH[kind],
        kernel_name=f"control_writes_{kind}",
    )
    row = jax.ShapeDtypeStruct(_ROW, jnp.bfloat16)
    return write, launch.kernel(read_a_row, out_type=row, kernel_name=READERS[kind])


def run() -> dict[str, float]:
    """Writes and reads every buffer.

    Returns:
        The largest error of each, by the kind of store.

    Raises:
        AssertionError: A result is wrong.
    """
    source = np.arange(np.prod(_SHAPE)).reshape(_SHAPE) % 251
    errors = {}
    for kind in READERS:
        write, read = kernels(kind)
        written = jax.jit(write)(source.astype(jnp.bfloat16))
        for found in (written, jax.jit(read)(written)):
            error = np.abs(np.asarray(found, np.float32) - source[: len(found)]).max()
            errors[kind] = max(errors.get(kind, 0.0), float(error))
    assert not any(errors.values()), errors
    return errors


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what was found as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitizer_control")
    parser.add_argument("name", help="what the JSON calls it")
    name = parser.parse_args(argv).name
    if reason := backends.unsupported_reason("mosaic"):
        parser.error(reason)
    print(json.dumps({"backend": name, "relative_errors": run()}), flush=True)


if __name__ == "__main__":
    interruption.exit_with(main)
