"""The benchmark: inputs, checks, clocks, roofline, runner and reports behind `bench_main.py`."""
