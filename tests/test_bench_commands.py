"""The commands beside `bench_main.py`: bad arguments end before anything is measured."""

from __future__ import annotations

import errno
import importlib
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys

import pytest

from bench import (
    commands,
    environment,
    layers,
    loading,
    option_rows,
    options,
    parallel,
    parallel_rows,
    shared_expert,
)
from pallas_kernels import interruption
from tests.test_repository import ROOT

EXAMPLES = (  # that of DeepSeek needs transformers, and is in test_end_to_end.py
    *sorted((ROOT / "examples").glob("*_layer.py")),
    *sorted((ROOT / "examples/ladder").glob("level_*.py")),
)
AT_MOST = "expected a positive integer of at most %d"
NEEDS = {"equinox_layer": "equinox", "linen_layer": "flax"}
COMMANDS = ("layers", "loading", "options", "parallel", "parallel_gpus", "shared_expert")


def refused(capsys, command, *arguments):
    """What a command says of its arguments."""
    if command == "loading" and (lacking := environment.lacking_packages(loading.NEEDED)):
        pytest.skip(f"it asks first for {', '.join(lacking)}")
    module = command if "." in command else f"bench.{command}"
    with pytest.raises(SystemExit) as raised:
        importlib.import_module(module).main(list(arguments))
    assert raised.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("", "expected a folder, got an empty name"),
        (ROOT / "README.md", "cannot be used: expected a folder, got a file"),
        (ROOT / "README.md/x", "cannot be used: Not a directory"),
        ("~nobody_here/x", "expected a path, got '~nobody_here/x': that user has no home"),
        ("link", "link: cannot be used: expected a folder, got a link to nothing"),
        ("loop", "loop: cannot be used: expected a folder, got a link that loops"),
    ],
)
def test_folders_that_cannot_be_written_to(capsys, monkeypatch, tmp_path, command, folder, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    said = refused(capsys, command, f"--output={folder}")
    assert said.startswith("argument --output: ")
    assert reason in said


@pytest.mark.parametrize(
    ("command", "argument", "said"),
    [
        ("options", "--variants=", "argument --variants: expected names separated by commas, go"),
        ("options", "--workloads=1,", "argument --workloads: expected names separated by commas"),
        ("options", "--jobs=-1", "argument --jobs: expected 0 or a positive integer, got '-1'"),
        ("loading", "--scratch=", "argument --scratch: expected a folder, got an empty name"),
        ("parallel", "--exchanges=pigeon", "--exchanges: expected some of auto, collectives, "),
        ("parallel", "--routings=", "--routings: expected some of even, captured, zipf, got ''"),
        ("parallel", "--local-of=4 --routings=zipf", "--local-of: reads --tokens, --output, "),
        ("parallel", f"--tokens=1,{10**20}", f"argument --tokens: {AT_MOST % 2**20}, got '1000"),
        ("parallel", f"--ranks={10**20}", f"argument --ranks: {AT_MOST % 256}, got '10000000"),
        ("parallel_gpus", "--ranks=257", f"argument --ranks: {AT_MOST % 256}, got '257'"),
        ("layers", f"--tokens={2**20 + 1}", f"argument --tokens: {AT_MOST % 2**20}, got '1048577"),
        ("layers", f"--layers={10**20}", f"argument --layers: {AT_MOST % 1024}, got '1000000"),
        ("shared_expert", "--tokens=0", f"argument --tokens: {AT_MOST % 2**20}, got '0'"),
        ("parallel_gpus", "--minutes=nan", "argument --minutes: expected a finite number of mo"),
        ("parallel_gpus", "--minutes=-1", "argument --minutes: expected a finite number of mo"),
        ("tests.fuzz", "--minutes=nan", "argument --minutes: expected a finite number of mo"),
        ("tests.fuzz", "--output=/proc/x", "argument --output: /proc/x: cannot be used: No such"),
        ("tests.sanitize", "/proc/x", "argument results: /proc/x: cannot be used: No such file"),
        ("tools.measure", "--output=/proc/x bench", "argument --output: /proc/x: cannot be used"),
        ("tools.measure", "--minutes=nan", "argument --minutes: expected a finite number of mo"),
        ("tools.flashinfer_module", "--package=. --tvm_ffi=. --output=/proc/x", "--output: [Errno"),
        ("examples.ladder.__main__", "--output=/proc/x", "argument --output: /proc/x: cannot be u"),
        ("jax_moe.tune", "--folder=/proc/x", "argument --folder: cannot write there: [Errno 2] "),
        ("jax_moe.tune", "--folder=", "argument --folder: expected a folder, got an empty name"),
        ("jax_moe.tune", "--generation", "argument --generation: expected --folder too; the cache"),
        ("jax_moe.tune", "--folder=/dev/null", "argument --folder: cannot write there: it is no"),
        ("tests.barrier_mutations", "--fast", "unrecognized arguments: --fast"),
        ("tools.compare_ptx", "/nowhere", "argument before: expected the folder of a checkout, "),
        ("tests.h100_target", "tests.nowhere:x", "target: No module named 'tests.nowhere'"),
        ("tests.h100_target", "tests.pairwise:x", "target: module 'tests.pairwise' has no attrib"),
    ],
)
def test_values_that_cannot_be_meant(capsys, monkeypatch, tmp_path, command, argument, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tests.h100_target.prepare_environment", lambda _: None)
    assert refused(capsys, command, *argument.split(" ")).startswith(said)


@pytest.mark.parametrize(
    ("command", "argument"), [("options", "--variants=no"), ("shared_expert", "--model=no")]
)
def test_a_refusal_leaves_no_folder(capsys, tmp_path, command, argument):
    assert refused(capsys, command, argument, f"--output={tmp_path / 'new/one'}")
    assert not (tmp_path / "new").exists()


def test_documents_are_made_of_what_is_there(capsys, tmp_path):
    module = importlib.import_module("bench.parallel_gpus")
    assert module.main(["--documents", "--only=check", f"--output={tmp_path}"]) == 2
    assert "--documents: reads --output alone, got --only too" in capsys.readouterr().err


@pytest.mark.parametrize(("names", "got"), [("", "''"), ("pigeon,nvlink,x", "'pigeon', 'x'")])
def test_exchanges_that_do_not_exist_are_named(capsys, names, got):
    assert refused(capsys, "parallel", f"--exchanges={names}").endswith(
        f"collectives, nvlink, got {got}"
    )


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_loading_without_a_package_is_one_line_and_makes_nothing(monkeypatch, tmp_path, package):
    monkeypatch.setattr(loading, "NEEDED", {package: package, "json": "json"})
    monkeypatch.setitem(sys.modules, package, None)  # its import fails
    with pytest.raises(SystemExit) as raised:
        loading.main([f"--output={tmp_path / 'new'}"])
    assert raised.value.code == f"python -m bench.loading: needs {package}: pip install {package}"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_answers_help_and_takes_nothing_else(capsys, monkeypatch, path):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    # This process listens as it did: an example stays deaf to what its parent had it ignore.
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    for argument, code in (("--help", 0), ("--halp", 2)):
        monkeypatch.setattr(sys, "argv", [path.name, argument])
        with pytest.raises(SystemExit) as raised:
            runpy.run_path(str(path), run_name="__main__")
        assert raised.value.code == code
        shown = capsys.readouterr()
        assert (shown.out + shown.err).startswith(f"usage: {path.name} [-h]")
        assert "arguments: --halp" in shown.err or not code


@pytest.mark.parametrize(("name", "package"), [*NEEDS.items(), ("deepseek_end_to_end", "torch")])
def test_an_example_without_its_package_is_one_line(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)  # its import fails
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)  # as above
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert re.fullmatch(rf"{name}\.py: .*{package}.*: pip install .*", str(raised.value.code))


def test_a_folder_without_a_compiler_is_not_passed_over(capsys):
    said = refused(capsys, "tests.h100_target", "tests.pairwise:x", "--cuda-bin=~/nowhere")
    assert said.endswith(f"expected a folder with ptxas in it, got '{pathlib.Path.home()}/nowhere'")
    assert refused(capsys, "tools.compare_ptx", ".", ".", "--tokens=1,x").startswith(
        "argument --tokens: expected token counts such as 1,80"
    )
    said = refused(capsys, "tools.compare_ptx", ".", ".", "--cache=/proc/x")
    assert said == "--cache: [Errno 2] No such file or directory: '/proc/x'"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_line_and_its_exit_code(capsys, number, code):
    before = signal.getsignal(number)
    assert interruption.ended(lambda: signal.raise_signal(number)) == code
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(number) is before
    assert interruption.ended(lambda: 3) == 3


ENDING = """
import atexit, os, signal
from pallas_kernels import interruption
atexit.register(os.abort)  # stands for a thread of JAX that Python's end makes crash
interruption.exit_with(lambda: print("rows") or signal.raise_signal(signal.SIGTERM))
"""


def test_nothing_can_crash_after_a_signal():
    done = subprocess.run([sys.executable, "-c", ENDING], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "rows\n", "interrupted\n")


@pytest.mark.parametrize(
    ("command", "is_quiet"),
    [
        (["python", "-m", "bench.options", "--jobs=2"], True),
        (["python", "-X", "dev", "-m", "bench.layers"], True),
        (["python", "-m", "benchmarks.mine"], False),
        (["python", "serve.py", "bench.options"], False),
        (["python", "-m", "pytest", "-m", "not gpu"], False),
    ],
)
def test_a_signal_while_a_command_is_imported_just_ends_it(monkeypatch, command, is_quiet):
    """And no program that is not ours."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "orig_argv", command)
    try:
        interruption.before_imports("bench")
        now = signal.getsignal(signal.SIGINT)
        assert now is (signal.SIG_DFL if is_quiet else signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_block_inside_of_another_forgets_no_signal(capsys):
    def command():
        with interruption.remembered():
            signal.raise_signal(signal.SIGTERM)

    assert interruption.ended(command) == 143


def test_what_reads_the_output_may_end_first():
    command = [sys.executable, "-m", "interop.flashinfer_bench", "list"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        done = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


UNWRITTEN = "standard output: cannot be written: No space left on device\n"
LARGE = "from pallas_kernels import interruption as i; i.exit_with(lambda: print('x' * 10**6))"


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "interop.flashinfer_bench", "list"),
        ("-m", "jax_moe.tune", "--help"),
        ("-c", LARGE),
    ],
)
@pytest.mark.parametrize("to", ["/dev/full", "&-"])
def test_output_that_cannot_be_written_is_one_line(command, to):
    """And a closed one is nobody's wish to read it."""
    shell = ["bash", "-c", f'exec "$@" >{to}', "bash", sys.executable, *command]
    done = subprocess.run(shell, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    expected = (1, UNWRITTEN) if to == "/dev/full" else (0, "")
    assert (done.returncode, done.stderr) == expected


FLOORS = (
    *("bench.layers", "interop.flashinfer_bench", "jax_moe.tune", "pallas_kernels.mosaic.tune"),
    *("tools.measure", "tools.gpu_tests", "tests.fuzz"),
)


@pytest.mark.parametrize("command", ["bench_main.py", *(f"-m {name}" for name in FLOORS)])
def test_outside_of_the_environment_a_command_is_one_line(command):
    """Without the installed packages (`-S`) there is no JAX."""
    run = [sys.executable, "-S", *command.split()]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"(bench_main\.py|python -m [a-z_.]+): needs jax.*\n", done.stderr)


def test_a_file_that_cannot_be_written_is_not_said_to_be_the_output(tmp_path):
    with pytest.raises(FileNotFoundError):
        interruption.ended(lambda: (tmp_path / "no" / "file").write_text("text") and 0)


def test_a_command_may_end_by_itself(capsys):
    assert interruption.ended(lambda: sys.exit(2)) == 2
    assert interruption.ended(lambda: sys.exit()) == 0
    assert interruption.ended(lambda: sys.exit("results.json: cannot be written")) == 1
    assert capsys.readouterr().err == "results.json: cannot be written\n"


FOLDER = ("parallel.json", "parallel.png")


def write_results(output, *, overwrite=False, rows="new", plot=True, refused=False):
    with commands.results(output, "out/parallel", FOLDER, overwrite=overwrite) as folder:
        if refused:
            raise ValueError("--ranks")
        parallel_rows.write([], {"rows": rows}, folder / FOLDER[0])
        if not plot:
            raise KeyboardInterrupt
        (folder / FOLDER[1]).write_text("plot")
    return folder


def rows_in(folder):
    return json.loads((folder / FOLDER[0]).read_text())["about"]["rows"]


def test_a_folder_holds_the_results_of_one_run(tmp_path):
    folder = write_results(tmp_path)
    said = "holds parallel.json, parallel.png of an earlier run; --overwrite replaces it"
    with pytest.raises(ValueError, match=f"^--output: .* {said}"):
        write_results(tmp_path, rows="second")
    with pytest.raises(ValueError, match="--ranks"):
        write_results(tmp_path, rows="second", overwrite=True, refused=True)
    assert rows_in(folder) == "new"
    assert (folder / FOLDER[1]).read_text() == "plot"
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path, rows="second", overwrite=True, plot=False)
    assert [path.name for path in tmp_path.iterdir()] == ["parallel.json"]  # no plot of other rows
    with commands.results(tmp_path, "", FOLDER, overwrite=True):
        with pytest.raises(ValueError, match="another run is writing here"):
            write_results(tmp_path, overwrite=True)
        assert rows_in(folder) == "second"
    with pytest.raises(ValueError, match=r"holds parallel\.json of another command; expected a fo"):
        commands.results(tmp_path, "", ("layers.json",), overwrite=True).__enter__()


