"""Measures tilings for known models on this GPU: `python -m jax_moe.tune --model kimi-k2`.

For each model and each set of kernels that runs here one table is written, into the user's cache
folder, where the kernels find it, or into `--folder`.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from jax_moe import models
from jax_moe.device import no_device
from pallas_kernels import device, interruption
from pallas_kernels.tuning import command
from pallas_kernels.tuning.search import Sizes

KERNELS = ("mosaic", "triton")
"""The sets of kernels that have tables."""


def sizes_of(model: models.Model, num_local_experts: int | None = None) -> Sizes:
    """What is measured for a model: one rank, its routing uniform over all experts."""
    return Sizes(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_experts=model.num_experts,
        num_local_experts=num_local_experts or model.num_local_experts,
        top_k=model.top_k,
    )


def main(argv: list[str]) -> int:
    """Runs the command line; returns 0, or 1 if a table could not be made."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_moe.tune",
        description="Measures tilings for known models on this GPU.",
    )
    parser.add_argument(
        "--model", nargs="+", default=["deepseek-v3"], help=f"some of {', '.join(models.names())}"
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument(
        "--num-local-experts", type=command.positive, help="of a rank; default: the model's"
    )
    command.add_options(parser)
    args = parser.parse_args(argv)
    try:
        chosen = [models.get(name) for name in args.model]
    except ValueError as error:
        parser.error(f"argument --{error}")
    for model in chosen:
        if wrong := command.unfit(sizes_of(model, args.num_local_experts)):
            parser.error(f"{wrong} ({model.name})")
    if args.generation and args.folder is None:
        parser.error(f"argument --generation: {command.GENERATION}")
    try:
        gpu = device.local_gpu()
    except (AssertionError, RuntimeError) as error:
        print(f"jax_moe.tune: {no_device(error)}", file=sys.stderr)
        return 1
    if gpu is None:
        print(f"jax_moe.tune: {command.NO_GPU}", file=sys.stderr)
        return 1
    failed = False
    for model in chosen:
        for kernels in args.kernels:
            print(f"{kernels}, {model.name}", flush=True)
            tuner = importlib.import_module(f"pallas_kernels.{kernels}.tune").tuner
            sizes = sizes_of(model, args.num_local_experts)
            failed |= bool(command.run("jax_moe.tune", tuner, sizes, command.options_of(args)))
    return int(failed)


if __name__ == "__main__":
    interruption.exit_with(lambda: main(sys.argv[1:]))
