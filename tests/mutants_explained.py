"""Why some of the changes that `make mutants` makes cannot be noticed by any test."""

from __future__ import annotations

EXPLAINED: dict[tuple[str, str], str] = {
    (
        "bench/correctness.py",
        '"matched": jnp.sum(~fails & jnp.isfinite(x)),',
    ): "of booleans the product is the same as the conjunction",
    (
        "bench/correctness.py",
        'relative = error / norm if norm > 0 else (0.0 if error == 0 else float("inf"))',
    ): "a norm is never below zero",
    (
        "interop/dlpack.py",
        "while _in_flight and _in_flight[0][0].query():",
    ): "only a GPU has events to ask; its tests judge no mutants",
    (
        "pallas_kernels/mosaic/plan.py",
        "here = histogram_gmem.at[pl.ds(step * stride + piece * shape[0], shape[0])]",
    ): "`shape` has one element, the first and the last",
    (
        "pallas_kernels/mosaic/plan.py",
        "@pl.loop(0, cdiv(num_tiles, num_blocks * THREADS))",
    ): "more rounds than are needed: nothing is stored past the last tile",
    (
        "pallas_kernels/mosaic/plan.py",
        "live = tile < load_at(tile_ends, passed + (num_local_experts - 1), **how)",
    ): "the place behind the last expert holds the same sum, where there is one",
}
"""By module and the line as it stands in the code, without its indent."""