@pytest.mark.parametrize(
    ("module", "write", "name"),
    [
        (layers, lambda folder: layers.write([], {}, folder), "layers.json"),
        (shared_expert, lambda folder: shared_expert.write([], {}, folder), "shared_expert.json"),
        (option_rows, lambda folder: option_rows.write([], {}, folder, 1), "options.json"),
        (parallel_rows, lambda f: parallel_rows.write([], {}, f / FOLDER[0]), FOLDER[0]),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, module, write, name):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(SystemExit) as raised, commands.results(tmp_path, "", FOLDER):
        write(tmp_path)
    assert raised.value.code == f"{tmp_path / name}: cannot be written: {os.strerror(errno.ENOSPC)}"


TIMED = layers.Row("one", 3, 7, wall_us=12.5)
LOADED = {"bytes": 1, "seconds": {"load": [0.0125]}, "medians": {"load": 0.0125}, "share": None}


@pytest.mark.parametrize(
    ("module", "argument", "found"),
    [
        (options, "--variants=softmax", option_rows.Row("route", "softmax", 7, us=12.5)),
        (layers, "--tokens=7", layers.Measured(TIMED, None)),
        (shared_expert, "--tokens=7", shared_expert.Row(7, without_us=12.5)),
        (parallel, "--tokens=7", [parallel_rows.Row(1, 7, "collectives", layer_us=12.5)]),
        (loading, "--scratch=.", LOADED),
    ],
)
def test_what_was_measured_is_shown_on_a_full_disk(
    tmp_path, monkeypatch, capsys, module, argument, found
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(json, "dump", full)
    monkeypatch.setattr(environment, "lacking_packages", lambda *_: [])
    monkeypatch.setattr(module, "measure", lambda *_, **__: found)
    for made in ("answer", "make_layer", "write_checkpoint", "devices_for"):  # not needed
        monkeypatch.setattr(module, made, lambda *_: None, raising=False)
    with pytest.raises(SystemExit) as raised:
        module.main([argument, f"--output={tmp_path / 'out'}"])
    path = tmp_path / "out" / module.FILES[0]
    assert raised.value.code == f"{path}: cannot be written: No space left on device"
    assert capsys.readouterr().out.count("12.5") == 1
    assert not (tmp_path / "out").exists()


def test_other_errors_of_the_system_are_not_said_to_be_of_the_results(tmp_path):
    with pytest.raises(FileNotFoundError), commands.results(tmp_path, "", FOLDER):
        (tmp_path / "nowhere").read_text()


def test_results_without_a_folder_get_one_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = write_results(None), write_results(None, rows="second")
    assert first != second
    assert first.parent == second.parent == pathlib.Path("out/parallel")
    assert rows_in(first.parent / "latest") == "second"
    with (
        pytest.raises(ValueError, match="nothing measured"),
        commands.results(None, "out/parallel", FOLDER),
    ):
        raise ValueError("nothing measured")
    assert len(list(first.parent.iterdir())) == 3
    with pytest.raises(ValueError, match="--overwrite: goes with --output=FOLDER"):
        write_results(None, overwrite=True)
