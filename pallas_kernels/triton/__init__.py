"""The same stages as Triton kernels: plain `@triton.jit` source for any NVIDIA GPU from sm_89 on.

Each module holds one stage: its kernel and a function that turns the stage's arrays into a
`launch.Launch`. `launch.call` runs that through jax-triton; PyTorch can launch the same object.
"""
