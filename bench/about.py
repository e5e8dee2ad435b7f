"""What a file of results says beside its rows, as far as documents show it."""

import datetime
from typing import Any, Literal, NotRequired, TypedDict

from bench import typed
from jax_moe.io.strict_json import number, one_line
from jax_moe.scalars import quoted


class Sizes(TypedDict):
    """Of the rank that was measured."""

    num_experts: int
    num_local_experts: int
    hidden_size: int
    intermediate_size: int


class Device(TypedDict):
    """`compute_capability` is None without a GPU; `tuned` names kernels with tilings of a user."""

    kind: str
    compute_capability: str | None
    tuned: NotRequired[list[str]]


class Asked(TypedDict):
    """What a run was asked to measure and to write; `uuids` of each solution."""

    solutions: list[str]
    workloads: list[str]
    report: bool
    breakdown: bool
    rows: NotRequired[int]
    uuids: NotRequired[dict[str, list[str]]]


class Conditions(TypedDict):
    """Of the settings what the titles of plots show; `bench.settings.Settings` has them all."""

    inputs: Literal["realistic", "flashinfer", "dataset"]
    routing: Literal["moments", "balanced", "zipf", "one_hot"]
    flush: NotRequired[Literal["write", "read"]]
    on_gpu: bool
    sizes: Sizes


class About(TypedDict):
    """The whole file but its rows and the roofline. `started` is in ISO 8601."""

    command: str
    device: Device
    versions: dict[str, str]
    git_commit: str
    settings: Conditions
    unavailable: dict[str, str]
    started: NotRequired[str]
    complete: NotRequired[bool]
    stopped: NotRequired[str]
    stand_ins: NotRequired[str | None]
    asked: NotRequired[Asked]
    resumed_commands: NotRequired[list[str]]
    routing_sha256: NotRequired[dict[str, str]]
    gpu_state_before: NotRequired[dict[str, str] | None]
    gpu_state_after: NotRequired[dict[str, str] | None]


class Mesh(TypedDict):
    """Sizes of a layer over ranks; `num_local_experts` may be a list, of `--local-of`."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


class Anywhere(TypedDict):
    """Of any devices."""

    kind: str


class Parallel(TypedDict, total=False):
    """What stands beside the rows of a run over several ranks; older files have less of it."""

    started: str
    command: str
    complete: bool
    reduced: bool
    note: str
    sizes: Mesh
    device: Anywhere
    versions: dict[str, str]
    git_commit: str
    gpu_state: dict[str, str] | None


class Step(TypedDict):
    """The last state of a step of several."""

    step: str
    state: str
    seconds: float
    arguments: NotRequired[list[str]]
    written: NotRequired[str]
    said: NotRequired[str]
    commit: NotRequired[str]


class Kernel(TypedDict):
    """Of a trace of several ranks."""

    rank: int
    name: str
    us: float
    launches: float


def check(content: dict[str, Any]) -> None:
    """Refuses what no run writes and a document would show, or stumble over.

    Args:
        content: Of the file; what is not in `About` may be anything.

    Raises:
        ValueError: Something is missing or of another type; names it.
    """
    typed.check(content, About, "")
    for command in (*content.get("resumed_commands", ()), content["command"]):
        one_line(command, "command")
    one_line(content["device"]["kind"], "device: kind")
    _check_time(content.get("started"))


def check_parallel(about: Any) -> dict[str, Any]:
    """The same of `about` of a run over several ranks; returns it.

    Raises:
        ValueError: Something is missing or of another type; names it.
    """
    typed.check(about, Parallel, "about")
    found = typed.checked_object(about, "about")
    for name, other in (("started", "command"), ("reduced", "note"), ("sizes", "reduced")):
        if found.get(name) and other not in found:
            raise ValueError(f"about: no {other!r}")
    if sizes := found.get("sizes"):
        number(sizes["num_experts"], 1, 2**31, "about.sizes.num_experts")
        local = sizes.get("num_local_experts")
        for count in local if isinstance(local, list) and local else [local]:
            number(count, 1, 2**31, "about.sizes.num_local_experts")
    exchanges = found.get("exchanges", "")
    if not isinstance(exchanges, str) or not all(map(str.isprintable, exchanges.splitlines())):
        raise ValueError(f"about.exchanges: expected printable text, got {quoted(exchanges)}")
    _check_time(found.get("started"))
    return found


def _check_time(started: str | None) -> None:
    try:
        datetime.datetime.fromisoformat(started or "2026-01-01")
    except ValueError:
        raise ValueError(f"started: expected a time in ISO 8601, got {started!r}") from None
