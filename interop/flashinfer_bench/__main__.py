"""Command line of the package; see its docstring."""

import argparse
import sys
from collections.abc import Sequence

from interop.flashinfer_bench import record, run
from interop.flashinfer_bench.export import export
from interop.flashinfer_bench.report import report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the commands; returns its exit status, 2 for bad input."""
    arguments, extra = _parser().parse_known_args(argv)
    if extra and arguments.command != "run":
        _parser().error(f"unknown arguments: {' '.join(extra)}")
    try:
        return _dispatch(arguments, [text for text in extra if text != "--"])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _dispatch(arguments: argparse.Namespace, extra: list[str]) -> int:
    folder = arguments.folder
    if arguments.command == "export":
        print(export(folder, dataset=arguments.dataset, seed=arguments.seed))
    elif arguments.command == "run":
        settings = record.Settings(*(getattr(arguments, n) for n in record.Settings._fields))
        tokens = [int(text) for text in arguments.tokens.split(",") if text]
        return run.run(folder, settings, tokens=tokens, extra=extra)
    elif arguments.command == "workspace":
        from interop.flashinfer_bench import workspace

        print(workspace.measure(folder))
    else:
        print(report(folder, arguments.output))
    return 0


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
