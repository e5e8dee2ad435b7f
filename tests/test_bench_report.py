"""Tables, breakdown and plots of made-up GPU rows, where every figure is known."""

import dataclasses
import json
import math
import re

import matplotlib.image
import pytest

from bench import breakdown, documents, header, plots, report, saved
from bench.results import WRONG, KernelTime, Results
from bench.roofline import Roofline
from bench.settings import Settings
from bench.sm_clock import Reading
from bench.timers import Statistics
from bench.work import Work
from bench.workloads import FULL, select
from interop.comparison_factors import FACTORS
from tests.bench_rows import row

ROOFLINE = Roofline(read_bytes_per_s=2e12, fp8_flops_per_s=1e15, probes="made up")


@pytest.fixture
def results(tmp_path):
    settings = Settings(solutions=("jax_moe_mosaic", "deepgemm"), output=tmp_path)
    device = {"kind": "Made-up GPU", "compute_capability": "9.0", "platform": "gpu"}
    about = {
        "device": device,
        "versions": {"jax": "1"},
        "started": "2026-01-02T03:04:05+00:00",
        "git_commit": "abc",
        "command": settings.command(),
        "settings": settings.comparable(),
        "complete": True,
        "gpu_state_before": {"driver_version": "580", "temperature.gpu": "33"},
        "gpu_state_after": {"driver_version": "580", "temperature.gpu": "61"},
    }
    found = Results(tmp_path / "results.json", about, "gpu", roofline=ROOFLINE)
    for one in (
        row("torch_reference", 7, 16_000),
        row("jax_moe_mosaic", 7, 125),
        row("deepgemm", 7, 200),
        row("torch_reference", 80, 20_000),
        row("jax_moe_mosaic", 80, 160),
        row("deepgemm", 80, None, WRONG),
        row("sglang_v2", 80, 400),
    ):
        found.rows[one.solution, one.uuid] = one
    return found, settings


def test_tilings_that_are_not_the_shipped_ones_are_named(results):
    found, settings = results
    assert "Tilings" not in dict(header.lines(found, settings))
    found.about["device"]["tuned"] = ["mosaic"]
    assert dict(header.lines(found, settings))["Tilings"].startswith("of mosaic: this user's")


def test_how_jax_moe_ran_is_said_where_it_is_not_the_default(results):
    found, settings = results
    assert "jax_moe" not in dict(header.lines(found, settings))
    for changes, said in (
        ({"precision": "high"}, "precision high"),
        ({"precision": "high", "batch_invariant": True}, "precision high, batch invariant"),
    ):
        other = dataclasses.replace(settings, **changes)
        assert dict(header.lines(found, other))["jax_moe"] == said
        assert other.comparable() == settings.comparable() | changes


def test_figures_follow_from_time_work_and_roofline(results):
    found, _ = results
    figures = found.figures(found.rows["jax_moe_mosaic", select(["7"])[0].uuid])
    assert figures.unpromoted_floor_us == pytest.approx(100)
    assert figures.unpromoted_fraction == pytest.approx(0.8)
    assert figures.tflops == pytest.approx(400)
    assert figures.tb_per_s == pytest.approx(1.6)
    assert figures.speedup == pytest.approx(128)
    wrong = found.figures(found.rows["deepgemm", select(["80"])[0].uuid])
    assert wrong == (pytest.approx(100), *[None] * 6)


def test_comparison_has_a_mean_over_common_passes_only(results):
    found, _ = results
    header, seven, eighty, means = report.comparison(found)
    names = ["torch_reference", "jax_moe_mosaic", "deepgemm", "sglang_v2"]
    assert header[5:] == [f"{name} us" for name in names]
    assert seven[5:] == ["16,000", "125.0", "200.0", "-"]
    assert eighty[5:] == ["20,000", "160.0", "WRONG", "400.0"]
    assert means[0] == "geomean of 0 / unpromoted floor"
    del found.rows["sglang_v2", select(["80"])[0].uuid]
    found.rows["deepgemm", select(["80"])[0].uuid] = row("deepgemm", 80, 320)
    *_, means = report.comparison(found)
    assert means[0] == "geomean of 2 / unpromoted floor"
    assert means[-2:] == [f"{math.sqrt(1.25 * 1.6):.2f}", f"{math.sqrt(2 * 3.2):.2f}"]


