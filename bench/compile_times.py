"""How long the first jitted call of a shape takes, in a new process and in a second one.

    python -m bench.compile_times [--tokens=1,80,901,14107] [--backend=auto] [--output=FILE.json]

Each shape gets two processes that share an empty folder as JAX's persistent compilation cache. What
is timed is the call alone, from the call to its complete output: tracing, lowering, compiling or
reading from the cache, loading, running. Imports and the drawing of inputs come before it.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import commands, environment
from bench.failures import FileError, writing
from bench.tables import aligned
from interop import folder_lock
from jax_moe import backends
from jax_moe.io.files import shown, write_atomically
from pallas_kernels import interruption

ROOT = Path(__file__).parent.parent
TOKENS = (1, 80, 901, 14107)


def measure(tokens: Sequence[int], backend: str) -> Iterator[dict[str, Any]]:
    """Runs two processes per shape, one after the other.

    Args:
        tokens: Token counts.
        backend: As for `jax_moe.apply`.

    Yields:
        `num_tokens`, and seconds of the `first` call and of that in a `second_process`.

    Raises:
        RuntimeError: A process failed; with its error.
    """
    for num_tokens in tokens:
        with tempfile.TemporaryDirectory() as cache:
            first, second = (_in_a_process(num_tokens, backend, cache) for _ in range(2))
        yield {"num_tokens": num_tokens, "first": first, "second_process": second}


def _in_a_process(num_tokens: int, backend: str, cache: str) -> float:
    command = [sys.executable, "-m", "bench.compile_times", f"--tokens={num_tokens}"]
    command += [f"--backend={backend}", f"--cache={cache}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines() or ["no output"]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        raise RuntimeError(f"T={num_tokens}: {(errors or lines)[-1]}")
    return float(done.stdout.splitlines()[-1])


def first_call_seconds(num_tokens: int, backend: str, cache: str) -> float:
    """Seconds of this process's first jitted call of a shape, with JAX's persistent cache there."""
    import jax

    import jax_moe
    from bench import inputs, routing
    from bench.workloads import FULL, REDUCED
    from interop.workloads import Workload

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    sizes = FULL if environment.default_backend() == "gpu" else REDUCED
    workload = Workload(f"compile-{num_tokens}", num_tokens, 0, blob="")
    routed = routing.draw(workload, sizes, 0)
    weights = inputs.draw_weights("realistic", sizes, 0)
    padded = inputs.make_arguments("realistic", workload, sizes, 0, 0, weights, routed)
    ours = inputs.head(padded, num_tokens)
    call = jax.jit(lambda *ten: jax_moe.apply(*ten, backend=backend))
    start = time.perf_counter()
    jax.block_until_ready(call(*ours.arguments))
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    from bench.workloads import token_counts

    parser = argparse.ArgumentParser(prog="python -m bench.compile_times", description=__doc__)
    parser.add_argument("--tokens", type=token_counts, default=TOKENS, help="1,80,...")
    parser.add_argument("--backend", default="auto", choices=["auto", *backends.NAMES])
    parser.add_argument("--output", type=commands.file, help="JSON file")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace --output from the first row on"
    )
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    tokens = arguments.tokens
    if arguments.cache:
        print(first_call_seconds(tokens[0], arguments.backend, arguments.cache))
        return 0
    backend = arguments.backend
    if backend != "auto" and (reason := backends.unsupported_reason(backend)):
        parser.error(f"--backend={backend}: {reason}")
    if arguments.overwrite and arguments.output is None:
        parser.error("--overwrite: goes with --output=FILE")
    with interruption.remembered(), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_held(arguments.output, arguments.overwrite))
        except ValueError as error:
            parser.error(f"--output: {error}")
        try:
            _report(tokens, backend, arguments.output)
        except KeyboardInterrupt:
            text, code = "interrupted", interruption.acknowledge()
        except (RuntimeError, FileError) as error:
            text, code = str(error), 1
        else:
            return 0
    print(f"compile_times: {text}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _held(output: Path | None, overwrite: bool) -> Iterator[None]:
    """Keeps other runs from the file, and this one from the rows of an earlier run.

    Raises:
        ValueError: Another run is writing it, or an earlier one has and `overwrite` is not set.
    """
    if output is None:
        yield
        return
    with folder_lock.file_held(output):
        if output.exists() and not overwrite:
            raise ValueError(f"{shown(output)} is there; --overwrite replaces it")
        yield


def _about() -> dict[str, Any]:
    from bench.workloads import FULL, REDUCED

    sizes = FULL if environment.default_backend() == "gpu" else REDUCED
    return environment.about(sizes, are_checked=False)


def _report(tokens: Sequence[int], backend: str, output: Path | None) -> None:
    """Measures; rows are kept as they come, and shown whatever ends the measuring."""
    started = environment.now()
    rows: list[dict[str, Any]] = []
    try:
        for row in measure(tokens, backend):
            rows.append(row)
            if output:
                about = _about() | {"started": started, "backend": backend}
                about["complete"] = len(rows) == len(tokens)
                _write(rows, about, output)
    finally:
        cells = [
            [str(r["num_tokens"]), f"{r['first']:.1f}", f"{r['second_process']:.1f}"] for r in rows
        ]
        if cells:
            if note := _about().get("note"):
                print(note)
            table = aligned([["T", "first call s", "second process s"], *cells], left=0)
            print("\n".join(table), flush=True)
    if output:
        print(f"wrote {shown(output)}")


def _write(rows: Sequence[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    with writing(path), write_atomically(path) as file:
        json.dump({**about, "rows": rows}, file, indent=1, default=str)
        file.write("\n")


if __name__ == "__main__":
    environment.prepare_process()
    interruption.exit_with(main)
