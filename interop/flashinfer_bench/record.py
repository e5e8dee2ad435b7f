"""`run.json`: how a folder's traces were measured. All of them were measured the same way."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax_moe.io.files import confined_file, confined_files, read_object, shown, write_atomically
from jax_moe.io.strict_json import check_fields, number, one_line

RECORD = "run.json"
_MAX_SETTING = 1e9


class Settings(NamedTuple):
    """The benchmark's numbers; the defaults are those of the published comparison."""

    warmup_runs: int = 10
    iterations: int = 100
    num_trials: int = 5
    rtol: float = 0.2
    atol: float = 0.1
    required_matched_ratio: float = 0.85
    timeout: int = 600


PUBLISHED = Settings()


def read(root: Path) -> Mapping[str, Any]:
    """Reads the record.

    Args:
        root: The data set, resolved.

    Returns:
        `command`, `settings` and `versions`; empty if there is no record.

    Raises:
        ValueError: It is malformed or leads out of the folder.
    """
    path = root / RECORD
    if not path.exists(follow_symlinks=False):
        return {}
    return _checked(read_object(root, path), shown(path))


def has_traces(root: Path) -> bool:
    """Whether the data set, resolved, holds a trace."""
    found = confined_files(root, "traces", "*.jsonl")
    return any(confined_file(root, path).stat().st_size for path in found)


def keep(root: Path, record: Mapping[str, Any]) -> None:
    """Writes the record of a run that is about to start.

    Args:
        root: The data set, resolved.
        record: `command`, `settings` and `versions`.

    Raises:
        ValueError: The record is malformed, or the folder holds traces of another one.
    """
    now = _flat(_checked(record, "this run"))
    path = root / RECORD
    # A record without traces is of a run that failed: it speaks for nothing.
    if has_traces(root):
        before = read(root)
        if not before:
            raise ValueError(
                f"{shown(path)}: missing, but the folder holds traces: their settings are unknown; "
                "use a folder without traces"
            )
        _refuse_difference(_flat(before), now, shown(path))
    with write_atomically(path) as file:
        file.write(json.dumps(record, indent=1) + "\n")


def _refuse_difference(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{where}: {name}: the folder's traces have {before.get(name)!r}, this run has "
                f"{now.get(name)!r}; repeat the former or use a folder without traces"
            )


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """One entry a number or text; the command last, as it differs wherever a setting does."""
    parts = ("settings", "versions")
    found = {f"{part}: {name}": value for part in parts for name, value in record[part].items()}
    return {**found, "command": record["command"]}


def _checked(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    check_fields(record, ("command", "settings", "versions"), (), where)
    one_line(record["command"], f"{where}: command")
    check_fields(record["settings"], Settings._fields, (), f"{where}: settings")
    for name, value in record["settings"].items():
        most = 1 if name == "required_matched_ratio" else _MAX_SETTING
        number(value, 0, most, f"{where}: settings: {name}")
    versions = record["versions"]
    check_fields(versions, (), tuple(versions), f"{where}: versions")
    for name, value in versions.items():
        one_line(name, f"{where}: versions")
        one_line(value, f"{where}: versions: {name}")
    return record
