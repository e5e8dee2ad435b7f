"""A run read back from its JSON file, to write its documents again."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from bench import about, run_folder, typed
from bench.correctness import Tolerance
from bench.documents import Options
from bench.results import SCHEMA, Results, rows_of
from bench.roofline import Roofline
from bench.settings import Settings
from jax_moe.io.files import naming, shown
from jax_moe.io.strict_json import parse_object
from jax_moe.scalars import quoted

_NOT_ABOUT = ("schema", "timer", "roofline", "unavailable", "rows")


class Saved(NamedTuple):
    """What the documents of a run are made from."""

    results: Results
    settings: Settings
    options: Options


def read(folder: Path) -> Saved:
    """Reads the run in a folder.

    Args:
        folder: That of the run, or the file itself.

    Returns:
        Its rows, what it was asked to measure, and what it was asked to write.

    Raises:
        ValueError: There is none, or its file is damaged.
    """
    names = [f"{stem}.json" for stem in run_folder.STEMS]
    with naming(folder):
        is_file = folder.is_file()
        paths = [folder] if is_file else [folder / name for name in names]
        found = [path for path in paths if path.name in names and path.is_file()]
    if len(found) != 1:
        got = "another file" if is_file else "both" if found else "neither"
        raise ValueError(f"{shown(folder)}: expected a folder with {' or '.join(names)}, got {got}")
    (path,) = found
    with naming(path):
        text = path.read_bytes()
    content = parse_object(text, shown(path))
    if content.get("schema") != SCHEMA:
        got = quoted(content.get("schema"))
        raise ValueError(f"{shown(path)}: expected results of schema {SCHEMA}, got {got}")
    try:
        return _saved(path, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{shown(path)}: damaged: {typed.reason(error)}") from None


def _saved(path: Path, content: dict[str, Any]) -> Saved:
    about.check(content)
    if content["timer"] not in ("gpu", "wall"):
        raise ValueError(f"timer: expected gpu or wall, got {quoted(content['timer'])}")
    if content["timer"] != content["settings"].get("timer", content["timer"]):
        raise ValueError(f"timer: expected that of the settings, got {quoted(content['timer'])}")
    roofline = content["roofline"]
    results = Results(
        path=path,
        about={key: value for key, value in content.items() if key not in _NOT_ABOUT},
        timer=content["timer"],
        unavailable=content["unavailable"],
        roofline=typed.record(Roofline, roofline, positive=True) if roofline else None,
        rows={(row.solution, row.uuid): row for row in rows_of(content)},
    )
    if not results.rows:
        raise ValueError("rows: expected at least one, got none")
    results.rows_on_disk = len(results.rows)
    asked = content.get("asked") or _asked(results)
    known = {field.name for field in dataclasses.fields(Settings)}
    fields = {key: value for key, value in content["settings"].items() if key in known}
    fields = {"cool_down": 0.0, "flush": "write"} | fields  # runs from before there was one
    fields |= {
        "solutions": tuple(asked["solutions"]),
        "workloads": tuple(asked["workloads"]),
        "tolerance": typed.record(Tolerance, fields["tolerance"]),
        "output": path.parent,
    }
    settings = typed.record(Settings, fields)
    settings.measured  # noqa: B018  refuses a model that is not known
    return Saved(results, settings, Options(asked["report"], asked["breakdown"]))


def _asked(results: Results) -> dict[str, Any]:
    """What a run was asked for whose file says it in the command line only."""
    words = shlex.split(results.about["command"])
    return {
        "solutions": results.solutions(),
        "workloads": ["all"],
        "report": "--report" in words,
        "breakdown": "--breakdown" in words,
    }
