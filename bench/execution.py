"""Binds a solution to its inputs in its fastest honest form: `jax.jit`, or a CUDA graph."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable

from bench.timers import Execution, no_wait
from interop.solutions.base import Solution
from jax_moe import LayerInputs

Binder = Callable[[LayerInputs], Execution]
_CANNOT_BE_LOADED = (ValueError, NotImplementedError, jax.errors.JaxRuntimeError)


class Program(NamedTuple):
    """A compiled JAX program.

    Attributes:
        serialized: For `serialize_executable.deserialize_and_load`; None if it cannot be.
        workspace_bytes: Temporary memory of a call, if XLA says.
        jitted: The function that calls this very program; None if another process compiled it.
    """

    serialized: tuple[Any, ...] | None
    workspace_bytes: int | None
    jitted: Callable[..., jax.Array] | None = None


Programs = dict[Any, Program]
"""What is compiled, by `key_of`."""


def key_of(solution: Solution, arguments: Sequence[Any]) -> Any:
    """What a program is compiled for: the solution, and its arguments' shapes and dtypes."""
    return solution.name, tuple((tuple(one.shape), str(one.dtype)) for one in arguments)


def compiled_program(compiled: Any, jitted: Callable[..., jax.Array] | None = None) -> Program:
    """What to keep of `jax.jit(...).lower(...).compile()`."""
    try:
        serialized = serialize_executable.serialize(compiled)
    except _CANNOT_BE_LOADED:
        serialized = None
    workspace = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
    return Program(serialized, workspace, jitted)


def binder(solution: Solution, *, reload: bool, programs: Programs | None = None) -> Binder:
    """Returns a function that prepares a solution to be called on some arguments, and runs it once.

    It takes JAX arrays and raises whatever the solution raises. A JAX solution is jitted with all
    ten arguments as parameters: on a GPU XLA makes it one CUDA graph where it can. A PyTorch one
    gets DLPack views and is captured in a CUDA graph if it says that it can be; its output is
    filled with NaN after the capture, so that only a replay can make it right.

    Args:
        solution: What to run.
        reload: Load a JAX program anew though it was compiled before: a profiler sees into its CUDA
            graph only if that is built while it is attached.
        programs: Where compiled programs are looked up and kept, for a later pass to load anew.
    """
    if solution.framework != "jax":
        return _torch_binder(solution)
    return _jax_binder(solution, reload, {} if programs is None else programs)


def to_jax(solution: Solution, output: Any) -> jax.Array:
    """The output as a JAX array, without a copy."""
    if solution.framework == "jax":
        return output
    from interop import dlpack

    return dlpack.to_jax(output)


def _jax_binder(solution: Solution, reload: bool, programs: Programs) -> Binder:
    loaded: dict[Any, Callable[..., jax.Array]] = {}

    def bind(inputs: LayerInputs) -> Execution:
        prepared = solution.prepare(inputs) if solution.prepare else inputs.arguments
        jax.block_until_ready(prepared)
        key = key_of(solution, prepared)
        if key not in programs:
            jitted = jax.jit(solution.run)
            programs[key] = compiled_program(jitted.lower(*prepared).compile(), jitted)
        program = programs[key]
        if key not in loaded:
            loaded[key] = load(program, solution.run, reload=reload)
        run = loaded[key]
        jax.block_until_ready(run(*prepared))
        return Execution(
            call=lambda: run(*prepared),
            block=jax.block_until_ready,
            how="jit",
            workspace_bytes=program.workspace_bytes,
        )

    return bind


def load(program: Program, run: Callable[..., Any], *, reload: bool) -> Callable[..., jax.Array]:
    """What calls a compiled program.

    Args:
        program: From `compiled_program`.
        run: What was compiled, to be compiled again where the program cannot be loaded anew.
        reload: Load it anew, though it is there.
    """
    if program.jitted is not None and not reload:
        return program.jitted
    if program.serialized is not None and reload:
        with contextlib.suppress(*_CANNOT_BE_LOADED):
            return serialize_executable.deserialize_and_load(*program.serialized)
    # A new function object is compiled again: some programs cannot be serialized, and host times
    # are those of `jax.jit`.
    return jax.jit(lambda *arguments: run(*arguments))


def _torch_binder(solution: Solution) -> Binder:
    import torch

    from interop import dlpack

    def bind(inputs: LayerInputs) -> Execution:
        views = jax.tree.map(dlpack.to_torch, inputs)._replace(
            local_expert_offset=int(inputs.local_expert_offset),
            routed_scaling_factor=float(inputs.routed_scaling_factor),
        )
        with torch.no_grad():
            prepared = solution.prepare(views) if solution.prepare else views.arguments

            @torch.no_grad()
            def run() -> Any:
                return solution.run(*prepared)

            run()
            if not views.hidden_states.is_cuda:
                return Execution(run, no_wait, "eager", None)
            workspace = _torch_workspace(run)
            call, how = _captured(run) if solution.capturable else (run, "eager")
        return Execution(call, lambda _: torch.cuda.synchronize(), how, workspace)

    return bind


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
