"""The command line: what it lists, what it refuses, how it fills in what was left open."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest
from absl.testing import flagsaver

import bench_main
import jax_moe
from bench import inputs, session
from bench.solutions import default_names, registry
from bench.workloads import FULL, REDUCED
from jax_moe import backends

ROOT = pathlib.Path(__file__).parent.parent
on_cpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="about a machine without a GPU")


@pytest.fixture
def asked(monkeypatch):
    """Runs the command line up to where work would start; returns exit code and settings."""
    seen = []

    def execute(settings, options, **others):
        seen.append((settings, options, others))
        return session.OK

    monkeypatch.setattr(session, "execute", execute)
    # It would last for all later tests of this process, and keep programs from run to run.
    monkeypatch.setattr(bench_main.environment, "enable_compilation_cache", lambda: None)

    def run(*flags):
        with flagsaver.flagsaver():
            code = bench_main.main(bench_main._parse(["bench_main.py", *flags]))
        return code, seen[-1] if seen else None

    return run


@on_cpu
def test_no_flags_do_the_right_thing_without_a_gpu(asked):
    code, (settings, options, others) = asked()
    assert code == session.OK
    assert settings.solutions == ("torch_reference", "jax_moe_xla", "mosaic_interpreted")
    assert settings.workloads == ("all",)
    assert settings.sizes == REDUCED
    assert (settings.iterations, settings.timer, settings.inputs) == (3, "wall", "realistic")
    assert settings.tolerance == (0.2, 0.1, 0.85)
    assert not any(options)
    assert others == {"resume": False, "overwrite": False, "profile": None, "jobs": 0}
    assert settings.output is None


def test_no_flags_do_the_right_thing_on_a_gpu(asked, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(bench_main.gpu_clock, "unavailable_reason", lambda: None)
    _, (settings, _, _) = asked()
    assert settings.sizes == FULL
    assert (settings.warmup, settings.iterations, settings.num_trials) == (10, 100, 5)
    assert (settings.timer, settings.passes) == ("gpu", ("wall", "gpu"))
    assert settings.solutions == default_names(on_gpu=True)
    by_name_only = {"jax_moe", "mosaic_interpreted"}
    by_name_only |= {f"jax_moe_{backend}_high" for backend in backends.NAMES}
    assert set(settings.solutions) == set(registry()) - by_name_only


def test_flags_reach_the_settings_and_the_command_repeats_them(asked, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    flags = [
        "--solutions=jax_moe,jax_ragged_dot",
        "--workloads=80,e05c",
        "--model=qwen3-30b",
        "--backend=xla",
        "--precision=high",
        "--batch_invariant",
        "--inputs=flashinfer",
        "--routing=zipf",
        "--seed=11",
        "--warmup=2",
        "--iterations=7",
        "--num_trials=4",
        "--cool_down=0.5",
        "--flush=read",
        "--rtol=0.01",
        "--atol=0.02",
        "--required_matched_ratio=0.5",
        "--timer=wall",
    ]
    _, (settings, options, _) = asked(*flags, "--report", "--profile=traces")
    assert set(settings.command().split()) == {"python", "bench_main.py", *flags}
    assert options == (True, False)
    for flag in ("--backend=xla", "--precision=high", "--batch_invariant"):
        assert asked(flag)[1][0].solutions == ("jax_moe",)


def test_options_are_those_of_jax_moe_alone():
    known = registry("xla", precision="high", batch_invariant=True)
    options = {"precision": "high", "batch_invariant": True}
    assert options.items() <= known["jax_moe"].run.keywords.items()
    assert known["jax_moe"].description.endswith("16 bits, the same bits in any batch")
    defaults = {"precision": "fast", "batch_invariant": False}
    assert defaults.items() <= known["jax_moe_xla"].run.keywords.items()
    assert not known["jax_moe_xla_high"].run.keywords["batch_invariant"]


@on_cpu
def test_an_alias_is_its_model_and_a_data_set_is_the_definition_s(asked, capsys, tmp_path):
    assert asked("--model=deepseek-r1")[1][0].model == "deepseek-v3"
    flags = ("--inputs=dataset", f"--dataset={tmp_path}")
    assert asked(*flags)[0] == session.OK
    assert asked(*flags, "--model=kimi-k2")[0] == bench_main.USAGE_ERROR
    shown = capsys.readouterr().err
    assert "--dataset: holds deepseek-v3's routing, got --model=kimi-k2" in shown


@on_cpu
def test_what_is_not_jitted_is_not_timed(asked, capsys):
    with jax.disable_jit():
        assert asked() == (bench_main.USAGE_ERROR, None)
    said = "bench_main.py: JAX_DISABLE_JIT: expected it to be unset, as what is timed is jitted\n"
    assert capsys.readouterr().err == said


@on_cpu
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_random_seed_offset", 7),
        ("jax_threefry_partitionable", False),
        ("jax_transfer_guard", "disallow"),
        ("jax_transfer_guard_host_to_device", "disallow_explicit"),
    ],
)
def test_settings_of_jax_that_change_what_is_measured_are_refused(asked, capsys, name, value):
    """Another draw of a seed would be mixed with the first one by `--resume`."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        assert asked() == (bench_main.USAGE_ERROR, None)
    finally:
        jax.config.update(name, before)
    assert capsys.readouterr().err.startswith(f"bench_main.py: {name.upper()}: expected it to be u")


