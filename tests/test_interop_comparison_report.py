"""The published document: its arithmetic, its sentences, and what it must never show."""

from __future__ import annotations

import errno
import os

import pytest

from interop import comparison_analysis, comparison_report, plot_style
from interop.comparison_report import PASSED, Measurement, WorkloadRow

# The published speedups: num_tokens, v1, v2.
PUBLISHED = [
    (1, 13.8, 23.42), (7, 21.78, 23.02), (14, 22.75, 27.55), (15, 20.64, 28.3), (16, 18.86, 22.36),
    (32, 21.57, 20.88), (52, 19.61, 22.24), (53, 23.08, 26.9), (54, 23.7, 25.0), (55, 24.9, 26.33),
    (56, 25.47, 26.61), (57, 24.47, 27.41), (58, 24.27, 24.04), (59, 24.28, 25.54),
    (62, 23.79, 27.28), (80, 23.78, 25.24), (901, 17.8, 20.44), (11948, 3.8, 4.29),
    (14107, 4.02, 4.61),
]  # fmt: skip
WORKLOADS = [WorkloadRow(f"{tokens:08d}-0000", tokens, 32) for tokens, _, _ in PUBLISHED]
DESIGNS = {"v1": {"SwiGLU": "copy"}, "v2": {"SwiGLU": "views", "Workspace": "small"}}


def published_results() -> dict[str, dict[str, Measurement]]:
    reference = 15.0
    return {
        name: {
            row.uuid: Measurement(PASSED, reference / speedups[column], reference, 10 * column)
            for row, speedups in zip(WORKLOADS, PUBLISHED, strict=True)
        }
        for column, name in ((1, "v1"), (2, "v2"))
    }


def render(results, workloads=WORKLOADS, **options):
    return comparison_report.render(
        workloads, results, header={"Device": "B200"}, command="x", **options
    )


def cells(text: str, label: str, table: int = 0) -> list[str]:
    """A line of the table of speeds (0) or of latencies (1)."""
    line = [line for line in text.splitlines() if line.startswith(f"| {label}")][table]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_means_are_those_of_the_rows():
    """The published document misprints the first mean as 19.60."""
    text = render(published_results())
    assert cells(text, "**mean**") == ["**mean** of 19", "", "", "20.12x", "22.71x", "1.14x"]
    ratios = [v2 / v1 for _, v1, v2 in PUBLISHED]
    assert comparison_analysis.geomean(ratios) == pytest.approx(1.135, abs=1e-3)
    assert cells(text, "**geomean**")[-1] == f"{comparison_analysis.geomean(ratios):.2f}x"


def test_rows_are_sorted_and_ratios_are_of_speeds():
    text = render(published_results(), workloads=WORKLOADS[::-1])
    shown = [int(line.split("|")[2]) for line in text.splitlines() if line.startswith("| `")]
    assert shown == sorted(row.num_tokens for row in WORKLOADS) * 2
    assert cells(text, "UUID")[3:] == ["v1", "v2", "v2 / v1"]
    assert cells(text, "`00000001`")[3:] == ["13.80x", "23.42x", "1.70x"]
    assert cells(text, "`00000001`", 1)[3:] == ["1.087", "0.640"]
    words = " ".join(text.split())
    assert "`A / B` is a ratio of speeds: how many times as fast A is as B (above 1: A" in words


def test_what_is_no_uuid_is_named_whole():
    work = WorkloadRow("scaling-512", 512, 32)
    results = {name: {work.uuid: Measurement(PASSED, 1.0, 2.0)} for name in ("v1", "v2")}
    assert cells(render(results, workloads=[work]), "`scaling-512`")[1:3] == ["512", "32"]


def test_the_analysis_covers_the_regimes_and_nothing_else():
    headings = [
        heading for heading, _ in comparison_analysis.analysis(WORKLOADS, published_results())
    ]
    assert headings == [
        "All workloads (19 workloads)",
        "T = 1 (1 workload)",
        "T = 7-32 (5 workloads)",
        "T = 50-80 (10 workloads)",
        "T = 901 (1 workload)",
        "T > 10K (2 workloads)",
    ]
    regimes = comparison_analysis.REGIMES
    for tokens in (1, 2, 6, 7, 33, 81, 900, 901, 902, 10_000, 10_001, 10**6):
        assert sum(regime.holds(tokens) for regime in regimes) == 1


