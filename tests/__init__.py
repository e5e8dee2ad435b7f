"""Tests of jax-moe; a package so that `python -m tests.<tool>` works from the repository root."""

from pallas_kernels import interruption

interruption.before_imports(__name__)
