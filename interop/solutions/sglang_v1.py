"""The first published sglang pipeline: swap by copy, composed quantization, 1 GiB workspace.

And the same with one step each from the second, to tell what each of them brings.
"""

from interop.solutions.sglang_steps import (
    COMPOSED,
    LARGE_WORKSPACE,
    NATIVE,
    ON_VIEWS,
    SMALL_WORKSPACE,
    SWAP_BY_COPY,
    solution,
)

SOLUTION = solution(
    "sglang_v1",
    "sglang's FP8 operators, unfused: swap copy, PyTorch quantization",
    SWAP_BY_COPY,
    COMPOSED,
    LARGE_WORKSPACE,
)
VARIANTS = (
    solution(
        "sglang_v1_native_quant",
        "sglang_v1 with sglang_v2's quantization kernel",
        SWAP_BY_COPY,
        NATIVE,
        LARGE_WORKSPACE,
    ),
    solution(
        "sglang_v1_zero_copy_swiglu",
        "sglang_v1 with sglang_v2's SwiGLU on views",
        ON_VIEWS,
        COMPOSED,
        LARGE_WORKSPACE,
    ),
    solution(
        "sglang_v1_small_workspace",
        "sglang_v1 with sglang_v2's workspace of 90 kB",
        SWAP_BY_COPY,
        COMPOSED,
        SMALL_WORKSPACE,
    ),
)
run = SOLUTION.run
