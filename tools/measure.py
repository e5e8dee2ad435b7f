"""Makes most figures of `results/` again on this machine's GPU, a step per kind.

    python -m tools.measure --list
    python -m tools.measure --output out/measured bench options layers
    python -m tools.measure --output out/measured --minutes 9     # all, as far as they get

Steps that are done in the folder are left out, so the same command goes on where it ended. Each
writes into a folder of its own name; device, versions, commit and method stand in what it writes.
Compare figures of one step only: cards differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import environment, run_folder, step_record
from bench.commands import folder
from bench.failures import FileError
from bench.steps import Step, run_all
from interop import folder_lock
from interop.arguments import folder_name, positive_finite
from pallas_kernels import interruption

_PEERS = "deepgemm64,deepgemm128,deepgemm_mega,flashinfer_cutlass,sglang_v2,torch_reference"
_FACTORS = "sglang_v1_native_quant,sglang_v1_zero_copy_swiglu,sglang_v1_small_workspace"
_BENCH = "bench_main.py --nowall_time --jobs=12 --num_trials=1 --iterations=20 --resume --output={}"
_OURS_AND_DEEPGEMM = "--solutions=jax_moe_mosaic,deepgemm64,deepgemm128"
_TOKENS = "--scaling --workloads=1,16,64,256,1024,4096,16384"
_MODELS = {
    "kimi-k2": ("", ""),
    "glm-5": ("", ""),
    "qwen3-235b": ("", ""),
    "qwen3-30b": (" --num_local_experts=128", " --num-local-experts 128"),  # all fit one GPU
    "minimax-m2": ("", ""),
}


class Kind(NamedTuple):
    """One kind of figure.

    Attributes:
        command: Arguments of Python; `{}` is the step's folder.
        seconds: After which it is killed.
        what: In a line.
    """

    command: str
    seconds: float
    what: str

    def arguments(self, folder: Path) -> list[str]:
        """Those of Python, for a step that writes into `folder`."""
        return [part.replace("{}", str(folder)) for part in self.command.split()]


KINDS: dict[str, Kind] = {
    "bench": Kind(
        f"{_BENCH} --solutions=jax_moe_mosaic,jax_moe_mosaic_high,{_PEERS} --breakdown --sustained",
        560,
        "the 19 workloads: ours and the peers, with clocks, floors and kernels",
    ),
    "options": Kind(
        "-m bench.options --workloads=all --jobs=12 --overwrite --output={}",
        560,
        "what routers, scale formats, precision and batch invariance cost",
    ),
    "layers": Kind("-m bench.layers --overwrite --output={}", 400, "61 layers in one scan"),
    "shared_expert": Kind(
        "-m bench.shared_expert --overwrite --output={}",
        400,
        "what the shared expert adds to its layer",
    ),
    "loading": Kind(
        "-m bench.loading --overwrite --output={}", 200, "experts from disk to the GPU"
    ),
    "scaling": Kind(
        f"{_BENCH} --solutions=jax_moe_mosaic,{_PEERS} --scaling", 560, "T = 1, 2, 4 ... 16384"
    ),
    "ladder": Kind("-m examples.ladder --overwrite --output={}", 300, "the eight levels"),
    "one_rank": Kind(
        "-m bench.parallel --ranks=1 --tokens=64,4096 --overwrite --output={}",
        200,
        "expert_parallel of one rank beside apply",
    ),
    "local_work": Kind(
        "-m bench.parallel --local-of=4,8,16 --tokens=8,128,1024,4096 --overwrite --output={}",
        300,
        "what a rank of 4, 8 and 16 does with all ranks' tokens",
    ),
    "compile": Kind(
        "-m bench.compile_times --overwrite --output={}/compile_times.json",
        300,
        "first call of a shape",
    ),
    "factors": Kind(
        f"{_BENCH} --solutions=sglang_v1,{_FACTORS},sglang_v2,torch_reference --report",
        560,
        "what helped sglang_v2 most, by regime",
    ),
    **{
        f"tune_{name}": Kind(
            f"-m jax_moe.tune --model {name} --kernels mosaic --generation --folder {{}}{of_rank}",
            560,
            f"tilings for a rank of {name}",
        )
        for name, (_, of_rank) in _MODELS.items()
    },
    **{
        f"model_{name}": Kind(
            f"{_BENCH} --model={name} {_OURS_AND_DEEPGEMM} {_TOKENS}{of_rank}",
            400,
            f"one rank of {name}",
        )
        for name, (of_rank, _) in _MODELS.items()
    },
    "tests": Kind("-m tools.gpu_tests {} --overwrite", 560, "make test-gpu"),
}
"""By name, the most telling first."""


def steps_of(names: Sequence[str], folder: Path) -> list[Step]:
    """The steps of some kinds.

    Args:
        names: Of `KINDS`, in their order; none means all.
        folder: Above the steps' own folders.

    Raises:
        ValueError: A name is unknown; the message lists what there is.
    """
    for name in names:
        if name not in KINDS:
            raise ValueError(f"unknown step {name!r}; expected some of {', '.join(KINDS)}")
    return [
        Step(name, KINDS[name].arguments(folder / name), KINDS[name].seconds)
        for name in dict.fromkeys(names or KINDS)
    ]


def done(folder: Path) -> set[str]:
    """Names of the steps that ended well in a folder."""
    lines = step_record.read(folder).values()
    return {line["step"] for line in lines if line["state"] == step_record.OK}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.measure")
    parser.add_argument("steps", nargs="*", help="which; all if none is named")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    parser.add_argument("--minutes", type=positive_finite, default=600, help="for all of them")
    parser.add_argument("--output", type=folder_name, default="out/measured")
    args = parser.parse_args(argv)
    try:
        steps = steps_of(args.steps, args.output)
        if args.list:
            for step in steps:
                print(f"{step.name:18}{KINDS[step.name].what}; at most {step.seconds:.0f} s")
            return 0
        if not args.steps and not environment.has_gpu_driver():
            raise ValueError("needs an NVIDIA GPU; steps that are named run at reduced sizes")
        output = folder(str(args.output))  # made where there is something to measure
        run_folder.refuse_others(output, (step_record.RECORD,))
        step_record.refuse_others(output, KINDS)
        with folder_lock.held(output):
            finished = done(output)
            left = [one for one in steps if one.name not in finished]
            for step in left:
                if "{}/" in KINDS[step.name].command:  # a file, whose command expects its folder
                    run_folder.make("--output", output / step.name)
            return run_all(left, output, args.minutes)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --output: {error}")
    except FileError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    interruption.exit_with(main)
