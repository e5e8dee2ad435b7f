"""flashinfer-bench (PyPI, 0.1.2): a data set folder with our solutions, its run, and a report.

python -m interop.flashinfer_bench list           the definitions that can be exported
python -m interop.flashinfer_bench export DIR     definition, 19 workloads, blobs, solutions
python -m interop.flashinfer_bench run DIR        the benchmark's own command on that folder
python -m interop.flashinfer_bench workspace DIR  each solution's peak temporary memory
python -m interop.flashinfer_bench report DIR     the published document from its traces

`export DIR --definitions=NAME,...` (or `all`) writes a data set per definition, DIR/NAME; the other
commands take one of these, or DIR for all that lie in it.
"""
