"""Tests of jax-moe; a package so that `python -m tests.<tool>` works from the repository root."""
