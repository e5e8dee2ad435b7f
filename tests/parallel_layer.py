"""The layer over several ranks against one rank after the other; needs eight CPU devices.

`tests/test_parallel.py` runs this file in a process of its own.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

import jax_moe
from tests import nvlink_model, pairwise
from tests.moe_inputs import SMALL, bits, relative_error
from tests.parallel_cases import (
    FACTOR,
    NUM_EXPERTS,
    ROUTINGS,
    Case,
    expected,
    ids_and_weights,
    inputs_of,
    is_live,
    mesh_of,
    reference_of,
    run,
)

OPTIONS = {
    "ranks": (1, 2, 4, 8),
    "tokens": (0, 1, 3, 17, 129),
    "exchange": ("collectives", "two_level", "nvlink"),
    "placement": (None, "copies"),
    "check_vma": (True, False),
    "mesh": ("auto", "explicit"),
    "routing": ROUTINGS,
    "live": ("all", "some"),
}
"""Those that change the program come first: neighbours in the product share it."""

PIECES = (1, 2)
FEW = {"tokens": (0, 1, 17, 129)}  # `parallel_arguments.py` has three tokens of each rank


@pytest.fixture(autouse=True)
def model_of_nvlink(monkeypatch):
    """A CPU has no peers: `exchange="nvlink"` is the model, with NaN in all that is not sent."""
    nvlink_model.use_poisoned(monkeypatch)


def label(case: Case) -> str:
    return "-".join(map(str, case))


def check(case: Case) -> None:
    out, load = run(case)
    np.testing.assert_array_equal(bits(out), bits(expected(case)))
    live = is_live(case)
    assert not bits(out)[~live].any(), "a dead token has an output"
    if live.any():
        wanted = reference_of(case.routing)[: len(out)][live]
        assert relative_error(out[live], wanted) < 0.04
    ids, _ = ids_and_weights(case)
    np.testing.assert_array_equal(load, np.bincount(ids[ids >= 0], minlength=NUM_EXPERTS))


def covering() -> list[Case]:
    return [Case(**row) for row in pairwise.covering(OPTIONS | FEW | {"pieces": PIECES})]


def whole() -> list[Case]:
    rows = pairwise.product(OPTIONS)
    return [Case(**row, pieces=PIECES[i // 6 % 2]) for i, row in enumerate(rows)]


@pytest.mark.parametrize("case", covering(), ids=label)
def test_a_covering_set_of_cases(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", whole(), ids=label)
def test_all_cases(case):
    check(case)


def test_a_router_of_ones_own_has_the_arithmetic_of_the_configuration():
    case = Case(ranks=4, tokens=3)
    inputs = inputs_of(case)
    routing = jax_moe.route(inputs.routing_logits, inputs.routing_bias, FACTOR, config=SMALL)
    *arrays, weights, _ = inputs.routed(routing).arguments
    make = functools.partial(
        jax_moe.expert_parallel, mesh_of(case), "expert", num_experts=NUM_EXPERTS
    )
    for field, value in (("swiglu_limit", 0.5), ("scale_format", "ue8m0")):
        config = dataclasses.replace(SMALL, **{field: value})
        by_config, by_name = make(config=config), make(**{field: value})
        out = by_config(*arrays, weights)
        np.testing.assert_array_equal(bits(out), bits(by_name(*arrays, weights)))
        assert (bits(out) != bits(make()(*arrays, weights))).any()