def test_ours_is_compared_with_the_fastest_passing_peer(results):
    found, _ = results
    _, seven, eighty = report.against_peers(found)
    assert seven == [
        "7",
        "100.0",
        "jax_moe_mosaic",
        "125.0",
        "1.25",
        "25.0",
        "deepgemm",
        "200.0",
        "1.60x",
    ]
    assert eighty[-3:] == ["sglang_v2", "400.0", "2.50x"]


def test_the_reference_is_no_peer(results):
    """However fast it is; and where it is all there is, there is nothing to compare with."""
    found, _ = results
    found.rows["torch_reference", select(["7"])[0].uuid] = row("torch_reference", 7, 1.0)
    _, seven, _ = report.against_peers(found)
    assert (seven[-3], seven[-1]) == ("deepgemm", "1.60x")
    for name in ("deepgemm", "sglang_v2"):
        found.rows.pop((name, select(["80"])[0].uuid))
    assert len(report.against_peers(found)) == 2


def test_the_terminal_table_fits_and_a_wrong_row_has_no_speed(results):
    found, settings = results
    shown = documents.conclusion(found, settings, documents.Options())
    assert max(map(len, report.terminal_table(found).splitlines())) <= 150
    assert "T=80 offset=96 8f1ff9f1: 100 local pairs on 10 experts (at most 20 on one)" in shown
    (line,) = [one for one in shown.splitlines() if re.match(r"deepgemm +WRONG", one)]
    assert line.split() == [
        "deepgemm",
        "WRONG",
        "0.9800",
        "0.0230",
        *["-"] * 8,
        "3.0",
        "-",
    ]
    assert "WRONG: deepgemm at T=80: too far off" in shown
    assert "repeat: repeat deepgemm" in shown
    assert "6 of 7 rows PASS" in shown


def test_temporary_memory_stands_beside_its_bound(results):
    found, settings = results
    assert "bound MB" not in report.terminal_table(found)
    ours = row("jax_moe_mosaic", 7, 125, workspace_bound=81_429_376)
    found.rows[ours.solution, ours.uuid] = ours
    (_, cells), *_ = report.grouped(found)
    shown = {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells[1:]}
    memory = {name: (line["temp MB"], line["bound MB"]) for name, line in shown.items()}
    assert memory["jax_moe_mosaic"] == ("3.0", "81.4")
    assert memory["torch_reference"] == memory["deepgemm"] == ("3.0", "-")
    table = report.terminal_table(found)
    assert "temp MB  bound MB" in table
    assert max(map(len, table.splitlines())) <= 160
    list(documents.write_all(found, settings, documents.Options()))
    assert "| 3.0 | 81.4 |" in (settings.output / "results.md").read_text()


@pytest.fixture
def no_plot(monkeypatch):
    """Spares a second of drawing."""
    monkeypatch.setattr(plots, "write", lambda results, path: path.touch())