def test_sentences_say_what_the_numbers_say():
    groups = dict(comparison_analysis.analysis(WORKLOADS, published_results()))
    small = groups["T = 7-32 (5 workloads)"]
    assert (
        "`v2` is 1.15x as fast as `v1` (geometric mean, 0.97x to 1.37x), faster on 4 of 5." in small
    )
    assert "Fastest: `v1` on 1 of 5, `v2` on 4 of 5." in small
    assert "`v2` is 1.70x as fast as `v1`." in groups["T = 1 (1 workload)"]


def test_a_wrong_result_never_shows_a_speed():
    results = published_results()
    first = WORKLOADS[0].uuid
    results["v2"][first] = Measurement("INCORRECT_NUMERICAL", 0.1, 15.0)
    del results["v2"][WORKLOADS[1].uuid]
    text = render(results)
    assert cells(text, "`00000001`")[3:] == ["13.80x", "INCORRECT_NUMERICAL", "-"]
    assert cells(text, "`00000001`", 1)[3:] == ["1.087", "INCORRECT_NUMERICAL"]
    assert cells(text, "`00000007`")[3:] == ["21.78x", "not run", "-"]
    assert "**Not all workloads PASS:**" in text
    assert "- `v2`: 17 of 19 workloads PASS, 1 not run" in text
    assert "All 19" not in text.replace("All workloads", "")
    assert "`v2` has no passing result on 2 of 19." in text


def test_what_was_not_run_has_not_failed():
    results = published_results()
    del results["v2"][WORKLOADS[1].uuid]
    text = render(results)
    assert (
        "**All that were run PASS, not all were run:**\n\n- `v1`: 19 of 19 workloads PASS\n" in text
    )
    assert "- `v2`: 18 of 19 workloads PASS, 1 not run\n" in text


def test_means_keep_what_only_some_solutions_passed():
    results = published_results()
    results["v3"] = {uuid: row._replace(latency_ms=1.0) for uuid, row in results["v1"].items()}
    for name, last in (("v2", 18), ("v3", 17)):
        for work in WORKLOADS[last:]:
            del results[name][work.uuid]
    results["v3"][WORKLOADS[0].uuid] = Measurement(PASSED, 1.0)  # no reference: no speedup
    text = render(results)
    means = cells(text, "**geomean**")
    assert means[0] == "**geomean** of 19"
    speedups = [v1 for _, v1, _ in PUBLISHED]
    latencies = [15.0 / v2 for _, _, v2 in PUBLISHED[:18]]
    assert means[3] == f"{comparison_analysis.geomean(speedups):.2f}x"
    assert means[5] == "15.00x (of 16)"
    of_latencies = cells(text, "**geomean**", 1)
    assert of_latencies[4] == f"{comparison_analysis.geomean(latencies):.3f} (of 18)"
    assert of_latencies[5] == "1.000 (of 17)"
    ratios = [v2 / v1 for _, v1, v2 in PUBLISHED[:18]]
    expected = f"{comparison_analysis.geomean(ratios):.2f}x"
    assert means[6] == f"{expected} (of 18)"
    assert "`(of n)`: " in text
    assert f"`v2` is {expected} as fast as `v1` (geometric mean of 18, 0.97x to 1.70x)" in text
    assert "- `v2` is 1.13x as fast as `v1` on 1 of 2." in text
    assert "- `v2`: 4.29x the reference's speed on 1 of 2." in text
    assert "(of " not in render(published_results())


def test_a_solution_that_never_passed_does_not_empty_the_means():
    results = published_results() | {"broken": {WORKLOADS[0].uuid: Measurement("TIMEOUT")}}
    assert cells(render(results), "**mean**")[0] == "**mean** of 19"


def test_without_a_reference_there_is_no_table_of_its_speedups():
    measured = {"v1": Measurement(PASSED, 1.0), "v2": Measurement(PASSED, 0.5)}
    results = {name: {WORKLOADS[0].uuid: row} for name, row in measured.items()}
    text = render({"v1": results["v1"]}, workloads=WORKLOADS[:1])
    assert cells(text, "UUID")[3:] == ["v1"]  # of latencies
    assert "Speedup" not in text
    assert "The reference was not timed, so there are no speedups." in text
    text = render(results, workloads=WORKLOADS[:1])
    assert cells(text, "UUID")[3:] == ["v2 / v1"]
    assert cells(text, "`00000001`")[3:] == ["2.00x"]
    assert "`A / B` is a ratio of speeds" in text


