"""`steps.jsonl`: the last state of each step of a run, a JSON object per line."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bench import typed
from bench.about import Step
from bench.failures import writing
from jax_moe.io.files import naming, shown, write_atomically
from jax_moe.io.strict_json import check_fields, number, one_line, parse_object

RECORD = "steps.jsonl"
OK = "ok"
NOT_ENDED = "not ended"  # also of a step that an interruption cut off, or never let begin

type Lines = dict[str, dict[str, Any]]


def read(folder: Path) -> Lines:
    """The last line of each step, by name.

    Args:
        folder: Of the run; where it has no record there are no lines.

    Raises:
        ValueError: The record is damaged; names the line.
    """
    path = folder / RECORD
    with naming(path):
        content = path.read_bytes() if path.exists() else b""
    found: Lines = {}
    for place, text in enumerate(content.splitlines(), start=1):
        where = f"{shown(path)}:{place}"
        needed, others = ("step", "state", "seconds"), ("arguments", "written", "said", "commit")
        line = check_fields(parse_object(text, where), needed, others, where)
        number(line["seconds"], 0, 1e9, f"{where}: seconds")
        typed.check(line, Step, where)
        for field in {"step", "state", "written", "said"} & line.keys():
            if line[field] != "":
                one_line(line[field], f"{where}: {field}")
        found.pop(line["step"], None)  # in the order of the last ones
        found[line["step"]] = dict(line)
    return found


def refuse_others(folder: Path, names: Collection[str]) -> None:
    """Raises `ValueError` if a folder has a record of steps that a command does not know."""
    if others := [name for name in read(folder) if name not in names]:
        raise ValueError(
            f"{shown(folder)}: holds steps of another command ({', '.join(others)}); "
            "expected a folder of its own"
        )


def write(folder: Path, lines: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the record, atomically.

    Raises:
        FileError: It cannot be written; what was there before is whole.
    """
    path = folder / RECORD
    with writing(path), write_atomically(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines.values())
