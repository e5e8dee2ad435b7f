"""The benchmark: inputs, checks, clocks, roofline, runner and reports behind `bench_main.py`."""

from pallas_kernels import interruption

interruption.before_imports(__name__, "tools")  # of which some import this package first
