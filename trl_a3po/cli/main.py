"""The command line, `trl-a3po`: one command after another is imported when it is called."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__


if TYPE_CHECKING:
    from trl import TrlParser


# The module of each command, and what it does.
COMMANDS = {
    "train": ("train", "train a model with A3PO: `trl grpo` with the shaping"),
    "eval": ("eval", "avg@k, pass@k and maj@k of a model, with intervals"),
    "compare": ("compare", "which of several evaluated models is better, by how much, how sure"),
    "report": ("report", "one HTML file of what runs logged, token by token where they did"),
    "demo": ("demo", "train a tiny model on arithmetic, on a CPU, and show what it learned"),
}


def parser_of(command: str, description: str | None, dataclasses: list[Any]) -> "TrlParser":
    """The parser of a command whose options are the fields of dataclasses."""
    from trl import TrlParser  # takes seconds

    return TrlParser(
        dataclasses,
        prog=f"trl-a3po {command}",
        usage=f"trl-a3po {command} [--config FILE] [options]",
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
    )


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """With defaults, and the description as it stands."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="trl-a3po",
        description="A3PO as a drop-in replacement for TRL's GRPOTrainer.",
        epilog="`trl-a3po COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    module, _ = COMMANDS[parser.parse_args(arguments[:1]).command]
    return importlib.import_module(f"trl_a3po.cli.{module}").main(arguments[1:])