def test_clocks_have_columns_where_they_were_read(results, no_plot):
    found, settings = results
    assert "MHz" not in report.terminal_table(found)
    ours = row(
        "jax_moe_mosaic", 7, 125, workspace_bound=81_429_376,
        kernels=(KernelTime("moe_up_projection", 100.0, 1),), busy_us=110.0,
        clock=Reading(127.0, 1560.4, True, 20), sustained=Reading(118.0, 1310.0, None, 4000),
    )  # fmt: skip
    found.rows[ours.solution, ours.uuid] = ours
    settings = dataclasses.replace(settings, sustained=True)
    table = report.terminal_table(found)
    assert max(map(len, table.splitlines())) <= 175
    (_, (titles, *lines)), *_ = report.grouped(found)
    cells = dict(zip(titles, next(x for x in lines if x[0] == ours.solution), strict=True))
    assert (cells["SM MHz"], cells["sust. us"], cells["at MHz"]) == ("1560 cap", "118.0", "1310")
    written = documents.write_all(found, settings, documents.Options(breakdown=True))
    texts = {path.name: path.read_text() for path in written if path.suffix == ".md"}
    assert "- SM clock: SM MHz is cycles over the GPU's timer" in texts["results.md"]
    assert "back to back for 0.5 s" in texts["results.md"]
    assert "0.2 s idle before each row's first" in texts["results.md"]
    title = "### jax_moe_mosaic, T=7: SM clock 1560 MHz, power cap active\n"
    assert title in texts["results_breakdown.md"]


def test_both_floors_stand_in_every_table_by_name(results):
    found, settings = results
    assert " promoted" not in report.terminal_table(found)
    flops_bound = Work(bytes=200_000_000, flops=150_000_000_000)  # 150 us; 187.5 with promotion
    for one in [one for one in found.rows.values() if one.num_tokens == 80]:
        found.rows[one.solution, one.uuid] = dataclasses.replace(one, work=flops_bound)
    ours = row("jax_moe_mosaic", 7, 125, kernels=(KernelTime("k", 1.0, 1),), busy_us=1.0)
    found.rows[ours.solution, ours.uuid] = ours
    found.roofline = ROOFLINE._replace(promoted_flops_per_s=8e14, promoted_probe="one expert")
    eighty = found.figures(found.rows["sglang_v2", select(["80"])[0].uuid])
    assert eighty[:4] == pytest.approx((150, 187.5, 150 / 400, 187.5 / 400))
    titles, _, line, _ = report.comparison(found)
    assert titles[4:6] == ["unpromoted floor us", "promoted floor us"]
    assert line[4:6] == ["150.0", "187.5"]
    titles, seven, eighty = report.against_peers(found)
    cells = dict(zip(titles, eighty, strict=True))
    assert (cells["/ unpromoted floor"], cells["/ promoted floor"]) == ("1.07", "0.85")
    assert seven[:3] == ["7", "100.0", "100.0"]  # by bytes both are the same
    shown = report.terminal_table(found)
    assert "unpromoted floor 150.0 us, promoted floor 187.5 us" in shown
    assert max(map(len, shown.splitlines())) <= 160
    documents_of = documents.write_all(found, settings, documents.Options(breakdown=True))
    texts = {path.name: path.read_text() for path in documents_of if path.suffix == ".md"}
    assert "\n- Unpromoted floor: 2.000 TB/s and 1000 TFLOP/s: made up" in texts["results.md"]
    assert "\n- Promoted floor: 800 TFLOP/s: one expert; likewise" in texts["results.md"]
    assert "of its promoted floor" in texts["results_breakdown.md"]


def test_a_file_from_before_a_field_was_added_is_read(results, no_plot):
    found, settings = results
    found.write()
    content = json.loads(found.path.read_text())
    added = {"settings": ("cool_down", "sustained", "flush")}
    for part, names in added.items():
        for name in names:
            del content[part][name]
    for one in content["rows"]:
        del one["clock"], one["sustained"]
    del content["roofline"]["promoted_flops_per_s"], content["roofline"]["promoted_probe"]
    content["asked"] = {
        "solutions": settings.solutions, "workloads": ["all"], "report": False, "breakdown": False,
    }  # fmt: skip
    found.path.write_text(json.dumps(content))
    again = saved.read(settings.output)
    assert again.results.rows == found.rows
    assert again.results.roofline == ROOFLINE
    assert again.settings.cool_down == 0
    list(documents.write_all(again.results, again.settings, again.options))
    assert "idle before" not in (settings.output / "results.md").read_text()


