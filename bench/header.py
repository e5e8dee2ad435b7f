"""What every document of a run says first: what was measured, how, and what to beware of."""

from bench import environment
from bench.results import Results
from bench.settings import Settings
from bench.sm_clock import SUSTAINED_S
from bench.workloads import FULL
from interop.workloads import definition
from jax_moe import models


def warnings(results: Results, settings: Settings) -> list[str]:
    """What no document of the run may leave out, in markdown; empty for a whole run on a GPU."""
    found = []
    if not is_complete(results):
        found.append(f"**Incomplete**: {stopped(results)}.")
    if not settings.on_gpu:
        found.append(f"**REDUCED sizes**: {reduced(settings)}")
    if other := stand_in(settings):
        found.append(f"**Stand-in for {settings.model}**: {other}")
    return found


def stopped(results: Results) -> str:
    """Why a run is incomplete."""
    if results.about.get("complete"):
        return "rows that were asked for are missing"
    return results.about.get("stopped", "the run has not ended")


def is_complete(results: Results) -> bool:
    """Whether all rows are there that were asked for, with their times."""
    asked = results.about.get("asked", {}).get("rows", 0)
    finished = sum(row.is_finished(results.timer) for row in results.rows.values())
    return bool(results.about.get("complete")) and finished >= max(asked, len(results.rows))


def count(results: Results) -> str:
    """How many of the rows that were asked for have times of the run's timer, or are wrong."""
    rows = results.rows.values()
    asked = max(len(rows), results.about.get("asked", {}).get("rows", 0))
    measured = sum(row.is_finished(results.timer) for row in rows)
    return f"{measured} of {asked} rows were measured"


def markdown_warnings(results: Results, settings: Settings) -> list[str]:
    """The warnings as lines of a document, each a paragraph."""
    return [line for warning in warnings(results, settings) for line in (warning, "")]


def reduced(settings: Settings) -> str:
    """What a reader of a run without a GPU must know first."""
    sizes = settings.sizes
    return (
        f"{environment.reduced(sizes)} ({sizes.num_local_experts} local), T is kept; host times "
        "only, and they say nothing about a GPU. There is no roofline."
    )


def stand_in(settings: Settings) -> str:
    """In what the layer that is measured differs from the model's; empty if in nothing."""
    model = settings.measured
    if not model.unsupported:
        return ""
    missing = ", ".join(f"{name}={getattr(model, name)!r}" for name in model.unsupported)
    instead = ", ".join(f"{name}={models.IMPLIED[name]!r}" for name in model.unsupported)
    return (
        f"the layer has no {missing} yet and is measured with {instead}: the model's sizes and "
        "amount of work, not its numbers."
    )


def lines(results: Results, settings: Settings) -> list[tuple[str, str]]:
    """Labels and texts: device, versions, commit, inputs, checks, clocks, roofline."""
    about = results.about
    device, versions = about["device"], about["versions"]
    state = about.get("gpu_state_before") or {}
    capability = device["compute_capability"]
    tolerance = settings.tolerance
    found = [
        ("Definition", _definition(settings)),
        ("Date", environment.date(about.get("started", ""))),
        ("Device", device["kind"] + (f" (sm_{capability.replace('.', '')})" if capability else "")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Commit", about["git_commit"]),
        (
            "Inputs",
            f"{settings.inputs}, routing {_routing_text(results, settings)}, seed {settings.seed}",
        ),
        (
            "Tolerance",
            f"rtol {tolerance.rtol}, atol {tolerance.atol}, matched ratio at least "
            f"{tolerance.required_matched_ratio}",
        ),
        ("Timing", _timing_text(settings)),
    ]
    if text := _clock_text(results, settings):
        found.append(("SM clock", text))
    if options := options_text(settings.precision, is_invariant=settings.batch_invariant):
        found.append(("jax_moe", options))
    if tuned := device.get("tuned"):
        found.append(("Tilings", f"of {', '.join(tuned)}: this user's own, not the shipped ones"))
    if state:
        found.append(("Driver", state.get("driver_version", "unknown")))
    if roofline := results.roofline:
        rates = (
            f"{roofline.read_bytes_per_s / 1e12:.3f} TB/s and "
            f"{roofline.fp8_flops_per_s / 1e12:.0f} TFLOP/s: {roofline.probes}; in the column "
            "`unpromoted` this floor over the time"
        )
        found.append(("Unpromoted floor", rates))
        if roofline.promoted_probe:
            flops = roofline.promoted_flops_per_s
            rate = f"{flops / 1e12:.0f} TFLOP/s" if flops else "not measured"
            text = f"{rate}: {roofline.promoted_probe}; likewise in `promoted`"
            found.append(("Promoted floor", text))
    return found


def options_text(precision: str, *, is_invariant: bool) -> str:
    """How the solution jax_moe runs, where that is not how it runs by default."""
    options = [] if precision == "fast" else [f"precision {precision}"]
    return ", ".join([*options, "batch invariant"] if is_invariant else options)


def _routing_text(results: Results, settings: Settings) -> str:
    if settings.inputs == "dataset":
        drawn = results.about.get("stand_ins")
        return f"from {settings.dataset}" + (f" ({drawn})" if drawn else "")
    if settings.routing == "moments":
        return "drawn from the captured moments (a stand-in for the published routing)"
    return f"{settings.routing}, one local expert per token"


def _timing_text(settings: Settings) -> str:
    what = {"write": "zeroed", "read": "read (nothing to write back)"}[settings.flush]
    flush = f", 256 MB {what} before each call" if settings.on_gpu else ""
    clock = {
        "gpu": "GPU time is the first kernel's start to the last one's end, by torch's profiler",
        "wall": "wall time is the host's, from the call to its complete output",
    }
    clocks = "; ".join(clock[name] for name in reversed(settings.passes))
    return (
        f"{clocks}{flush}; trials: {settings.num_trials}, {settings.iterations} calls each (fewer "
        f"if slower than 10 ms) after {settings.warmup} untimed"
        + (f"; {settings.cool_down:g} s idle before each row's first" if settings.cool_down else "")
    )


def _clock_text(results: Results, settings: Settings) -> str:
    if not any(row.clock for row in results.rows.values()):
        return ""
    text = (
        "SM MHz is cycles over the GPU's timer between two probe kernels around each call, in a "
        "pass of its own after the timed calls; `cap`: the power cap was active right after one"
    )
    if settings.sustained:
        text += (
            f"; sust. us is per call, back to back for {SUSTAINED_S} s from probe to probe, L2 not "
            "flushed, with the clock meanwhile"
        )
    return text


def _definition(settings: Settings) -> str:
    sizes, name = settings.sizes, f"`{definition()['name']}`"
    if settings.measured != models.DEEPSEEK_V3:
        name = f"one rank of {settings.model}, routed as `{settings.measured.config}`"
    elif sizes == FULL:
        return name
    return (
        f"{name} at other sizes: H={sizes.hidden_size}, I={sizes.intermediate_size}, "
        f"E={sizes.num_experts}, E_local={sizes.num_local_experts}"
    )
