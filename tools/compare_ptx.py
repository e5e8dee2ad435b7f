"""Says whether two checkouts compile the same GPU code; needs no GPU.

    python tools/compare_ptx.py ../before . [--tokens 1,80] [--backend triton] [--cache out/ptx]

Compiles `jax_moe.apply` ahead of time for an H100 in each checkout, at DeepSeek-V3's sizes unless
told otherwise, and `jax_moe.quantize`. The kernels' PTX is compared in the order of compilation, so
kernels may be renamed. Source positions, debug sections, comments and the names of entries do not
count. Prints a line per kernel, with the first line that differs, and exits with 1 if one does.

A renaming or a move should leave the code as it was: compare each such commit with the one before.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from pallas_kernels import interruption

QUIET = """
import signal
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
"""
"""Begins a program that this process waits for: of Ctrl-C, which both get, one of them speaks."""

# Runs in the checkout, with its own modules: only what all commits have is named here.
_COMPILE = """
import json, pathlib, sys
from tests import h100_target
h100_target.prepare_environment()
import jax, jax.numpy as jnp
import jax_moe

options, folder = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
e, local, h, i = (options[name] for name in ("experts", "local_experts", "hidden", "intermediate"))
f8, shape = jnp.float8_e4m3fn, jax.ShapeDtypeStruct

def layer(*arrays):
    with jax_moe.assume_device("sm_90"):
        return jax_moe.apply(*arrays, backend=options["backend"])

def quantize(x):
    with jax_moe.assume_device("sm_90"):
        return tuple(jax_moe.quantize(x, backend=options["backend"]))

