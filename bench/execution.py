"""Binds a solution to its inputs in its fastest honest form: `jax.jit`, or a CUDA graph."""

from collections.abc import Callable
from typing import Any

import jax

from bench.timers import Execution, no_wait
from interop.solutions.base import Arguments, Solution


def bind(solution: Solution, arguments: Arguments) -> Execution:
    """Prepares a solution to be called on these arguments, and runs it at least once.

    Args:
        solution: What to run.
        arguments: JAX arrays; a PyTorch solution gets DLPack views of them.

    Returns:
        The bound calls. A JAX solution is jitted with all ten arguments as parameters (on a GPU XLA
        makes it one CUDA graph where it can). A PyTorch one is captured in a CUDA graph if it says
        that it can be; its output is filled with NaN after the capture, so that only a replay can
        make it right.

    Raises:
        Exception: Whatever the solution raises.
    """
    return (
        _bind_jax(solution, arguments)
        if solution.framework == "jax"
        else _bind_torch(solution, arguments)
    )


def to_jax(solution: Solution, output: Any) -> jax.Array:
    """The output as a JAX array, without a copy."""
    if solution.framework == "jax":
        return output
    from interop import dlpack

    return dlpack.to_jax(output)


def _bind_jax(solution: Solution, arguments: Arguments) -> Execution:
    prepared = solution.prepare(arguments) if solution.prepare else tuple(arguments)
    jax.block_until_ready(prepared)
    jitted = jax.jit(solution.run)
    jax.block_until_ready(jitted(*prepared))
    # Finds the program that the call just compiled.
    analysis = jitted.lower(*prepared).compile().memory_analysis()
    return Execution(
        call=lambda: jitted(*prepared),
        block=jax.block_until_ready,
        how="jit",
        workspace_bytes=getattr(analysis, "temp_size_in_bytes", None),
    )


def _bind_torch(solution: Solution, arguments: Arguments) -> Execution:
    import torch

    from interop import dlpack

    tensors = {
        name: dlpack.to_torch(array) for name, array in list(arguments._asdict().items())[:8]
    }
    views = Arguments(
        **tensors,
        local_expert_offset=int(arguments.local_expert_offset),
        routed_scaling_factor=float(arguments.routed_scaling_factor),
    )
    with torch.no_grad():
        prepared = solution.prepare(views) if solution.prepare else tuple(views)

        @torch.no_grad()
        def run() -> Any:
            return solution.run(*prepared)

        run()
        if not views.hidden_states.is_cuda:
            return Execution(run, no_wait, "eager", None)
        workspace = _torch_workspace(run)
        call, how = _captured(run) if solution.capturable else (run, "eager")
    return Execution(call, lambda _: torch.cuda.synchronize(), how, workspace)


def _torch_workspace(run: Callable[[], Any]) -> int:
    """Peak bytes that one eager call allocates beyond its output."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - output.nbytes


def _captured(run: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # allocations and lazy set-up of the capture's stream happen here
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # JAX's threads may call CUDA meanwhile; only this thread's calls belong to the graph.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            output = run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return run, f"eager (capture failed: {reason})"
    output.fill_(float("nan"))
    torch.cuda.synchronize()

    def replay() -> Any:
        graph.replay()
        return output

    return replay, "CUDA graph"
