"""What a file of results says beside its rows, as far as documents show it."""

import datetime
from typing import Any, Literal, NotRequired, TypedDict

from bench import typed
from jax_moe.io.strict_json import one_line


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
    try:
        datetime.datetime.fromisoformat(content.get("started") or "2026-01-01")
    except ValueError:
        got = repr(content["started"])
        raise ValueError(f"started: expected a time in ISO 8601, got {got}") from None
