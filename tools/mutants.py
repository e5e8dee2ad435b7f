"""Changes the code in many small ways, one at a time, and says which changes no test notices.

    make mutants                       # 300 of them; what a run has judged stays judged
    make mutants ARGS="--count 30"
    make mutants ARGS=--again          # survivors that are not explained, with today's tests

cosmic-ray makes the changes (another operator, another number, a condition turned round), in a copy
of the checkout under `out/mutants/tree`. Each is judged by the tests of its module alone. A change
that makes them fail or hang is killed; one that survives is a test that is missing, or changes
nothing that anybody could see: `EXPLAINED` in `tests/mutants_explained.py` says why.

Changes inside annotations are left out: nothing evaluates them.
"""

import argparse
import ast
import collections
import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels import interruption
from tools.mutants_report import Explanations, Mutant, Verdict, applied, report, unexplained

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "out" / "mutants"
AGAIN = FOLDER / "again"
SEED, COUNT = 20261129, 300
TIMEOUT_S = 240.0
_UNCHANGED = "JAX_MOE_MUTANTS_OF"  # where the unchanged files are, for the test command
_JUDGE = (str(ROOT / ".venv" / "bin" / "python"), "-m", "tools.mutants", "--judge")

_INTERPRETED = "test_kernels_interpreted.py::"
MODULES: dict[str, tuple[str, ...]] = {
    "jax_moe/router.py": ("test_routing.py", "test_options.py"),
    "pallas_kernels/scores.py": ("test_scores.py", "test_routing.py"),
    "pallas_kernels/mosaic/routing.py": (
        _INTERPRETED + "test_routing",
        "test_routing.py::test_lanes_past_the_last_expert_are_never_chosen",
        "test_routing.py::test_the_interpreted_kernel_gives_the_ids_of_the_plain_backend",
        "test_many_experts.py",
    ),
    "pallas_kernels/mosaic/plan.py": (
        "test_many_experts.py::test_a_plan_takes_little_shared_memory",
        _INTERPRETED + "test_plan",
        "test_many_experts.py",
    ),
    "pallas_kernels/mosaic/group_quant.py": (
        _INTERPRETED + "test_group_quant_bits",
        _INTERPRETED + "test_a_row_of_a_group_for_each_warp_is_quantized_without_copies",
        _INTERPRETED + "test_group_quant_by_powers_of_two",
        _INTERPRETED + "test_up_projection",
    ),
    "pallas_kernels/mosaic/unpermute.py": (
        _INTERPRETED + "test_combine",
        _INTERPRETED + "test_outputs_are_jax_arrays",
        "test_zero_rows.py",
    ),
    "bench/correctness.py": ("test_bench_correctness.py",),
    "bench/timers.py": ("test_bench_timing.py", "test_bench_execution.py"),
    "interop/dlpack.py": ("test_interop_dlpack.py",),
    "jax_moe/validate.py": ("test_validate.py",),
    "jax_moe/scalars.py": ("test_scalars.py", "test_validate.py"),
}
"""What is changed, and what of `tests/` judges it, as pytest's ids, the quickest first."""


def annotations(source: str) -> set[tuple[int, int]]:
    """Lines and columns inside annotations of a module's functions and variables."""
    found: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(source)):
        parts = []
        if isinstance(node, ast.AnnAssign | ast.arg):
            parts.append(node.annotation)
        if isinstance(node, ast.FunctionDef):
            parts.append(node.returns)
        if isinstance(node, ast.TypeAlias):
            parts.append(node.value)
        for part in filter(None, parts):
            first = (part.lineno, part.col_offset)
            last = (part.end_lineno or part.lineno, part.end_col_offset or 0)
            for line in range(first[0], last[0] + 1):
                start = first[1] if line == first[0] else 0
                end = last[1] if line == last[0] else 1000
                found |= {(line, column) for column in range(start, end)}
    return found


def drawn(mutants: Iterable[Mutant], count: int, seed: int, root: Path = ROOT) -> list[Mutant]:
    """`count` of the mutants outside of annotations, the same ones for the same seed."""
    hidden = {name: annotations((root / name).read_text()) for name in MODULES}
    able = sorted(m for m in mutants if (m.line, m.column) not in hidden[m.module])
    keys = sorted({m[:3] for m in able})  # a place may be listed twice: it is one change
    chosen = set(random.Random(seed).sample(keys, min(count, len(keys))))
    return [m for m in able if m[:3] in chosen]