def test_differences_and_workspace():
    text = render(published_results(), designs=DESIGNS)
    assert cells(text, "solution") == ["solution", "SwiGLU", "Workspace"]
    assert cells(text, "`v1`") == ["`v1`", "copy", "-"]
    assert cells(text, "`v2`") == ["`v2`", "views", "small"]
    assert "- `v2`: 20 bytes (at T=1)" in text
    without = {"v1": {row.uuid: Measurement(PASSED, 1.0, 2.0) for row in WORKLOADS}}
    assert "- `v1`: not measured in this run" in render(without)


def test_documents_are_written_whole(tmp_path):
    folder = tmp_path / "new"
    how = {"header": {}, "command": "x", "name": "report"}
    written = comparison_report.write(folder, WORKLOADS, published_results(), **how)
    assert written == [folder / "report.md", folder / "report.png"]
    assert "![Speedup against tokens](report.png)" in written[0].read_text()
    assert written[1].read_bytes().startswith(b"\x89PNG")
    assert sorted(folder.iterdir()) == written
    one = {name: {WORKLOADS[0].uuid: rows[WORKLOADS[0].uuid]} for name, rows in
           published_results().items()}  # fmt: skip
    assert comparison_report.write(folder, WORKLOADS[:1], one, **how) == [folder / "report.md"]
    assert list(folder.iterdir()) == [folder / "report.md"]  # a point alone is no plot
    assert "report.png" not in (folder / "report.md").read_text()


def test_a_document_is_there_without_a_plot_that_the_disk_has_no_room_for(tmp_path, monkeypatch):
    figure = plot_style.figure(6, 4)

    def part(file, **_):
        file.write(b"\x89PNG")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(figure), "savefig", lambda _, file, **how: part(file, **how))
    (tmp_path / "report.png").write_text("an earlier report's")
    how = {"header": {}, "command": "x", "name": "report"}
    with pytest.raises(comparison_report.PlotError, match="No space left on device") as raised:
        comparison_report.write(tmp_path, WORKLOADS, published_results(), **how)
    assert raised.value.filename == str(tmp_path / "report.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "report.md"]
    assert "report.png" not in (tmp_path / "report.md").read_text()


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match="needs workloads and results"):
        render({})
    with pytest.raises(ValueError, match="not listed: nobody"):
        render({"v1": {"nobody": Measurement(PASSED, 1.0, 2.0)}})


def test_all_that_pass_are_said_to():
    assert "All 19 workloads PASS with each of the solutions." in render(published_results())
    one = {"v1": published_results()["v1"]}
    assert "All 19 workloads PASS with `v1`." in render(one)


def test_warnings_come_first():
    text = render(published_results(), warnings=["**Incomplete**: interrupted."])
    assert text.startswith("# v1 vs v2\n\n**Incomplete**: interrupted.\n\n- Device: B200\n")


def test_a_tie_is_no_win():
    results = published_results()
    results["v2"] = dict(results["v1"])
    groups = dict(comparison_analysis.analysis(WORKLOADS, results))
    expected = "`v2` is 1.00x as fast as `v1` (geometric mean, 1.00x), faster on none."
    assert expected in groups["T = 7-32 (5 workloads)"]
    first = WORKLOADS[1].uuid
    results["v2"][first] = Measurement(PASSED, results["v1"][first].latency_ms / 2, 15.0)
    groups = dict(comparison_analysis.analysis(WORKLOADS, results))
    assert any("faster on 1 of 5" in one for one in groups["T = 7-32 (5 workloads)"])


def test_versions_are_compared_however_many_solutions_there_are():
    """Nine solutions: two blocks of columns, and both pairs of versions with their averages."""
    published = published_results()
    names = {"a_v1": "v1", "a_v2": "v2", "b_v1": "v1", "b_v2": "v1", "lonely_v1": "v2"}
    results = {name: published[of] for name, of in names.items()}
    results |= {f"other{i}": published["v1"] for i in range(4)}
    text = render(results)
    assert text.startswith("# 9 solutions compared\n")
    assert comparison_analysis.pairs(results) == [("a_v1", "a_v2"), ("b_v1", "b_v2")]
    assert cells(text, "UUID", 1)[3:] == ["other3", "a_v2 / a_v1", "b_v2 / b_v1"]
    assert cells(text, "**mean**", 1)[3:] == ["20.12x", "1.14x", "1.00x"]
    assert "- `a_v2` is 1.14x as fast as `a_v1` (geometric mean, 0.97x to 1.70x)" in text
    assert max(line.count("|") for line in text.splitlines()) <= 12
    # What no sentence says of so many is in a table by regime.
    assert cells(text, "T = 1 (1 workload)")[1:4] == ["13.80x", "23.42x", "13.80x"]
    assert "the reference's speed" not in text
