"""The interpreter notices when a barrier, a fence or a wait is missing from a Mosaic kernel."""

from __future__ import annotations

import runpy
import sys

import pytest

from tests import barrier_mutations
from tests.barrier_mutations import UNREACHED, places_in_the_source, record, remove, verdicts


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["barrier_wait", "wait_smem_to_gmem"])
def test_a_removal_is_caught(operation):
    sites = record(first_only=True)
    assert {site.operation for site in sites} >= {"barrier_arrive", "barrier_wait", "commit_smem"}
    site = next(site for site in sorted(sites) if site.operation == operation)
    verdict = remove(site, sites[site])
    assert verdict.how not in (None, "hang"), verdict


def test_without_pytest_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)  # its import fails
    with pytest.raises(SystemExit, match=r"mutations: needs pytest: pip install pytest$"):
        runpy.run_path(barrier_mutations.__file__, run_name="__main__")


def test_what_no_test_reaches_is_known():
    places = places_in_the_source()
    assert len(places) >= 20
    assert places >= set(UNREACHED), "gone from the source"


@pytest.mark.slow
def test_every_removal_is_caught_or_explained():
    sites = record()
    assert places_in_the_source() - {site.place for site in sites} == set(UNREACHED)
    found = list(verdicts(sites))
    print("\n".join(map(str, found)))
    assert len(found) >= 8
    assert [str(v) for v in found if v.how is None and v.excuse is None] == []
    unseen = {v.site.place for v in found if v.how is None}
    stale = {key for key in barrier_mutations.UNSEEN if " in " in key} - unseen
    assert stale == set(), "seen by now: no explanation needed"
