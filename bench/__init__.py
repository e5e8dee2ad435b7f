"""The benchmark: inputs, checks, clocks, roofline, runner and reports behind `bench_main.py`."""

from interop import interruption

interruption.quiet_while_importing(__name__)