def test_documents_hold_what_a_reader_needs(results):
    found, settings = results
    options = documents.Options(report=True, breakdown=True)
    written = {path.name: path for path in documents.write_all(found, settings, options)}
    assert set(written) == {
        "results.md",
        "results.png",
        "results_breakdown.md",
        "comparison_report.md",
        "comparison_report.png",
    }
    text = written["results.md"].read_text()
    for needed in ("temperature.gpu 61", "2.000 TB/s", "made up", f"\n{settings.command()}\n"):
        assert needed in text
    # How it was measured stands in every table of results, the timing first of all.
    for document in (text, written["comparison_report.md"].read_text()):
        for label in ("Device: Made-up GPU (sm_90)", "Commit: abc", "Inputs: realistic, routing "):
            assert f"\n- {label}" in document
        assert "\n- Timing: GPU time is the first kernel's start to the last one's end" in document
        assert "trials: 5, 100 calls each" in " ".join(document.split())
    assert text.count("| deepgemm | WRONG |") == 1
    assert text.startswith("# 2 of the 19 workloads on Made-up GPU\n")
    report_text = written["comparison_report.md"].read_text()
    assert report_text.startswith("# jax_moe_mosaic vs deepgemm")
    assert "| Rows computed |" in report_text
    assert "128.00x" in report_text


def test_breakdown_accounts_for_the_whole_call():
    kernels = (
        KernelTime("moe_routing", 5.0, 1),
        KernelTime("moe_up_projection", 60.0, 1),
        KernelTime("moe_down_projection", 40.0, 1),
        KernelTime("moe_unpermute", 10.0, 1),
    )
    ours = row("jax_moe_mosaic", 7, 125, kernels=kernels, busy_us=115.0, launches=1)
    table = breakdown.table(ours, FULL, ROOFLINE)
    assert [line[1] for line in table] == ["route", "up", "down", "unpermute", "-", "all"]
    assert [line[2] for line in table[-2:]] == ["10.0", "125.0"]
    assert sum(float(line[2]) for line in table[:-1]) == pytest.approx(125)
    assert sum(float(line[3].rstrip("%")) for line in table[:-1]) == pytest.approx(100, abs=0.3)
    up = breakdown.stage_work("up", ours, FULL)
    assert up.flops == 2 * 100 * 4096 * 7168
    assert up.bytes == 10 * (4096 * 7168 + 4 * 32 * 56) + 100 * (7168 + 4 * 56 + 2048 + 4 * 16)
    assert table[1][5] == f"{up.bytes / 60 / 1e6:.3f}"
    assert table[1][7] == f"{up.bytes / 2e12 / 60e-6:.1%}"
    stages = ("up", "down")
    assert sum(breakdown.stage_work(s, ours, FULL).flops for s in stages) == 100 * 88_080_384


def test_a_workload_of_untimed_rows_alone_has_no_line(results):
    found, _ = results
    checked = row("mosaic_interpreted", 14, None)
    found.rows[checked.solution, checked.uuid] = checked
    header, *lines, _ = report.comparison(found)
    assert "mosaic_interpreted us" not in header
    assert [line[0] for line in lines] == ["7", "80"]


def test_means_of_times_look_like_the_times_above_them(results):
    found, _ = results
    found.roofline = None
    del found.rows["deepgemm", select(["80"])[0].uuid]
    del found.rows["deepgemm", select(["7"])[0].uuid]
    del found.rows["sglang_v2", select(["80"])[0].uuid]
    header, *_, means = report.comparison(found)
    assert dict(zip(header[4:], means[4:], strict=True)) == {
        "torch_reference us": "17,889",
        "jax_moe_mosaic us": "141.4",
    }


def test_a_breakdown_without_kernel_times_says_so(results):
    found, settings = results
    shown = documents.conclusion(found, settings, documents.Options(breakdown=True))
    assert "a breakdown needs --timer=gpu" in shown


