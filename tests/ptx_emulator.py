"""A warp of inline PTX on the CPU, lane by lane: the few instructions that `zero_rows` uses.

Lanes run one after the other up to where they meet (`vote.sync`), all at the same place or an
AssertionError. Loads and stores outside of the arrays of `Memory` are an IndexError.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

LANES = 32
_MASK = {"32": 2**32 - 1, "64": 2**64 - 1}
_COMPARE = {"lt": lambda a, b: a < b, "ge": lambda a, b: a >= b, "gt": lambda a, b: a > b}


class Memory:
    """Global memory: arrays with gaps between them, and what was stored."""

    def __init__(self):
        self._parts: list[tuple[int, np.ndarray]] = []
        self._next = 1 << 33  # addresses that do not fit in 32 bits

    def add(self, array: np.ndarray) -> int:
        """The address of a contiguous array, which stores will write into."""
        assert array.flags.c_contiguous
        start = self._next
        self._parts.append((start, array.reshape(-1).view(np.uint8)))
        self._next += array.nbytes + 4096 - array.nbytes % 4096
        return start

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        """A view of them; misaligned or out of an array is an error."""
        assert address % size == 0
        for start, part in self._parts:
            if start <= address and address + size <= start + len(part):
                return part[address - start :][:size]
        raise IndexError(hex(address))


@dataclasses.dataclass(frozen=True)
class _Step:
    guard: str | None
    negated: bool
    op: str
    arguments: tuple[str, ...]


def _parse(code: str) -> tuple[list[_Step], dict[str, int]]:
    steps: list[_Step] = []
    labels: dict[str, int] = {}
    for statement in code.strip().removeprefix("{").removesuffix("}").split(";"):
        text = statement.strip()
        while label := re.match(r"(\w+):\s*", text):
            labels[label[1]] = len(steps)
            text = text[label.end() :]
        if not text or text.startswith((".reg", ".pragma")):
            continue
        parsed = re.fullmatch(r"(?:@(!?)(\w+) )?([\w.]+) (.*)", text, re.DOTALL)
        assert parsed, text
        arguments = re.findall(r"\{[^}]*\}|[^,{]+", parsed[4])
        names = tuple(argument.strip() for argument in arguments if argument.strip())
        steps.append(_Step(parsed[2], parsed[1] == "!", parsed[3], names))
    return steps, labels


def _lane(
    steps: list[_Step], labels: dict[str, int], operands: dict[str, int], lane: int, memory: Memory
) -> Generator[tuple[int, bool], bool, None]:
    registers: dict[str, Any] = {**operands, "%laneid": lane}

    def value(name: str) -> int:
        if name in registers:
            return registers[name]
        first, *factors = (int(part) for part in name.split("*"))
        for factor in factors:
            first *= factor
        return first

    position = 0
    while position < len(steps):
        step = steps[position]
        position += 1
        if step.guard and bool(registers[step.guard]) == step.negated:
            continue
        name, *kinds = step.op.split(".")
        to, *given = step.arguments
        bits = kinds[-1][1:] if kinds else ""
        if name == "bra":
            position = labels[to]
        elif name == "nanosleep":
            pass
        elif name == "mov":
            registers[to] = value(given[0]) & _MASK[bits]
        elif name in ("add", "sub"):
            sign = 1 if name == "add" else -1
            registers[to] = (value(given[0]) + sign * value(given[1])) & _MASK[bits]
        elif step.op == "mul.wide.u32":
            registers[to] = value(given[0]) * value(given[1])
        elif name == "setp":
            a, b = (value(each) for each in given)
            if kinds[1][0] == "s":  # two's complement
                a, b = ((v + 2**31) % 2**32 - 2**31 for v in (a, b))
            registers[to] = _COMPARE[kinds[0]](a, b)
        elif step.op == "vote.sync.any.pred":
            registers[to] = yield position, bool(registers[given[0]])
        elif name == "ld":
            (word,) = memory.bytes_at(value(given[0].strip("[]")), 4).view(np.uint32)
            registers[to] = int(word)
        elif name == "st":
            words = [value(word.strip()) for word in given[0].strip("{}").split(",")]
            place = memory.bytes_at(value(to.strip("[]")), 4 * len(words))
            place.view(np.uint32)[:] = words
        else:
            raise NotImplementedError(step.op)


def run_warp(code: str, operands: Sequence[int], memory: Memory) -> None:
    """Runs the code to its end.

    Args:
        code: PTX in braces; `$0`, `$1` ... stand for the operands.
        operands: Their values, the same for all lanes.
        memory: What it loads from and stores to.
    """
    steps, labels = _parse(code)
    given = {f"${i}": int(operand) for i, operand in enumerate(operands)}
    lanes = [_lane(steps, labels, given, lane, memory) for lane in range(LANES)]
    meetings = [next(lane, None) for lane in lanes]
    while any(meetings):
        assert len({meeting and meeting[0] for meeting in meetings}) == 1, "not all lanes meet"
        decided = any(meeting[1] for meeting in meetings if meeting)
        meetings = [_on(lane, decided) for lane in lanes]


def _on(lane: Generator[tuple[int, bool], bool, None], decided: bool) -> tuple[int, bool] | None:
    try:
        return lane.send(decided)
    except StopIteration:
        return None
