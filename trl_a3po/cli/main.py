"""The command line, `trl-a3po`. It imports a command only when that command is called."""

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from .. import __version__


# By command: its module and its description.
COMMANDS = {
    "train": ("train", "train a model with A3PO: `trl grpo` with the shaping"),
    "eval": ("eval", "evaluate a model: avg@k, pass@k and maj@k, with 95 %% intervals"),
    "compare": ("compare", "compare evaluated models: which is better, by how much, and how certain that is"),
    "report": ("report", "write one HTML file with the metrics of runs, and with completions if `log_tokens` was set"),
    "demo": ("demo", "train a tiny model on arithmetic, on a CPU, and show what it learned"),
}


def exit_status(codes: Sequence[int], what: str) -> int:
    """
    The exit status of a command for those of its processes.

    Args:
        codes (`list[int]`): One or more that are not 0. A negative one is that of a signal.
        what (`str`): What the processes did, for the message about a signal.
    """
    if 2 in codes:  # a process has reported a mistake in the options
        return 2
    if codes[0] < 0:
        number = -codes[0]
        hint = " The machine may have run out of memory." if number == signal.SIGKILL else ""
        print(f"error: {signal.Signals(number).name} ended the {what}.{hint}", file=sys.stderr)
        return 128 + number
    return codes[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        arguments (`list[str]`, *optional*): The words of the line, by default those of the program.

    Returns:
        `int`: the exit status: that of the command, 130 if it was interrupted, or 141 if nobody reads its output.
    """
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
    command = parser.parse_args(arguments[:1]).command
    module, _ = COMMANDS[command]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may have characters that the terminal has not
    try:
        status = importlib.import_module(f"trl_a3po.cli.{module}").main(arguments[1:])
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more when it ends
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"\ntrl-a3po {command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
