"""The block-scaled grouped matmul for Hopper (wgmma, TMA): `up_projection`, `down_projection`."""

COMPUTE_CAPABILITY = "9.0"
"""The only one that these kernels are built for."""
