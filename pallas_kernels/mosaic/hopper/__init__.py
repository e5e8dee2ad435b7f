"""The block-scaled grouped matmul for Hopper (wgmma, TMA): `up_projection`, `down_projection`."""
