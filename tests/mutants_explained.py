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
        'self._on_cpu = device.type == "cpu"',
    ): 'only "cpu" and "cuda" get there, and "cuda" is the greater',
    (
        "jax_moe/scalars.py",
        "if type(value) is not int:  # the usual case, and it is quick",
    ): "a type equals nothing but itself",
    (
        "pallas_kernels/mosaic/plan.py",
        "_MAX_BLOCKS = 64  # the place kernel reads the histogram of all of them",
    ): "how many blocks share the work changes the time on a GPU, not the plan",
    (
        "pallas_kernels/mosaic/plan.py",
        "@pl.loop(0, sizes.width // THREADS)",
    ): "rounds past the last column store nothing; that they read past the end only a GPU shows",
    (
        "pallas_kernels/mosaic/plan.py",
        "stride = max(sizes.columns, shape[0])",
    ): "`shape` has one element, the first and the last",
    (
        "pallas_kernels/mosaic/plan.py",
        "here = histogram_gmem.at[pl.ds(step * stride + piece * shape[0], shape[0])]",
    ): "`shape` has one element, the first and the last",
    (
        "pallas_kernels/mosaic/plan.py",
        "add_at(counts, column + piece * shape[0], total, **how)",
    ): "`shape` has one element; of several pieces every column is below it, so no bits overlap",
    (
        "pallas_kernels/mosaic/plan.py",
        "expert = lax.min(lax.div(slot, jnp.int32(block_m)), jnp.int32(num_local_experts - 1))",
    ): "slots past the last expert store nothing; that they read past the end only a GPU shows",
    (
        "pallas_kernels/mosaic/plan.py",
        "@pl.loop(0, cdiv(num_tiles, num_blocks * THREADS))",
    ): "more rounds than are needed: nothing is stored past the last tile",
    (
        "pallas_kernels/mosaic/plan.py",
        "tile = threads(THREADS) + (step * num_blocks + block) * THREADS",
    ): "threads are below THREADS, a power of two, so no bits overlap",
    (
        "pallas_kernels/mosaic/routing.py",
        "ids = [-to_lanes(chosen, slot, 0) for slot in slots]",
    ): "lanes past top_k store nothing; that they read before the first logit only a GPU shows",
    (
        "pallas_kernels/mosaic/routing.py",
        "if group_size % _WIDTH:",
    ): "the way of groups that share a register is right for all, only longer",
    (
        "pallas_kernels/mosaic/routing.py",
        "later = [(g, group == g) for g in range(slot + 1, slot + n_group - len(groups) + 1)]",
    ): "groups ascend, so none is before its slot, and of that slot itself it has the keys already",
    (
        "pallas_kernels/mosaic/routing.py",
        "key = keys[slot * per_group + r]",
    ): "a second slot takes three groups, which have one or two registers each: no bits overlap",
    (
        "pallas_kernels/mosaic/unpermute.py",
        "_ROWS_AT_ONCE = 8",
    ): "how many rows are loaded together changes registers and time on a GPU, not a sum",
    (
        "pallas_kernels/scores.py",
        "width = 1 << max(x.shape[1] - 1, 0).bit_length()",
    ): "twice the width adds zeros once more, which changes no sum",
}
"""By module and the line as it stands in the code, without its indent."""
