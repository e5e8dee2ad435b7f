"""The CUDA command line tools on one kernel's PTX: registers, spills, machine instructions."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import subprocess
import sys
import tempfile


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One compiled kernel."""

    name: str
    architecture: str  # as in "sm_90a"
    registers: int
    spill_bytes: int  # spill stores plus spill loads
    smem_bytes: int  # dynamic shared memory that the kernel asks for
    instructions: dict[str, int]  # SASS opcode without its modifiers -> occurrences

    @property
    def fp8_instructions(self) -> int:
        """FP8 matrix instructions: Hopper's QGMMA, Blackwell's UTCQMMA, Ada's QMMA."""
        return sum(self.instructions.get(opcode, 0) for opcode in ("QGMMA", "UTCQMMA", "QMMA"))


def assemble(name: str, ptx: str, smem_bytes: int) -> KernelReport:
    """Runs the `ptxas` on PATH as XLA does, and counts the instructions of what comes out."""
    architecture = find(r"\.target\s+(\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        source.write_text(ptx)
        options = ("-v", "--generate-line-info", f"-arch={architecture}")
        log = _run("ptxas", *options, str(source), "-o", str(binary))
        sass = _run(str(wheel_bin("nvdisasm") / "nvdisasm"), "-ndf", "-c", str(binary))
    address, predicate, opcode = r"^\s*/\*[0-9a-f]{4,}\*/\s+", r"(?:@!?U?P\w+\s+)?", r"([A-Z]\w*)"
    opcodes = re.findall(address + predicate + opcode, sass, re.MULTILINE)
    stores = int(find(r"(\d+) bytes spill stores", log))
    loads = int(find(r"(\d+) bytes spill loads", log))
    return KernelReport(
        name=name,
        architecture=architecture,
        registers=int(find(r"Used (\d+) registers", log)),
        spill_bytes=stores + loads,
        smem_bytes=smem_bytes,
        instructions=dict(collections.Counter(opcodes)),
    )


def ptxas_version() -> str:
    """Version of the `ptxas` on PATH, as in "13.5.37"."""
    return find(r"V(\d+\.\d+\.\d+)", _run("ptxas", "--version"))


def wheel_bin(tool: str) -> pathlib.Path:
    """Folder of a tool (`ptxas`, `nvdisasm`) that a CUDA wheel brought."""
    for entry in sys.path:
        for path in sorted(pathlib.Path(entry or ".").glob(f"nvidia/*/bin/{tool}")):
            return path.parent
    raise FileNotFoundError(f"{tool} not found: install the extras cuda13 and dev")


def find(pattern: str, text: str) -> str:
    """First group of the first match; a `RuntimeError` that shows the text where there is none."""
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"{pattern!r} not found in:\n{text[:2000]}")
    return match[1]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed ({done.returncode}): {done.stderr[-2000:]}")
    return done.stdout + done.stderr
