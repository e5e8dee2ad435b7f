"""The rows of a run, what follows from them, and the JSON file that holds them."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import typed
from bench.correctness import Check
from bench.failures import writing
from bench.roofline import Roofline
from bench.routing import LocalLoad
from bench.sm_clock import Reading
from bench.timers import Statistics
from bench.work import Work
from interop.dataset import MAX_TOKENS
from jax_moe.io.files import write_atomically
from jax_moe.io.strict_json import one_line, parse_object

SCHEMA = 1
PASS, WRONG, ERROR = "PASS", "WRONG", "ERROR"
REFERENCE = "torch_reference"  # the solution that is the denominator of every speedup
CHECKED_ONLY = "mosaic_interpreted"  # the one whose right row has no times


class KernelTime(NamedTuple):
    """Median time a call spends in the kernels of one name, and how many of them it launches."""

    name: str
    us: float
    launches: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One solution on one workload. Times are there only if the row is right.

    Attributes:
        solution: Its name.
        uuid: The workload's.
        num_tokens: T.
        local_expert_offset: The rank's first expert, at the sizes that were measured.
        status: `PASS`, `WRONG` (an output failed the check, or a call takes more memory than its
            solution states) or `ERROR` (the solution raised).
        problem: One line on what is wrong; None if nothing.
        repro: The command line that repeats this row.
        load: What the routing asks of this rank.
        work: Bytes and FLOPs of one call.
        check: Worst over the trials; None if there was no output.
        how: How it was launched: "jit", "CUDA graph", "eager".
        workspace_bytes: Temporary memory of a call.
        workspace_bound: What the solution says it is at most, in bytes; None if it says nothing.
        gpu: GPU time, us.
        wall: Host time, us.
        launches: Launch calls by the host per call; a CUDA graph counts once.
        busy_us: Median time of a call in which some kernel ran.
        kernels: Where the GPU time goes, in order of the first start.
        clock: The SM clock during the calls that `gpu` is of; None where it was not read.
        sustained: Time and clock of calls back to back; None where not asked for.
    """

    solution: str
    uuid: str
    num_tokens: int
    local_expert_offset: int
    status: str
    problem: str | None
    repro: str
    load: LocalLoad
    work: Work
    check: Check | None = None
    how: str = ""
    workspace_bytes: int | None = None
    workspace_bound: int | None = None
    gpu: Statistics | None = None
    wall: Statistics | None = None
    launches: int | None = None
    busy_us: float | None = None
    kernels: tuple[KernelTime, ...] = ()
    clock: Reading | None = None
    sustained: Reading | None = None

    def time(self, timer: str) -> Statistics | None:
        """The times by "gpu" or "wall"."""
        return self.gpu if timer == "gpu" else self.wall

    def is_finished(self, timer: str) -> bool:
        """Whether nothing is left to be measured by "gpu" or "wall": a wrong row gets no times."""
        return bool(self.status != PASS or self.solution == CHECKED_ONLY or self.time(timer))


class Figures(NamedTuple):
    """What follows from a row and the device; None where it cannot be computed.

    Attributes:
        unpromoted_floor_us: The least time at the FP8 rate of `torch._scaled_mm`.
        promoted_floor_us: The least time at that of FP8 matmuls with promotion.
        unpromoted_fraction: Of the time of the run's timer, the unpromoted floor.
        promoted_fraction: The same of the promoted floor.
        tflops: TFLOP/s of the row's work.
        tb_per_s: TB/s of it.
        speedup: Over the reference.
    """

    unpromoted_floor_us: float | None
    promoted_floor_us: float | None
    unpromoted_fraction: float | None = None
    promoted_fraction: float | None = None
    tflops: float | None = None
    tb_per_s: float | None = None
    speedup: float | None = None


def _share(floor_us: float | None, us: float) -> float | None:
    return floor_us / us if floor_us else None


def _nothing() -> None:
    """What a run in an empty folder has to make room for."""


