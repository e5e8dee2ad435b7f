"""The tools that `make` runs before there is an environment."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from interop import folder_lock
from interop.checkout import git_commit
from tools import check_pins, flashinfer_module, gpu_tests, readme_examples

UNWRITTEN = "standard output: cannot be written: No space left on device\n"
ROOT = pathlib.Path(__file__).parent.parent


def executable(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def find_python(tmp_path: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the finder with nothing on PATH but the system's tools and `tmp_path`/bin."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "env"):
        target = pathlib.Path("/usr/bin", name)
        (tools / name).symlink_to(target if target.exists() else pathlib.Path("/bin", name))
    return subprocess.run(
        [ROOT / "tools/find_python.sh"],
        env={"PATH": f"{tmp_path}/bin:{tools}", "HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
    )


def test_a_shim_that_fails_is_passed_over(tmp_path):
    """As with pyenv: python3.12 is on PATH, and fails when it is called."""
    executable(tmp_path / "bin/python3.12", 'echo "pyenv: python3.12: command not found"; exit 127')
    executable(tmp_path / "bin/python3", f'exec "{sys.executable}" "$@"')
    done = find_python(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sys.executable


def test_pyenv_versions_are_found(tmp_path):
    pyenv = tmp_path / "elsewhere"
    executable(pyenv / "versions/3.12.7/bin/python3.12", f'exec "{sys.executable}" "$@"')
    done = find_python(tmp_path, PYENV_ROOT=str(pyenv))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sys.executable


def test_no_python_is_one_clear_line(tmp_path):
    executable(tmp_path / "bin/python3", "exit 1")
    done = find_python(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Python >= 3.12" in done.stderr


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1", "everything: it does not run Python"),
        (f'exec "{sys.executable}" -I -S "$@"', "needs Python 3.12 or newer with the package"),
    ],
)
def test_a_python_for_the_gpu_tests_that_lacks_all_is_told_so(tmp_path, script, reason):
    for name in ("tools", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    python = executable(tmp_path / "bare/python", script)
    done = subprocess.run(
        ["bash", "tools/gpu_python.sh", "-c", "print()"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert "no interpreter here holds the packages" in first
    assert reason in second


def test_a_named_python_that_does_not_work_is_an_error(tmp_path):
    executable(tmp_path / "bin/python3", f'exec "{sys.executable}" "$@"')
    done = find_python(tmp_path, PYTHON=str(executable(tmp_path / "old/python", "exit 1")))
    assert done.returncode == 1
    assert "old/python" in done.stderr


def test_this_environment_satisfies_the_pins():
    requirements = check_pins.project_requirements(["triton", "torch", "bench", "dev"])
    assert list(check_pins.problems(requirements, deep=False)) == []


def test_the_default_environment_is_of_one_version_in_the_ranges_of_the_extras():
    pinned = {}
    for line in (check_pins.PYPROJECT.parent / "tools/developed_with.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[name] = version.replace("*", "0")
    asked = check_pins.project_requirements(["cuda13", "triton", "torch"])
    ranges = {one.name: one.specifier for one in map(Requirement, asked) if one.name in pinned}
    assert ranges.keys() == pinned.keys() == {"jax", "jax-triton", "torch", "triton"}
    assert all(ranges[name].contains(version) for name, version in pinned.items())
    makefile = (check_pins.PYPROJECT.parent / "Makefile").read_text()
    assert f"DEVELOPED_WITH := {pinned['jax']}\n" in makefile


@pytest.mark.parametrize(
    ("requirement", "line"),
    [
        ("no-such-package>=1", "jax-moe needs no-such-package>=1; it is not installed"),
        ("numpy<1", "jax-moe needs numpy<1; got "),
    ],
)
def test_a_missing_or_wrong_package_is_named(requirement, line):
    (problem,) = check_pins.problems([requirement], deep=False)
    assert problem.startswith(line)


def test_requirements_for_other_platforms_are_left_out():
    assert list(check_pins.problems(["no-such-package; sys_platform == 'win32'"], deep=True)) == []


def test_unknown_extra_is_named():
    with pytest.raises(SystemExit, match="'cuda99'"):
        check_pins.project_requirements(["cuda99"])


def test_what_is_no_requirement_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_pins.py", "--also", "!!"])
    with pytest.raises(SystemExit):
        check_pins.main()
    assert "argument --also: expected a requirement such as" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["none.md", ""])
def test_what_is_no_document_is_one_line(tmp_path, name):
    with pytest.raises(SystemExit, match=r"^document: expected a Markdown file, got '/.*'"):
        readme_examples.main(str(tmp_path / name))


def test_a_document_without_examples_is_told_from_one_whose_examples_run(tmp_path, capsys):
    document = tmp_path / "page.md"
    document.write_text("```bash\nls\n```\n")
    assert readme_examples.main(str(document)) == 1
    assert "expected a `python` block that a `text` block follows, got none" in (
        capsys.readouterr().out
    )


def test_an_example_whose_output_nobody_reads_is_no_traceback(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("```python\nprint(1)\n```\n```text\n1\n```\n")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, readme_examples.__file__, document]
    with open("/dev/full", "w") as full, open(writer, "w") as unread:
        for output, expected in ((full, (1, UNWRITTEN)), (unread, (141, ""))):
            done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
            assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (str(ROOT / "README.md"), "README.md: cannot be used: expected a folder, got a file"),
        ("/proc/x", "RESULTS_FOLDER: /proc/x: cannot be used: No such file"),
        ("", "RESULTS_FOLDER: expected a folder, got an empty name"),
    ],
)
def test_a_folder_that_the_gpu_tests_cannot_write_to_is_one_line(capsys, folder, said):
    assert gpu_tests.main([folder]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_gpu_tests_without_pytest_are_one_line_and_make_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_tests.environment, "lacking_packages", list)
    assert gpu_tests.main([str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith("python -m tools.gpu_tests: needs pytest ")
    assert not (tmp_path / "new").exists()
    pytest_is_hidden = "import sys; sys.modules['pytest'] = None; import tools.gpu_tests"
    subprocess.run([sys.executable, "-c", pytest_is_hidden], cwd=ROOT, check=True)


def test_parts_of_the_gpu_tests(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(gpu_tests, "run_pytest", lambda markers, *_: ran.append(markers) or 3)
    for part, markers in (("parallel", "gpu and not timing"), ("timing", "gpu and timing")):
        assert gpu_tests.main([str(tmp_path), "-q", "--only", part, "--overwrite"]) == 3
        assert ran.pop() == markers
    assert gpu_tests.main([str(tmp_path), "--only", "fast"]) == 2
    assert "expected one of parallel, timing, got 'fast'" in capsys.readouterr().err
    assert not ran


def test_an_earlier_run_of_the_gpu_tests_is_replaced_only_when_asked(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(gpu_tests, "run_pytest", lambda *_: ran.append(1) or 3)
    for name in ("summary.json", "progress.jsonl", "results.json"):
        path = tmp_path / name
        path.write_text("kept")
        assert gpu_tests.main([str(tmp_path)]) == 2
        assert f"{tmp_path} holds {name} of an" in capsys.readouterr().err
        assert path.read_text() == "kept"
        path.unlink()
    assert gpu_tests.main([str(tmp_path), "--resume", "--overwrite"]) == 2
    assert not ran
    with folder_lock.held(tmp_path):
        assert gpu_tests.main([str(tmp_path)]) == 2
    assert "another run is writing here" in capsys.readouterr().err


def test_gpu_tests_take_no_option_for_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert gpu_tests.main(["--help"]) == 0
    assert "gpu_tests RESULTS_FOLDER --resume" in capsys.readouterr().out
    assert gpu_tests.main(["--resume"]) == 2
    assert capsys.readouterr().err.startswith("usage: python -m tools.gpu_tests RESULTS_FOLDER")
    assert not list(tmp_path.iterdir())


def test_gpu_tests_go_on_where_they_were_cut_off(tmp_path):
    suite = tmp_path / "test_three.py"
    suite.write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken():\n    yield\n    raise RuntimeError\n"
        "def test_good(): pass\ndef test_bad(): assert False\ndef test_after(broken): pass\n"
    )
    progress, leave_out = tmp_path / "progress.jsonl", tmp_path / "passed_before.txt"
    assert gpu_tests.begin(progress, resume=False) == []

    def run(*processes):
        options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "-p", "tools.gpu_progress"]
        files = [f"--progress={progress}", f"--leave-out={leave_out}", f"--rootdir={tmp_path}"]
        command = [sys.executable, "-m", "pytest", *options, *files, *processes, suite]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout

    leave_out.write_text("")
    assert "1 failed, 2 passed, 1 error" in run("-n", "2")
    with progress.open("a") as file:
        file.write('{"test": "test_three.py::test_cut_o')
    assert gpu_tests.begin(progress, resume=True) == ["test_three.py::test_good"]
    leave_out.write_text("test_three.py::test_good\n")
    assert "1 failed, 1 passed, 1 deselected, 1 error" in run()


def test_gpu_tests_of_another_commit_are_not_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_tests, "run_pytest", lambda *_: pytest.fail("ran"))
    assert gpu_tests.main([str(tmp_path), "--resume"]) == 2
    assert "--resume: expected " in capsys.readouterr().err
    (tmp_path / "progress.jsonl").write_text('{"commit": "older"}\n')
    assert gpu_tests.main([str(tmp_path), "--resume"]) == 2
    assert "got one of older" in capsys.readouterr().err
    (tmp_path / "progress.jsonl").write_text("")  # as a full disk left it
    assert gpu_tests.main([str(tmp_path), "--resume"]) == 2
    assert "progress.jsonl: damaged: expected a commit first" in capsys.readouterr().err


def test_check_pins_says_that_its_lines_cannot_be_written():
    command = [sys.executable, check_pins.__file__, "--also=no-such-package"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, UNWRITTEN)


def test_gpu_tests_on_a_full_disk_are_one_line(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gpu_tests, "write_atomically", full)
    assert gpu_tests.main([str(tmp_path)]) == 1
    said = f"{tmp_path / 'progress.jsonl'}: cannot be written: No space left on device\n"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())


def test_gpu_outcome_counts_and_names_failures(tmp_path):
    suite = tmp_path / "test_two.py"
    suite.write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    junit = tmp_path / "junit.xml"
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--junitxml={junit}"]
    subprocess.run([sys.executable, "-m", "pytest", *options, suite], capture_output=True)
    outcome = gpu_tests.outcome(junit)
    assert (outcome["tests"], outcome["failures"], outcome["skipped"]) == (2, 1, 0)
    assert outcome["failed"] == ["test_two::test_bad"]


def test_without_flashinfer_no_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(flashinfer_module.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="--package: expected a folder, as flashinfer is not inst"):
        flashinfer_module.main([f"--output={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="2"):
        flashinfer_module.main(["--output=~nobody_here/x"])


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--jobs=0", "--jobs: expected a positive integer, got 0"), ("--jobs=1", "No such file or ")],
)
def test_what_flashinfers_module_cannot_be_built_with_is_named(tmp_path, capsys, argument, said):
    """Such as a package without its sources."""
    places = [f"--{name}={tmp_path}" for name in ("package", "tvm_ffi", "output")]
    with pytest.raises(SystemExit, match="2"):
        flashinfer_module.main([*places, argument])
    assert said in capsys.readouterr().err


def test_flashinfers_module_is_cut_to_one_pair_of_types(tmp_path, monkeypatch):
    """The files, their compilers and what is cut; the compilers themselves are not run."""
    backend = tmp_path / "flashinfer/data/csrc/fused_moe/cutlass_backend"
    backend.mkdir(parents=True)
    (backend / "flashinfer_cutlass_fused_moe_binding.cu").write_text(
        '#include "../../tvm_ffi_utils.h"\n    // keep consistent with cpp/tensorrt_llm/plugins\n'
        "    half\n    if (!mKernelRunner) {\n"
    )
    instantiation = backend / "cutlass_fused_moe_instantiation.cu"
    instantiation.write_text(
        "template class CutlassMoeFCRunner<float, float>;\n}  // namespace tensorrt_llm\n"
    )
    commands = []

    def run(command, check):
        assert check
        commands.append(command)
        pathlib.Path(command[command.index("-o") + 1]).touch()

    monkeypatch.setattr(subprocess, "run", run)
    places = tmp_path / "flashinfer", tmp_path / "cuda", tmp_path / "tvm_ffi", tmp_path / "out"
    library = flashinfer_module.build(*places, jobs=2)
    assert library.name == "fused_moe_90.so"
    *compiled, stub, link = commands
    assert len(compiled) == 14
    for command in compiled:
        source = pathlib.Path(command[command.index("-c") + 1])
        assert command[0] == ("c++" if source.suffix == ".cpp" else f"{tmp_path}/cuda/bin/nvcc")
    assert link[-1] == str(library)
    assert stub[-1] in link
    assert sum(argument.endswith(".o") for argument in link) == 14
    cut = (tmp_path / "out/binding.cu").read_text()
    assert "half" not in cut
    assert "CutlassMoeFCRunner<__nv_bfloat16, __nv_fp8_e4m3>>()" in cut
    assert "<float" not in (tmp_path / "out/instantiation.cu").read_text()

    commands.clear()
    flashinfer_module.build(*places, jobs=1)
    assert len(commands) == 2, "what is compiled is kept"
    instantiation.write_text("another version")
    with pytest.raises(ValueError, match=r"--package: expected a source with .*, got none"):
        flashinfer_module.build(*places, jobs=1)


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    """Within a hook git names another repository; a copy may lie within one."""
    monkeypatch.delenv("GIT_COMMIT", raising=False)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=a@b"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "one")
    inside = tmp_path / "copy"
    inside.mkdir()
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") != ""
    assert git_commit(inside) == "unknown"
    here = git_commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert git_commit() == here != git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_COMMIT", "a copy's")  # names the code that runs, and no other checkout
    assert git_commit() == git_commit(ROOT) == "a copy's"
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
