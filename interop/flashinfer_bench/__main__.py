"""Command line of the package; see its docstring."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from interop import interruption
from interop.flashinfer_bench import record, run
from jax_moe.io.files import shown


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
        except OSError as error:  # a full disk, mostly
            text, code = f"{shown(error.filename or arguments.folder)}: {error.strerror}", 1
    print(text, file=sys.stderr)
    return code


def _dispatch(arguments: argparse.Namespace, extra: list[str]) -> int:
    folder = Path(arguments.folder).expanduser()
    # Each command imports what it alone needs: safetensors, tqdm or matplotlib.
    if arguments.command == "export":
        from interop.flashinfer_bench.export import export

        print(export(folder, dataset=_folder(arguments.dataset), seed=arguments.seed))
    elif arguments.command == "run":
        settings = record.Settings(*(getattr(arguments, n) for n in record.Settings._fields))
        return run.run(folder, settings, tokens=_tokens(arguments.tokens), extra=extra)
    elif arguments.command == "workspace":
        from interop.flashinfer_bench import workspace

        print(workspace.measure(folder))
    else:
        from interop.flashinfer_bench.report import report

        print(report(folder, _folder(arguments.output)))
    return 0


def _folder(name: str | None) -> Path | None:
    return None if name is None else Path(name).expanduser()


def _tokens(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--tokens: expected token counts such as 1,7,80, got {text!r}")
    return [int(part) for part in parts]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m interop.flashinfer_bench")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "export": "write definition, 19 workloads, routing blobs and solutions",
        "run": "run flashinfer-bench on the folder; unknown options are passed on to it",
        "workspace": "measure each solution's peak temporary memory for the report (GPU)",
        "report": "write the published document from the folder's traces",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("folder", metavar="DIR")
        if name == "export":
            command.add_argument("--dataset", help="flashinfer-trace folder with the real blobs")
            command.add_argument("--seed", type=int, default=0, help="of the stand-in blobs")
        elif name == "run":
            for field, value in record.PUBLISHED._asdict().items():
                flag = f"--{field.replace('_', '-')}"
                command.add_argument(flag, type=type(value), default=value, help=f"default {value}")
            command.add_argument("--tokens", default="", help="only these token counts, 1,7,...")
        elif name == "report":
            command.add_argument("--output", help="folder of the document, default DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