@dataclasses.dataclass
class Results:
    """Everything a run has found so far; each `put` is on disk when it returns.

    Attributes:
        path: The JSON file.
        about: Versions, device, commit, command, settings, GPU state.
        timer: Whose times the figures use.
        unavailable: Solutions that were asked for and cannot run, with the reason.
        roofline: The device's rates; None if not measured.
        rows: By (solution, uuid).
        begin: Called once, before the first write, to make room for this run's files.
        is_written: Whether there was a write.
        rows_on_disk: How many of the rows the file holds.
    """

    path: Path
    about: dict[str, Any]
    timer: str
    unavailable: dict[str, str] = dataclasses.field(default_factory=dict)
    roofline: Roofline | None = None
    rows: dict[tuple[str, str], Row] = dataclasses.field(default_factory=dict)
    begin: Callable[[], None] = _nothing
    is_written: bool = False
    rows_on_disk: int = 0

    def put(self, row: Row) -> None:
        """Adds or replaces a row and writes the file; `FileError` if that fails."""
        self.rows[row.solution, row.uuid] = row
        self.write()

    def figures(self, row: Row) -> Figures:
        """Floors, rates and speedup of a row."""
        floors = row.work.floors(self.roofline)
        time = row.time(self.timer)
        if time is None:
            return Figures(*floors)
        reference = self.rows.get((REFERENCE, row.uuid))
        reference_time = reference.time(self.timer) if reference else None
        return Figures(
            *floors,
            unpromoted_fraction=_share(floors.unpromoted_us, time.median),
            promoted_fraction=_share(floors.promoted_us, time.median),
            tflops=row.work.flops / time.median / 1e6,
            tb_per_s=row.work.bytes / time.median / 1e6,
            speedup=reference_time.median / time.median if reference_time else None,
        )

    def failures(self) -> list[Row]:
        """Rows that are not right."""
        return [row for row in self.rows.values() if row.status != PASS]

    def timed_by(self, clock: str) -> set[tuple[str, str]]:
        """Solution and uuid of the rows that have times by "gpu" or "wall"."""
        return {key for key, row in self.rows.items() if row.time(clock)}

    def commands(self) -> list[str]:
        """What asked for the rows: the run's command, after those of runs that it went on with."""
        return list(dict.fromkeys([*self.about.get("resumed_commands", ()), self.about["command"]]))

    def script(self) -> str:
        """The commands for a document."""
        return "\n# resumed with\n".join(self.commands())

    def workloads(self) -> list[tuple[str, list[Row]]]:
        """The rows by workload, in order of T; within one, in that of `solutions`."""
        order = sorted({(row.num_tokens, row.uuid) for row in self.rows.values()})
        names = self.solutions()
        return [
            (uuid, [self.rows[name, uuid] for name in names if (name, uuid) in self.rows])
            for _, uuid in order
        ]

    def solutions(self) -> list[str]:
        """Names with at least one row: the reference, then as they were measured."""
        names = dict.fromkeys(row.solution for row in self.rows.values())
        return sorted(names, key=lambda name: name != REFERENCE)

    def write(self) -> None:
        """Writes the file atomically.

        Raises:
            FileError: It cannot be written; what was there before is whole.
        """
        content = {
            "schema": SCHEMA,
            "timer": self.timer,
            **self.about,
            "roofline": plain(self.roofline),
            "unavailable": self.unavailable,
            "rows": [
                plain(row) | {"figures": plain(self.figures(row))} for row in self.rows.values()
            ],
        }
        with writing(self.path), write_atomically(self.path) as file:
            json.dump(content, file, indent=1, default=str)
            file.write("\n")
            file.flush()  # a full disk shows here, before anything of an earlier run goes
            if not self.is_written:
                self.begin()
        self.is_written, self.rows_on_disk = True, len(self.rows)