def prepare(count: int, seed: int) -> None:
    """Copies the checkout and has cosmic-ray list the mutants, unless an earlier run did."""
    session = FOLDER / "session.sqlite"
    if session.exists():
        check_drawn(json.loads((FOLDER / "drawn.json").read_text()), count, seed)
        return
    _copy_checkout(FOLDER)
    what = {"count": count, "seed": seed, "commit": _git_commit()}
    (FOLDER / "drawn.json").write_text(json.dumps(what))
    config = FOLDER / "config.toml"
    config.write_text(
        "[cosmic-ray]\n"
        f"module-path = {json.dumps(list(MODULES))}\n"
        f"timeout = {TIMEOUT_S}\n"
        "excluded-modules = []\n"
        f"test-command = {json.dumps(' '.join(_JUDGE))}\n"
        '[cosmic-ray.distributor]\nname = "local"\n'
    )
    unfinished = FOLDER / "unfinished.sqlite"
    _cosmic_ray("init", "--force", str(config), str(unfinished))
    with _database(unfinished) as database:
        keep = {m.job for m in drawn(_listed(database), count, seed)}
        others = [one.job_id for one in database.work_items if one.job_id not in keep]
        _skip(database, others)
    unfinished.rename(session)  # from here on a run resumes


def check_drawn(drawn: dict[str, Any], count: int, seed: int) -> None:
    """Ends the program if what an earlier run drew is not what is asked for."""
    if (drawn["count"], drawn["seed"]) != (count, seed):
        sys.exit(
            f"make mutants: {FOLDER} holds a run with --count {drawn['count']} --seed "
            f"{drawn['seed']}; go on with these, or remove the folder"
        )


def _git_commit() -> str:
    sys.path.insert(0, str(ROOT))
    from interop.checkout import git_commit

    return git_commit()


def _copy_checkout(folder: Path) -> None:
    """Copies the tracked files to `folder/tree`, after emptying the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, files.split("\0")):
        _copy(ROOT / name, folder / "tree" / name)
    for name in MODULES:
        _copy(ROOT / name, folder / "unchanged" / name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def restore(folder: Path = FOLDER) -> None:
    """Takes back the change that a run was at when it was ended: it would fail all tests after."""
    for name in MODULES:
        _copy(folder / "unchanged" / name, folder / "tree" / name)


def check_unchanged(folder: Path = FOLDER, modules: Iterable[str] = MODULES) -> None:
    """Runs the tests on the unchanged code, once: what fails there would kill every mutant."""
    passed = folder / "passed"
    if passed.exists():
        return
    if _judged(folder, modules):
        sys.exit("make mutants: the tests fail on the unchanged code, so they judge nothing")
    passed.touch()


def _judged(folder: Path, modules: Iterable[str] = ()) -> int:
    """The status of the tests in a folder's tree, of these modules if none is changed there."""
    limit = () if modules else ("timeout", str(TIMEOUT_S))
    command, tree = (*limit, *_JUDGE, *modules), folder / "tree"
    return subprocess.run(command, cwd=tree, env=_environment(folder), check=False).returncode


def _environment(folder: Path = FOLDER) -> dict[str, str]:
    return os.environ | {_UNCHANGED: str(folder / "unchanged"), "JAX_PLATFORMS": "cpu"}


def _cosmic_ray(*arguments: str) -> None:
    subprocess.run(
        [str(Path(sys.executable).with_name("cosmic-ray")), *arguments],
        cwd=FOLDER / "tree",
        env=_environment(),
        check=True,
    )


def _database(path: Path) -> Any:
    from cosmic_ray.work_db import WorkDB, use_db

    return use_db(str(path), WorkDB.Mode.open)


def _listed(database: Any) -> list[Mutant]:
    found = []
    for item in database.work_items:
        (change,) = item.mutations
        line, column = change.start_pos
        name = Path(change.module_path).as_posix()
        found.append(
            Mutant(name, change.operator_name, change.occurrence, line, column, item.job_id)
        )
    return found


