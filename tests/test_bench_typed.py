"""Values of a results file that are of another type than their field's are refused."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import pytest

from bench import typed

type Mode = Literal["fast", "high"]


class Times(NamedTuple):
    us: float
    n: int


@dataclasses.dataclass(frozen=True)
class Record:
    name: str
    mode: Mode
    right: bool
    times: Times | None = None
    words: tuple[str, ...] = ()


FIELDS = {"name": "a", "mode": "high", "right": True, "words": ("b",)}


def test_what_fits_is_made():
    times = typed.record(Times, {"us": 2, "n": 3})
    assert times == Times(2, 3)
    assert typed.record(Record, FIELDS | {"times": times}).times is times
    assert typed.record(Record, FIELDS | {"times": None}).times is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "Record.name: expected str, got 1"),
        ({"name": None}, "Record.name: expected str, got None"),
        ({"mode": "slow"}, "Record.mode: expected Mode, got 'slow'"),
        ({"right": 1}, "Record.right: expected bool, got 1"),
        ({"times": {"us": 2}}, r"Record.times: expected .*Times \| None, got {'us': 2}"),
        ({"words": ("b", 1)}, r"Record.words: expected tuple.*, got \('b', 1\)"),
        ({"more": 1}, "Record: unknown 'more'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        typed.record(Record, FIELDS | change)


@pytest.mark.parametrize(("us", "n"), [("2", 3), (True, 3), (2.0, 3.0), (2.0, False)])
def test_numbers_are_numbers(us, n):
    with pytest.raises(ValueError, match=r"Times\.(us|n): expected (float|int), got "):
        typed.record(Times, {"us": us, "n": n})


@pytest.mark.parametrize("us", [-1, -0.5, float("inf"), float("nan"), 10**400])
def test_numbers_that_cannot_be_are_refused(us):
    with pytest.raises(ValueError, match=r"Times\.us: expected a number in 0\.\.1e\+300, got "):
        typed.record(Times, {"us": us, "n": 3})


def test_times_are_positive():
    assert typed.record(Times, {"us": 0, "n": 0}) == Times(0, 0)
    for us in (0, 0.0, 1e-300):
        with pytest.raises(ValueError, match=r"Times\.us: expected a number in 1e-06"):
            typed.record(Times, {"us": us, "n": 3}, positive=True)


def test_a_missing_field_and_no_object_are_named():
    with pytest.raises(ValueError, match=r"^Times: no 'n'$"):
        typed.record(Times, {"us": 1})
    with pytest.raises(ValueError, match=r"^Times: expected an object, got list$"):
        typed.record(Times, [1, 2])