def load_rows(
    path: Path,
    settings: dict[str, Any],
    machine: dict[str, Any],
    passes: Sequence[str],
    is_asked: Callable[[Row], bool] = lambda _: True,
) -> list[Row]:
    """Reads the rows of an earlier run that a resumed one may keep.

    Args:
        path: The earlier run's JSON file.
        settings: What must be equal, `Settings.comparable()`.
        machine: What must be equal of the surroundings: device, versions, commit.
        passes: The clocks of this run, in order.
        is_asked: Whether a row is to be measured by this run.

    Returns:
        The rows that were right and have times of one clock at least: what lacks others gets them.
        The rest is measured again if it is asked for, and kept if not: a wrong row stays one.

    Raises:
        ValueError: There is no such file, it is damaged, or it comes from another kind of run.
    """
    try:
        content = parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"--resume: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--resume: {error}") from None
    wanted = {"schema": SCHEMA, "settings": settings, **machine}
    wanted = parse_object(json.dumps(wanted, default=str), "this run")
    for name, value in wanted.items():
        if content.get(name) != value:
            difference = _difference(content.get(name), value)
            other = f"other {name}" if name.endswith("s") else f"another {name}"
            raise ValueError(f"--resume: {path} was measured with {other}: {difference}")
    try:
        rows = rows_of(content)
    except (KeyError, ValueError) as error:
        raise ValueError(f"--resume: {path}: damaged: {typed.reason(error)}") from None
    return [
        row
        for row in rows
        if not is_asked(row) or (row.status == PASS and any(map(row.is_finished, passes)))
    ]


def rows_of(content: dict[str, Any]) -> list[Row]:
    """The rows of a file's content.

    Raises:
        KeyError: It holds none.
        ValueError: They are damaged; names row and field.
    """
    rows = typed.checked_list(content["rows"], "rows")
    found: dict[tuple[str, str], Row] = {}
    tokens: dict[str, int] = {}
    for number, fields in enumerate(rows, start=1):
        try:
            row = _row(typed.checked_object(fields, "Row"))
            if found.setdefault((row.solution, row.uuid), row) is not row:
                raise ValueError(f"{row.solution!r} has two rows for workload {row.uuid}")
            if (known := tokens.setdefault(row.uuid, row.num_tokens)) != row.num_tokens:
                got = f"{row.num_tokens}, in another row of the workload {known}"
                raise ValueError(f"Row.num_tokens: expected one count, got {got}")
        except (KeyError, ValueError) as error:
            raise ValueError(f"row {number}: {typed.reason(error)}") from None
    return list(found.values())


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        key = next(k for k in {**found, **wanted} if found.get(k) != wanted.get(k))
        return f"{key} {_difference(found.get(key), wanted.get(key))}"
    return f"{found!r}, now {wanted!r}"


def plain(value: Any) -> Any:
    """Named tuples and dataclasses as objects, for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {key: plain(item) for key, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # the error of an output with a NaN: JSON has no such number
    return value


def _row(fields: dict[str, Any]) -> Row:
    parts: dict[str, Any] = {"load": LocalLoad, "work": Work, "check": Check}
    measured = {"gpu": Statistics, "wall": Statistics, "clock": Reading, "sustained": Reading}
    added = {"clock": None, "sustained": None}  # which older files lack
    known = added | {key: value for key, value in fields.items() if key != "figures"}
    check = known["check"]
    is_unbounded = isinstance(check, dict) and check.get("relative_error", 0) is None
    if is_unbounded:  # as `plain` writes it
        known["check"] = check | {"relative_error": 0.0}
    for name, kind in (parts | measured).items():
        if known[name] is not None:
            known[name] = typed.record(kind, known[name], positive=name in measured)
    if is_unbounded:
        known["check"] = known["check"]._replace(relative_error=math.inf)
    kernels = typed.checked_list(known["kernels"], "Row.kernels")
    known["kernels"] = tuple(typed.record(KernelTime, kernel) for kernel in kernels)
    row: Row = typed.record(Row, known)
    _check_row(row)
    return row


def _check_row(row: Row) -> None:
    """Refuses what no run writes and a document would show."""
    for name in ("solution", "uuid"):
        if "|" in one_line(getattr(row, name), f"Row.{name}"):
            raise ValueError(f"Row.{name}: expected a name, got {getattr(row, name)!r}")
    if row.status not in (PASS, WRONG, ERROR):
        raise ValueError(f"Row.status: expected {PASS}, {WRONG} or {ERROR}, got {row.status!r}")
    if row.num_tokens > MAX_TOKENS:
        raise ValueError(f"Row.num_tokens: expected at most {MAX_TOKENS}, got {row.num_tokens}")
    for name in ("gpu", "wall"):
        times: Statistics | None = getattr(row, name)
        if times and row.status != PASS:
            raise ValueError(f"Row.{name}: expected no times of a row that is {row.status}")
        if times and not times.p10 <= times.median <= times.p90:
            raise ValueError(f"Row.{name}: expected p10 <= median <= p90, got {times}")
