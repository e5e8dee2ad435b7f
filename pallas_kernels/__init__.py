"""GPU kernels of the FP8 mixture-of-experts layer: one module a stage, no framework around them."""