def specs(t):
    return (
        shape((t, e), jnp.float32), shape((e,), jnp.bfloat16),
        shape((t, h), f8), shape((h // 128, t), jnp.float32),
        shape((local, 2 * i, h), f8), shape((local, 2 * i // 128, h // 128), jnp.float32),
        shape((local, h, i), f8), shape((local, h // 128, i // 128), jnp.float32),
        shape((), jnp.int32), shape((), jnp.float32),
    )

for program in sys.argv[3:]:
    if program == "quantize":
        fn, given = quantize, [shape((901, h), jnp.bfloat16)]
    else:
        fn, given = layer, specs(int(program.removeprefix("T=")))
    (folder / program).mkdir()
    for number, (name, ptx) in enumerate(h100_target.ptx_for_h100(fn, *given).items()):
        (folder / program / f"{number:02}_{name}.ptx").write_text(ptx)
    print(f"  {program} done", file=sys.stderr, flush=True)
"""

_MOST_TOKENS, _MOST_EXPERTS, _LARGEST_SIZE = 2**20, 2**16, 2**20
_IGNORED = re.compile(r"\s*(?:\.file|\.loc)\b")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")


class Kernel(NamedTuple):
    """PTX of a kernel, and which one it is: program, then place and name."""

    label: str
    ptx: str


def instructions(ptx: str) -> list[str]:
    """The lines of a kernel's PTX that count, its entries numbered instead of named."""
    for number, name in enumerate(_ENTRY.findall(ptx)):
        ptx = re.sub(rf"(?<![\w$]){re.escape(name)}(?=_param_|(?![\w$]))", f"entry{number}", ptx)
    lines: list[str] = []
    in_section = False
    for line in ptx.splitlines():
        code = " ".join(line.split("//")[0].split())
        if code.startswith(".section"):
            in_section = True
        if code and not in_section and not _IGNORED.match(code):
            lines.append(code)
        if in_section and code.endswith("}"):
            in_section = False
    return lines


def difference(before: str, after: str) -> str | None:
    """The first line in which two kernels differ, None where they are equal."""
    pairs = itertools.zip_longest(instructions(before), instructions(after), fillvalue="(the end)")
    for number, (old, new) in enumerate(pairs, 1):
        if old != new:
            return f"line {number}: {old!r} became {new!r}"
    return None


def compare(before: Sequence[Kernel], after: Sequence[Kernel]) -> list[tuple[str, str | None]]:
    """A label per kernel and its `difference`, kernels paired in their order."""
    result: list[tuple[str, str | None]] = []
    for old, new in itertools.zip_longest(before, after):
        if old is None or new is None:
            gone = "is new" if old is None else "is gone"
            result.append(((old or new).label, gone))
            continue
        label = old.label if old.label == new.label else f"{old.label} -> {new.label}"
        result.append((label, difference(old.ptx, new.ptx)))
    return result


def compile_checkout(
    checkout: pathlib.Path,
    programs: Sequence[str],
    options: Mapping[str, Any],
    cache: pathlib.Path | None,
) -> dict[str, list[Kernel]]:
    """The kernels of each program: compiled in `checkout` or, of a commit, found in `cache`.

    Args:
      checkout: Its folder.
      programs: "T=..." for the layer of so many tokens, or "quantize".
      options: The backend and the sizes of the layer.
      cache: Where the kernels of commits are kept, or None.

    Raises:
      SystemExit: The checkout does not compile.
    """
    with tempfile.TemporaryDirectory(dir=_made(cache)) as scratch:
        folder = pathlib.Path(scratch)
        if cache is not None and (commit := _commit(checkout)):
            folder = cache / "-".join([commit, *_versions(), *map(str, options.values())])
        missing = [program for program in programs if not (folder / program).is_dir()]
        found = "" if len(missing) == len(programs) else f" (the others are in {folder})"
        print(f"{checkout}: compiles {', '.join(missing) or 'nothing'}{found}", file=sys.stderr)
        if missing:
            _compile(checkout, missing, options, folder, pathlib.Path(scratch, "new"))
        return {program: _read(folder / program) for program in programs}


def _compile(
    checkout: pathlib.Path,
    programs: Sequence[str],
    options: Mapping[str, Any],
    folder: pathlib.Path,
    scratch: pathlib.Path,
) -> None:
    """Writes the kernels of each program into a folder of its own, whole or not at all."""
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", QUIET + _COMPILE, json.dumps(options), str(scratch), *programs],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout), "JAX_MOE_TUNING": "off"},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: does not compile (exit code {done.returncode})")
    folder.mkdir(parents=True, exist_ok=True)
    for program in programs:
        try:
            (scratch / program).rename(folder / program)
        except OSError:
            if not (folder / program).is_dir():
                raise
            # Another run was quicker; its kernels are of the same commit and versions.


def _versions() -> list[str]:
    return [f"{name}{importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]


def _read(folder: pathlib.Path) -> list[Kernel]:
    """The kernels of a program, in the order of their compilation."""
    files = sorted(folder.glob("*.ptx"))
    return [Kernel(f"{folder.name} {path.stem}", path.read_text()) for path in files]


def _made(folder: pathlib.Path | None) -> pathlib.Path | None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _commit(checkout: pathlib.Path) -> str | None:
    """The commit that is checked out; None where files were changed since, or there is no git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return None if git("status", "--porcelain") else git("rev-parse", "HEAD")[:12]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        return None


def checkout_folder(text: str) -> pathlib.Path:
    """The folder that an argument names; an error of argparse where it is no checkout."""
    path = pathlib.Path(text).resolve()
    if not os.path.isdir(path / "pallas_kernels"):  # pathlib's raises on a name that is too long
        raise argparse.ArgumentTypeError(f"expected the folder of a checkout, got {text!r}")
    return path


def _counts(text: str) -> list[int]:
    found = [_number(part, _MOST_TOKENS) for part in text.split(",")]
    if not all(found):
        expected = f"expected token counts such as 1,80, each of at most {_MOST_TOKENS}"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    return found


def _multiple_of(step: int, least: int, most: int) -> Callable[[str], int]:
    """The type of an argument that is a multiple of `step`."""

    def checked(text: str) -> int:
        found = _number(text, most)
        if found < least or found % step:
            wanted = "an integer" if step == 1 else f"a multiple of {step}"
            raise argparse.ArgumentTypeError(
                f"expected {wanted} from {least} to {most}, got {text!r}"
            )
        return found

    return checked


def _number(text: str, most: int) -> int:
    """An integer of 1 to `most`; 0 where the text is none."""
    digits = text if text.isdecimal() and len(text) <= len(str(most)) else "0"
    return int(digits) if int(digits) <= most else 0


def _cache_folder(text: str) -> pathlib.Path:
    if not text:  # pathlib's current directory, which nobody means by it
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    try:
        folder = pathlib.Path(text).expanduser().resolve()
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"expected a path, got {text!r}: that user has no home"
        ) from None
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}")
    return folder


def main(argv: list[str] | None = None) -> int:
    """Command line: compares two checkouts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=checkout_folder, help="folder of a checkout")
    parser.add_argument("after", type=checkout_folder, help="folder of another one")
    parser.add_argument("--tokens", type=_counts, default="1,80,1000,14107", help="values of T")
    parser.add_argument("--backend", default="mosaic", choices=("mosaic", "triton"))
    # DeepSeek-V3's router takes 8 experts from 4 of 8 groups.
    experts = _multiple_of(8, 16, _MOST_EXPERTS)
    parser.add_argument("--experts", type=experts, default=256, help="E")
    parser.add_argument(
        "--local-experts", type=_multiple_of(1, 1, _MOST_EXPERTS), default=32, help="E_local"
    )
    size = _multiple_of(128, 128, _LARGEST_SIZE)
    parser.add_argument("--hidden", type=size, default=7168, help="H")
    parser.add_argument("--intermediate", type=size, default=2048, help="I")
    parser.add_argument("--cache", type=_cache_folder, help="keeps the PTX of commits here")
    args = parser.parse_args(argv)
    if args.local_experts > args.experts:
        parser.error(
            f"--local-experts: expected at most the {args.experts} experts, "
            f"got {args.local_experts}"
        )
    names = ("backend", "experts", "local_experts", "hidden", "intermediate")
    options = {name: getattr(args, name) for name in names}
    programs = [*(f"T={tokens}" for tokens in args.tokens), "quantize"]
    try:
        if cache := _made(args.cache):
            tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        parser.error(f"--cache: {error}")
    try:
        _versions()
    except importlib.metadata.PackageNotFoundError as error:
        parser.error(f"needs {error.name}: activate its environment (see BUILD.md)")
    before, after = (
        compile_checkout(checkout, programs, options, cache)
        for checkout in (args.before, args.after)
    )
    differ = 0
    for program in programs:
        for label, what in compare(before[program], after[program]):
            print(f"{label}: {'equal' if what is None else what}")
            differ += what is not None
    print(f"{differ} kernels differ" if differ else "all kernels are equal")
    return 1 if differ else 0


if __name__ == "__main__":
    interruption.exit_with(main)
