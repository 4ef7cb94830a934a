"""Write a report on one or more runs: `trl-a3po report RUN_DIR [RUN_DIR ...]`."""

import argparse
import sys
from pathlib import Path

from ..report.findings import as_text
from ..report.page import write_page
from ..report.run import ReportError, read_run
from ..report.text import names_of, visible


def main(arguments: list[str] | None = None) -> int:
    """
    The command line.

    Args:
        arguments (`list[str]`, *optional*): The words of the line, by default those of the program.

    Returns:
        `int`: the exit status: 0, or 2 if there is nothing to report.
    """
    parser = argparse.ArgumentParser(
        prog="trl-a3po report",
        description="Print what is wrong with runs, and what to change. Write one HTML file: the metrics of all runs "
        "in the same charts, and completions token by token if the run had `log_tokens` set.",
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="`output_dir` of a run")
    parser.add_argument("--output", type=Path, help="file to write (default: report.html)")
    parser.add_argument(
        "--tokens", action="store_true", help="print the completions of one prompt in the terminal instead; needs rich"
    )
    parser.add_argument("--step", type=int, help="with --tokens: the step to print (default: the last)")
    parsed = parser.parse_args(arguments)
    if parsed.step is not None and not parsed.tokens:
        parser.error("--step needs --tokens")
    if parsed.output is not None and parsed.tokens:
        parser.error("--tokens prints, and writes no file: leave out --output")
    try:
        if parsed.tokens:
            for run_dir in parsed.run_dirs:
                _print_tokens(run_dir, parsed.step)
        else:
            runs = [read_run(run_dir) for run_dir in parsed.run_dirs]
            names = names_of(parsed.run_dirs)
            try:
                path = write_page(runs, parsed.output or Path("report.html"))
            finally:  # also if no page can be written
                for name, run in zip(names, runs, strict=True):
                    print(as_text(visible(name), run.findings))
            print(f"Report: {path}")
    except BrokenPipeError:
        raise
    except (ReportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _print_tokens(run_dir: Path, step: int | None) -> None:
    try:
        from rich.console import Console

        from ..report.terminal import print_tokens
    except ImportError as error:
        raise ReportError("`--tokens` needs rich. Install it: pip install rich") from error
    completions = read_run(run_dir, None if step is None else [step]).completions
    if not completions and step is not None and (others := read_run(run_dir).completions):
        steps = sorted({each.step for each in others})
        raise ReportError(
            f"'{run_dir}' has no logged completions of step {step}. It has some from step {steps[0]} to {steps[-1]}, "
            f"for example of {min(steps, key=lambda each: abs(each - step))}."
        )
    if not completions:
        raise ReportError(
            f"'{run_dir}' has no logged completions. Set `log_tokens` in A3POConfig. Only completions with a non-zero "
            "advantage are logged."
        )
    last = [each for each in completions if each.step == completions[-1].step]
    of_one_prompt = [each for each in last if (each.group, each.prompt) == (last[0].group, last[0].prompt)]
    print_tokens(of_one_prompt, Console())