@on_cpu
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--timer=gpu", "--timer=gpu: needs a GPU, JAX found cpu"),
        ("--inputs=dataset", "--dataset=FOLDER and --inputs=dataset go together"),
        ("--dataset=/tmp", "--dataset=FOLDER and --inputs=dataset go together"),
        (
            "--inputs=dataset --dataset=/tmp --routing=moments",
            "--routing=moments: is of generated inputs, not of --dataset",
        ),
        (
            "--timer=wall --nowall_time",
            "--nowall_time: needs --timer=gpu, needs a GPU, JAX found cpu",
        ),
        ("--dataset=", "--dataset: expected a folder, got an empty name"),
        ("--output=", "--output: expected a folder, got an empty name"),
        ("--profile=", "--profile: expected a folder, got an empty name"),
        ("--workloads=", "--workloads: expected names"),
        ("--solutions=a,,b", "--solutions: expected names"),
        ("--output=~nobody_here/x", "--output: expected a path, got '~nobody_here/x': that"),
        ("--breakdown", "--breakdown: kernel times need --timer=gpu, needs a GPU, JAX found cpu"),
        ("--sustained", "--sustained: needs --timer=gpu, needs a GPU, JAX found cpu"),
        ("--flush=read", "--flush=read: is how a GPU's L2 is emptied; there is no GPU"),
        ("--solutions=jax_moe_xla,jax_v1 --backend=xla", "--backend=xla: is what the solution "),
        ("--solutions=jax_v1 --precision=high", "--precision=high: is what the solution jax_moe"),
        ("--solutions=jax_moe_mosaic_high --batch_invariant", "--batch_invariant=True: is what "),
        ("stray", "unexpected argument 'stray'"),
        ("--num_local_experts=128", "--num_local_experts: expected a divisor of 64 experts, all"),
        ("--layers=2 --ranks=2", "--ranks: reads --output, --overwrite alone, got --layers too"),
        (
            "--layers=2 --workloads=1",
            "--layers: reads --output, --overwrite alone, got --workloads too",
        ),
        (
            "--shared_expert --precision=high",
            "--shared_expert: reads --model, --output, --overwrite alone, got",
        ),
        ("--list --solutions=jax_moe", "--list: reads --backend, --model, --precision, --batch_"),
        ("--layers=2 --output=/proc/foo", "--output: /proc/foo: cannot be used: No such file"),
        ("--shared_expert --output=/proc/foo", "--output: /proc/foo: cannot be used: No such file"),
    ],
)
def test_flags_that_contradict_the_machine_or_each_other(asked, capsys, flag, message):
    code, seen = asked(*flag.split())
    assert (code, seen) == (bench_main.USAGE_ERROR, None)
    shown = capsys.readouterr().err
    assert shown.startswith(f"bench_main.py: {message}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    "flag",
    [
        "--nope",
        "--seed=x",
        "--seed=-1",
        "--seed=2147483648",
        "--rtol=nan",
        "--atol=inf",
        "--required_matched_ratio=1.1",
        "--num_trials=0",
        "--layers=1025",
        f"--layers={10**20}",
        f"--ranks={10**20}",
        "--cool_down=-1",
        "--inputs=other",
        "--timer=sundial",
        "--backend=cuda",
        "--model=gpt-2",
        "--routing=none",
        "--nolist=3",
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(asked, capsys, flag):
    with pytest.raises(SystemExit) as caught:
        asked(flag)
    assert caught.value.code == bench_main.USAGE_ERROR
    shown = capsys.readouterr().err
    assert shown.startswith("bench_main.py: ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_trials=nan", "--num_trials: expected an integer, got 'nan'"),
        ("--seed=a: b\nc", "--seed: expected an integer, got 'a: b\\nc'"),
        ("--atol=", "--atol: expected a number, got ''"),
        ("--report=maybe", "--report: expected true or false, got 'maybe'"),
    ],
)
def test_a_value_of_another_type_is_told_in_our_words(asked, capsys, flag, message):
    with pytest.raises(SystemExit):
        asked(flag)
    assert capsys.readouterr().err == f"bench_main.py: {message}\n"


