"""The GPU kernels: `mosaic` (Pallas Mosaic GPU), `triton`, and the `tuning` that both share."""