def _skip(database: Any, jobs: Sequence[str]) -> None:
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    database.set_multiple_results(jobs, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def verdicts(path: Path) -> list[Verdict]:
    """What the session knows about the mutants that were drawn."""
    with _database(path) as database:
        results = dict(database.results)
        found = []
        for mutant in _listed(database):
            result = results.get(mutant.job)
            if result is None:
                found.append(Verdict(mutant, ""))
            elif result.worker_outcome.name != "SKIPPED":
                outcome = result.test_outcome.name.lower() if result.test_outcome else "killed"
                found.append(Verdict(mutant, outcome, result.diff or ""))
        return sorted(found)


def judge_again(survivors: Sequence[Verdict]) -> None:
    """Makes the changes that survive in a copy of today's code; today's tests judge them."""
    commit, outcomes = _git_commit(), _again()
    left = [one for one in survivors if outcomes.get(one.mutant.job, {}).get("commit") != commit]
    if not left:
        return
    _copy_checkout(AGAIN)
    check_unchanged(AGAIN, dict.fromkeys(one.mutant.module for one in left))
    for one in left:
        path = AGAIN / "tree" / one.mutant.module
        source = applied(path.read_text(), one)
        if source is None:
            continue
        path.write_text(source)
        outcome = "killed" if _judged(AGAIN) else "survived"
        restore(AGAIN)
        outcomes[one.mutant.job] = {"outcome": outcome, "commit": commit}
        (FOLDER / "again.json").write_text(json.dumps(outcomes, indent=1))


def _explanations() -> Explanations:
    sys.path.insert(0, str(ROOT))
    from tests.mutants_explained import EXPLAINED

    return EXPLAINED


def judged_last(found: Iterable[Verdict]) -> list[Verdict]:
    """The verdicts, newer ones in place of those of the session."""
    again = _again()
    return [
        one._replace(outcome=again[one.mutant.job]["outcome"]) if one.mutant.job in again else one
        for one in found
    ]


def _again() -> dict[str, Any]:
    """Outcome and commit of what was judged again, by job."""
    path = FOLDER / "again.json"
    return json.loads(path.read_text()) if path.exists() else {}


def judge(modules: Iterable[str] = ()) -> int:
    """What cosmic-ray runs in the copy: the tests of the one module that is changed there.

    Args:
        modules: Those whose tests to run where none is changed; all, if none is named.

    Returns:
        pytest's status.
    """
    original = Path(os.environ[_UNCHANGED])
    tree = Path.cwd()
    changed = [
        name for name in MODULES if (tree / name).read_bytes() != (original / name).read_bytes()
    ]
    tests = dict.fromkeys(test for name in changed or modules or MODULES for test in MODULES[name])
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not gpu and not slow"]
    command += ["-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)]
    return subprocess.run(command, cwd=tree, check=False).returncode


def _from(least: int) -> Callable[[str], int]:
    """The type of an argument that is an integer; that of `interop` would need JAX here."""

    def checked(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            expected = f"expected an integer of {least} or more, got {text!r}"
            raise argparse.ArgumentTypeError(expected)
        return int(text)

    return checked


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants")
    parser.add_argument("--count", type=_from(1), default=COUNT, help="mutants to draw")
    parser.add_argument("--seed", type=_from(0), default=SEED, help="of the draw")
    parser.add_argument("--again", action="store_true", help="judge only what survived before")
    parser.add_argument("--judge", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.judge is not None:
        return judge(args.judge)
    if importlib.util.find_spec("cosmic_ray") is None:
        sys.exit("python -m tools.mutants: needs cosmic-ray: `make mutants` installs and runs it")
    with _alone():
        return _run(args.count, args.seed, args.again)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Ends the program if another run is at work in the folder, which it may empty and change."""
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with FOLDER.with_name(f".{FOLDER.name}.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"python -m tools.mutants: another run is at work in {FOLDER}")
        yield


def _run(count: int, seed: int, again: bool) -> int:
    prepare(count, seed)
    session = FOLDER / "session.sqlite"
    try:
        if again:
            judge_again(unexplained(judged_last(verdicts(session)), _explanations()))
        else:
            restore()
            check_unchanged()
            _cosmic_ray("exec", str(FOLDER / "config.toml"), str(session))
    finally:
        write_report(verdicts(session), f"{_versions()}, seed {seed}")
    return 0


def _versions() -> str:
    """Of what changes the code and of what the tests run on."""
    code = "from importlib.metadata import version; print(version('jax'))"
    jax = subprocess.run([_JUDGE[0], "-c", code], capture_output=True, text=True, check=True).stdout
    changer = importlib.metadata.version("cosmic-ray")
    return f"Python {sys.version.split()[0]}, jax {jax.strip()}, cosmic-ray {changer}"


def write_report(found: Sequence[Verdict], how: str) -> None:
    """Writes both files; what was judged again counts as it was judged last."""
    commit = json.loads((FOLDER / "drawn.json").read_text())["commit"]
    about = f"Commit {commit}, {how}."
    commits = collections.Counter(again["commit"] for again in _again().values())
    if commits:
        survived = sum(one.outcome == "survived" for one in found)
        by_commit = ", ".join(f"{commit} {count}" for commit, count in commits.items())
        about += (
            f" Of the {survived} that survived, code and tests of later commits judged again: "
            f"{by_commit}."
        )
    found = judged_last(found)
    (FOLDER / "mutants.md").write_text(report(found, _explanations(), about))
    rows = [one.mutant._asdict() | {"outcome": one.outcome} for one in found]
    (FOLDER / "mutants.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    print(f"wrote {FOLDER / 'mutants.md'}")


if __name__ == "__main__":
    interruption.exit_with(main)
