"""The GPU kernels: `mosaic` (Pallas Mosaic GPU), `triton`, and the `tuning` that both share."""

from pallas_kernels import interruption

interruption.before_imports("pallas_kernels", "jax_moe")  # the latter imports this package first
