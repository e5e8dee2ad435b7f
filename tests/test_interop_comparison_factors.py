"""What each difference of the second pipeline brought, and whether that is what was published."""

from __future__ import annotations

import re

import pytest

from interop import comparison_factors, comparison_report
from interop.comparison_factors import ALL, BASE, FACTORS
from interop.comparison_report import PASSED, Measurement, WorkloadRow

TOKENS = (1, 7, 80, 901, 14107)
WORKLOADS = [WorkloadRow(f"{tokens:08d}", tokens, 32) for tokens in TOKENS]
QUANT, SWIGLU, WORKSPACE = FACTORS


def measured(quant, swiglu, workspace, everything=2.0, clock="GPU time"):
    """Results in which a solution is so many times as fast as the base, for each token count."""
    ratios = {BASE: 1.0, QUANT: quant, SWIGLU: swiglu, WORKSPACE: workspace, ALL: everything}
    found = {}
    for name, given in ratios.items():
        by_tokens = given if isinstance(given, dict) else dict.fromkeys(TOKENS, given)
        found[name] = {
            w.uuid: Measurement(
                PASSED,
                3.0 / by_tokens[w.num_tokens],
                9.0,
                clocks={clock: 3.0 / by_tokens[w.num_tokens]},
            )
            for w in WORKLOADS
        }
    return found


def text_of(results):
    return "\n".join(comparison_factors.section(WORKLOADS, results))


def line(text, start):
    (found,) = [one for one in text.splitlines() if one.startswith(start)]
    return found


def test_what_each_brought_is_told_by_regime_and_clock():
    results = measured({1: 1.02, 7: 1.1, 80: 1.1, 901: 1.3, 14107: 1.3}, 1.05, 1.0)
    for rows in results.values():
        for uuid, row in rows.items():
            both = {**row.clocks, "wall time": row.clocks["GPU time"] * 2 + 1}
            rows[uuid] = row._replace(clocks=both)
    text = text_of(results)
    assert re.findall(r"^### (.*)", text, re.M) == [
        "By GPU time",
        "By wall time",
        "Beside the published ranking",
    ]
    by_gpu, by_wall = text.split("### By wall time")
    assert line(by_gpu, "| regime") == (
        "| regime | workloads | native quantization | zero-copy SwiGLU | small workspace | "
        "all three (`sglang_v2`) |"
    )
    assert line(by_gpu, "| T = 1 ") == "| T = 1 | 1 | 1.02x | 1.05x | 1.00x | 2.00x |"
    assert line(by_gpu, "| T > 10K ") == "| T > 10K | 1 | 1.30x | 1.05x | 1.00x | 2.00x |"
    expected = "zero-copy SwiGLU helped most (zero-copy SwiGLU 1.05x, native quantization 1.02x, "
    assert line(by_gpu, "- T = 1: ") == f"- T = 1: {expected}small workspace 1.00x)."
    # (2 * 3 + 1) / (2 * 3 / 1.3 + 1)
    assert line(by_wall, "| T > 10K ").startswith("| T > 10K | 1 | 1.25x |")
    assert "1.00x (of" not in text


@pytest.mark.parametrize(
    ("factors", "verdicts"),
    [
        (
            # As published: the workspace at T=1, then 10 to 15 % by the quantization.
            ({**dict.fromkeys(TOKENS, 1.12), 1: 1.1}, 1.03, {**dict.fromkeys(TOKENS, 1.0), 1: 1.6}),
            ["(1) agrees at T=1", "(2) agrees:", "(3) agrees:"],
        ),
        (
            ({**dict.fromkeys(TOKENS, 1.3), 1: 1.05}, 1.05, 1.0),
            ["(1) does not agree at T=1", "(2) does not agree:", "(3) agrees in 4 of 5 regimes:"],
        ),
        (
            ({**dict.fromkeys(TOKENS, 1.1), 901: 1.16}, 1.2, 1.2),
            ["(1) does not agree at T=1", "(2) agrees in 4 of 5 regimes:", "(3) does not agree:"],
        ),
    ],
    ids=["as published", "otherwise", "in part"],
)
def test_the_published_ranking_is_judged_by_the_figures(factors, verdicts):
    text = text_of(measured(*factors))
    for verdict in verdicts:
        assert f"- By GPU time: {verdict}" in text


def test_nothing_helped():
    assert "- T = 1: none of the three helped (" in text_of(measured(1.0, 0.9, 1.004))


def test_a_variant_that_is_wrong_brings_nothing():
    results = measured(1.1, 1.1, 1.1)
    results[QUANT][WORKLOADS[0].uuid] = Measurement("WRONG", clocks={"GPU time": 0.1})
    text = text_of(results)
    assert line(text, "| T = 1 ") == "| T = 1 | 1 | - | 1.10x | 1.10x | 2.00x |"
    assert line(text, "| All workloads ").startswith("| All workloads | 5 | 1.10x (of 4) | 1.10x |")
    assert "- T = 1: not all of the three were measured." in text
    assert f"- `{QUANT}` passed 4 of 5 workloads (WRONG)." in text
    assert "(1)" not in text.split("gain, read here")[1]


def test_without_the_variants_the_document_says_what_it_takes():
    results = measured(1.1, 1.1, 1.1)
    del results[SWIGLU]
    assert f"Not measured here: `bench_main.py --report` with `{SWIGLU}` beside" in text_of(results)
    del results[BASE]
    assert comparison_factors.section(WORKLOADS, results) == []


def test_variants_have_their_section_and_no_column_of_the_tables():
    text = comparison_report.render(WORKLOADS, measured(1.1, 1.1, 1.1), header={}, command="x")
    assert text.startswith("# sglang_v1 vs sglang_v2\n")
    assert "## What helped most" in text
    assert "| UUID | num_tokens | offset | sglang_v1 | sglang_v2 | sglang_v2 / sglang_v1 |" in text
    assert f"- `{QUANT}`: not measured in this run" in text  # its workspace
