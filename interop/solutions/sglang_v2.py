"""The second published sglang pipeline: SwiGLU on views, quantization kernel, 90 kB workspace."""

from interop.solutions.sglang_steps import NATIVE, ON_VIEWS, SMALL_WORKSPACE, solution

SOLUTION = solution(
    "sglang_v2",
    "sglang's FP8 operators: zero-copy SwiGLU, native quantization kernel",
    ON_VIEWS,
    NATIVE,
    SMALL_WORKSPACE,
)
run = SOLUTION.run