def test_triton_kernels_have_stages_and_other_solutions_have_none():
    names = (
        "routing_kernel",
        "count_kernel",
        "plan_kernel",
        "up_projection_kernel",
        "unpermute_kernel",
    )
    kernels = tuple(KernelTime(name, 1.0, 1) for name in names)
    ours = row("jax_moe_triton", 7, 9, kernels=kernels)
    found = [stage.name for stage in breakdown.stages(ours, FULL)]
    assert found == ["route", "plan", "plan", "up", "unpermute"]
    peer = row("sglang_v2", 7, 9, kernels=kernels)
    assert {stage.work for stage in breakdown.stages(peer, FULL)} == {None}


def test_the_comparison_has_every_clock_of_every_variant(results):
    found, settings = results
    for place, name in enumerate(("sglang_v1", *FACTORS, "sglang_v2")):
        for tokens in (7, 80):
            us = 600.0 / (1 + place / 10)
            wall = Statistics(us + 100, us, us + 200, 20)
            one = row(name, tokens, us, how="CUDA graph", wall=wall, busy_us=us - 10 * place)
            found.rows[name, one.uuid] = one
    checked = row("mosaic_interpreted", 14, None)
    found.rows[checked.solution, checked.uuid] = checked
    options = documents.Options(report=True)
    written = {path.name: path for path in documents.write_all(found, settings, options)}
    text = written["comparison_report.md"].read_text()
    assert text.startswith("# 4 solutions compared\n")
    assert "- Definition: `moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048`\n" in text
    assert "- Date: 2026-01-02 03:04 UTC\n" in text
    words = " ".join(text.split())
    assert "CUDA graph: sglang_v2, sglang_v1, sglang_v1_native_quant" in words
    by_gpu, by_kernels, by_wall = re.split("### By .* time", text)[1:]
    assert "| All workloads | 2 | 1.10x | 1.20x | 1.30x | 1.40x |" in by_gpu
    assert "| All workloads | 2 | 1.12x | 1.25x | 1.39x | 1.54x |" in by_kernels
    assert "| T = 7-32 | 600.0 | 54.5 (9.1 %) | 100.0 (16.7 %) | 138.5 (23.1 %) |" in by_gpu
    assert "All gaps of a call: 0.0 to 40.0 us at T = 7-32" in " ".join(by_kernels.split())
    assert "| All workloads | 2 | 1.08x | 1.17x | 1.25x | 1.32x |" in by_wall
    assert "mosaic_interpreted" not in text
    assert "`8cba5890`" not in text  # where nothing was timed


def test_a_plot_names_device_inputs_and_routing(results):
    found, _ = results
    assert plots._title(found) == (
        "Made-up GPU, GPU time, cold L2, median\nH=7168 I=2048 E=256 E_local=32, realistic inputs, "
        "routing by the captured moments"
    )
    changed = {"routing": "zipf", "inputs": "flashinfer", "on_gpu": False}
    found.about["settings"] |= changed
    assert plots.conditions(found).startswith("REDUCED sizes H=7168")
    assert plots.conditions(found).endswith("flashinfer inputs, routing by zipf")
    found.about["settings"] |= {"inputs": "dataset", "precision": "high", "batch_invariant": True}
    said = "dataset inputs, routing of the data set\njax_moe: precision high, batch invariant"
    assert plots.conditions(found).endswith(said)


def test_a_single_token_count_is_no_plot(results):
    found, settings = results
    found.rows = {key: one for key, one in found.rows.items() if one.num_tokens == 7}
    untimed = row("mosaic_interpreted", 14, None)
    found.rows[untimed.solution, untimed.uuid] = untimed
    written = documents.write_all(found, settings, documents.Options(report=True))
    assert {path.name for path in written} == {"results.md", "comparison_report.md"}
    assert ".png" not in (settings.output / "results.md").read_text()


def test_the_plot_has_two_panels_with_a_roofline_and_one_without(results, tmp_path):
    found, _ = results
    plots.write(found, tmp_path / "two.png")
    found.roofline = None
    plots.write(found, tmp_path / "one.png")
    two, one = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("two", "one"))
    assert two.shape[0] > 1.8 * one.shape[0]
    assert two.std() > 0.05