@on_cpu
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--solutions=foo", "--solutions: unknown solution 'foo'; expected 'all' or some of"),
        ("--workloads=3", "--workloads: unknown workload '3'; expected 'all' or one of the token"),
    ],
)
def test_unknown_names_end_before_anything_is_measured(capsys, tmp_path, flag, message):
    with flagsaver.flagsaver():
        argv = bench_main._parse(["bench_main.py", flag, f"--output={tmp_path / 'out'}"])
        assert bench_main.main(argv) == bench_main.USAGE_ERROR
    shown = capsys.readouterr()
    assert shown.err.startswith(f"bench_main.py: {message}")
    assert not (tmp_path / "out").exists()


@on_cpu
@pytest.mark.parametrize("flag", ["output", "profile"])
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("README.md", "expected a folder, got a file"),
        ("README.md/x", "Not a directory"),
        ("/proc/foo", "No such file or directory"),
        ("/proc", "No such file or directory"),
        ("n" * 300, "File name too long"),
    ],
)
def test_unusable_folders_end_before_anything_is_measured(
    monkeypatch, capsys, tmp_path, flag, path, reason
):
    monkeypatch.setattr(session, "_measure", lambda *_: pytest.fail("measured"))
    with flagsaver.flagsaver():
        # Of two equal flags the last one counts.
        flags = [f"--output={tmp_path}", f"--{flag}={ROOT / path}"]
        argv = bench_main._parse(["bench_main.py", "--workloads=1", *flags])
        assert bench_main.main(argv) == bench_main.USAGE_ERROR
    shown = capsys.readouterr()
    assert shown.err == f"bench_main.py: --{flag}: {ROOT / path}: cannot be used: {reason}\n"
    assert shown.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", backends.NAMES)
def test_our_solutions_state_a_bound_on_their_memory(backend):
    shapes = inputs.specs(14107, FULL)
    with jax_moe.assume_device("sm_90"):
        if reason := backends.unsupported_reason(backend):
            pytest.skip(reason)
        found = registry()[f"jax_moe_{backend}"].workspace_bound(shapes)
        wanted = jax_moe.workspace_bytes(
            14107, num_local_experts=32, hidden_size=7168, intermediate_size=2048, backend=backend
        )
    assert found == wanted


def test_list_names_every_solution_and_says_why_not():
    done = subprocess.run(
        [sys.executable, "bench_main.py", "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    states = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    assert set(states) == set(registry())
    assert all(" available" in line or "not available: " in line for line in states.values())
    if jax.default_backend() != "gpu":
        assert "not available: needs an NVIDIA GPU" in states["jax_moe_mosaic"]
        assert states["jax_moe_xla"].endswith(" available")


@pytest.mark.slow
def test_what_reads_the_list_may_end_first():
    command = [sys.executable, "bench_main.py", "--list"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert "BrokenPipe" not in process.stderr.read()
    assert process.returncode == 128 + 13


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--list", "--help"])
@pytest.mark.parametrize("to", ["/dev/full", "&-"])
def test_output_that_cannot_be_written_is_one_line(flag, to):
    shell = ["bash", "-c", f'exec "$@" >{to}', "bash", sys.executable, "bench_main.py", flag]
    done = subprocess.run(shell, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == (1 if to == "/dev/full" else 0)
    if to == "/dev/full":
        assert done.stderr.endswith("standard output: cannot be written: No space left on device\n")
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
@pytest.mark.timing
def test_a_gpu_run_has_both_clocks_the_roofline_and_one_launch_a_call(tmp_path):
    flags = ["--solutions=jax_moe", "--workloads=80", "--iterations=10", "--num_trials=2"]
    flags += [
        f"--output={tmp_path}",
        f"--profile={tmp_path / 'traces'}",
        "--breakdown",
        "--sustained",
    ]
    command = [sys.executable, "bench_main.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == session.OK, done.stdout[-2000:] + done.stderr[-2000:]
    content = json.loads((tmp_path / "results.json").read_text())
    rows = {row["solution"]: row for row in content["rows"]}
    ours = rows["jax_moe"]
    assert (ours["status"], ours["launches"], ours["gpu"]["n"]) == ("PASS", 1, 20)
    assert 0 < ours["busy_us"] <= ours["gpu"]["median"] < ours["wall"]["median"]
    assert 0 < ours["figures"]["unpromoted_fraction"] < 1
    assert ours["figures"]["speedup"] > 1
    for one in rows.values():  # both frameworks' streams
        for reading in (one["clock"], one["sustained"]):
            assert 500 < reading["sm_mhz"] < 2500
            assert reading["us"] > 0.5 * one["busy_us"]
            assert reading["power_capped"] in (True, False)
    names = " ".join(kernel["name"] for kernel in ours["kernels"])
    assert "up_projection" in names
    assert "down_projection" in names
    assert 1e12 < content["roofline"]["read_bytes_per_s"] < 1e13
    assert content["gpu_state_after"]["temperature.gpu"]
    assert (tmp_path / "traces" / "jax_moe_T80.json.gz").stat().st_size > 1000
