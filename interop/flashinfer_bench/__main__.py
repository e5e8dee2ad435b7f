"""Command line of the package; see its docstring."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interop import definitions
from interop.arguments import comma_separated, finite, folder_name, natural, positive, share
from interop.flashinfer_bench import record, run, solutions
from jax_moe.io.files import shown
from pallas_kernels import interruption


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the commands; returns its exit status, 2 for bad input."""
    arguments, extra = _parser().parse_known_args(argv)
    if extra and arguments.command != "run":
        _parser().error(f"unknown arguments: {' '.join(extra)}")
    with interruption.remembered():
        try:
            return _dispatch(arguments, [text for text in extra if text != "--"])
        except KeyboardInterrupt:
            text = f"{arguments.command}: interrupted; files are as they were or whole"
            code = interruption.acknowledge()
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            text = f"{arguments.command}: needs the package {package} of the extra bench"
            code = 1
        except ValueError as error:
            text, code = str(error), 2
        except BrokenPipeError:  # what reads the output has ended
            raise
        except OSError as error:  # a full disk, mostly; of the output it is no `OSError`
            text, code = f"{shown(error.filename or arguments.folder)}: {error.strerror}", 1
    print(text, file=sys.stderr)
    return code


def _dispatch(arguments: argparse.Namespace, extra: list[str]) -> int:
    if arguments.command == "list":
        print(_listed())
        return 0
    folder: Path = arguments.folder
    # Each command imports what it alone needs: safetensors, tqdm or matplotlib.
    if arguments.command == "export":
        from interop.flashinfer_bench.export import export, export_each

        _check_export(arguments)
        options: dict[str, Any] = {
            "dataset": arguments.dataset,
            "seed": arguments.seed or 0,
            "overwrite": arguments.overwrite,
        }
        if arguments.definitions is None:
            print(export(folder, **options))
        else:
            names = _definitions(arguments.definitions)
            print(*export_each(folder, names, **options), sep="\n")
        return 0
    output: Path | None = getattr(arguments, "output", None)
    if not (several := _data_sets(folder)):
        return _dispatch_one(arguments, extra, folder, output)
    code = 0
    for one in several:  # what one lacks keeps no other from its turn
        try:
            done = _dispatch_one(arguments, extra, one, output and output / one.name)
        except ValueError as error:
            print(error, file=sys.stderr)
            done = 2
        code = max(code, done)
    return code


def _dispatch_one(
    arguments: argparse.Namespace, extra: list[str], folder: Path, output: Path | None
) -> int:
    if arguments.command == "run":
        settings = record.Settings(*(getattr(arguments, n) for n in record.Settings._fields))
        tokens, chosen = _tokens(arguments.tokens), arguments.solutions
        return run.run(folder, settings, tokens=tokens, chosen=chosen, extra=extra)
    if arguments.command == "workspace":
        from interop.flashinfer_bench import workspace

        print(workspace.measure(folder))
    else:
        from interop.flashinfer_bench.report import report

        print(report(folder, output))
    return 0


def _check_export(arguments: argparse.Namespace) -> None:
    """Refuses a seed that nothing is drawn from, and a data set in one that `run` takes whole.

    Raises:
        ValueError: Names the flag or the folder.
    """
    folder, names = arguments.folder, arguments.definitions
    if arguments.seed is not None:
        if arguments.dataset is not None:
            raise ValueError("--seed: is of stand-ins, got --dataset too")
        if names is not None and not {"all", definitions.DEFAULT.name} & set(_definitions(names)):
            raise ValueError(f"--seed: draws nothing of --definitions={names}")
    if names is not None and (folder / "workloads").exists():
        raise ValueError(f"{shown(folder)}: holds a data set; --definitions needs another folder")
    if names is None and _data_sets(folder):
        raise ValueError(f"{shown(folder)}: holds data sets of --definitions; use another folder")


def _data_sets(folder: Path) -> list[Path]:
    """The data sets that `export --definitions` left in a folder; none if it is one itself."""
    if (folder / "workloads").exists():
        return []
    found = [folder / one.name for one in definitions.ALL]
    return [one for one in found if (one / "workloads").is_dir()]


def _listed() -> str:
    lines = [
        f"{one.name}\n    {one.weight_bytes / 1e9:.1f} GB of weights; {one.source}"
        for one in definitions.ALL
    ]
    return "\n".join(lines)


def _tokens(text: str | None) -> list[int]:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--tokens: expected token counts such as 1,7,80, got {text!r}")
    return [int(part) for part in parts]


def _definitions(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        try:
            _ = name == "all" or definitions.get(name)
        except ValueError as error:
            raise ValueError(f"--definitions: {error}") from None
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m interop.flashinfer_bench")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "list": "list the definitions that can be exported, and where each was read",
        "export": "write definition, workloads, routing blobs and solutions",
        "run": "run flashinfer-bench on the folder; unknown options are passed on to it",
        "workspace": "measure each solution's peak temporary memory for the report (GPU)",
        "report": "write the published document from the folder's traces",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "list":
            continue
        command.add_argument("folder", metavar="DIR", type=folder_name)
        if name == "export":
            command.add_argument(
                "--definitions", help="names from `list`, or all: a data set each, DIR/NAME"
            )
            command.add_argument(
                "--dataset", type=folder_name, help="flashinfer-trace folder with the real blobs"
            )
            command.add_argument("--seed", type=natural, help="of the stand-in blobs; default 0")
            command.add_argument(
                "--overwrite", action="store_true", help="replace an export with other blobs"
            )
        elif name == "run":
            for field, value in record.PUBLISHED._asdict().items():
                flag = f"--{field.replace('_', '-')}"
                kind = positive if isinstance(value, int) else finite
                kind = share if field == "required_matched_ratio" else kind
                command.add_argument(flag, type=kind, default=value, help=f"default {value}")
            command.add_argument("--tokens", help="only these token counts, 1,7,...")
            command.add_argument(
                "--solutions",
                type=comma_separated,
                default=(),
                help=f"only these, by name; without it {solutions.HIGH} is left out",
            )
        elif name == "report":
            command.add_argument(
                "--output", type=folder_name, help="folder of the document, default DIR"
            )
    return parser


if __name__ == "__main__":
    interruption.exit_with(main)
