"""The stages as Pallas Mosaic GPU kernels: a kernel per file, the matmuls' machinery in `hopper`.

The stages in the order in which the data flows: `routing`, `group_quant`, `plan`, `permute`,
`hopper.up_projection`, `hopper.down_projection`, `unpermute`. Of few tokens `routing_and_rows` does
the work of the first two in one launch.
"""
