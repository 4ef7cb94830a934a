"""Compare evaluations of several models on the same problems: `trl-a3po compare DIR DIR [DIR ...]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.compare import compare, markdown, read_result
from ..evaluation.page import write_page
from ..report.page import check_page
from ..report.text import names_of


def main(arguments: Sequence[str] | None = None) -> int:
    """
    The command line.

    Args:
        arguments (`Sequence[str]`, *optional*): Words of the command line; by default those of the program.

    Returns:
        `int`: the exit status: 0, or 2 if there is nothing to compare.
    """
    parser = argparse.ArgumentParser(
        prog="trl-a3po compare",
        description="Compare evaluations on the problems that both have. Print the paired difference of each "
        "evaluation from the first, with a 95 % bootstrap interval over distinct problems. Write an HTML "
        "file, which also shows the problems that the models solve differently.",
    )
    parser.add_argument("directories", metavar="DIR", nargs="+", type=Path, help="`output_dir` of `trl-a3po eval`")
    parser.add_argument(
        "--output", type=Path, default=Path("comparison.html"), help="file to write (default: comparison.html)"
    )
    parsed = parser.parse_args(arguments)
    if len(parsed.directories) < 2:
        parser.error("pass at least two directories")
    try:
        compare_directories(parsed.directories, parsed.output)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def compare_directories(directories: Sequence[Path], output: Path) -> None:
    """
    Writes the page, and prints the comparison, also if no page can be written.

    Raises:
        `OSError`, `ValueError`: there is nothing to compare, or no page can be written there.
    """
    check_page(output)
    names = names_of(directories)
    results = [read_result(directory, name) for directory, name in zip(directories, names, strict=True)]
    pairs = [compare(results[0], other) for other in results[1:]]
    try:
        path = write_page(results, pairs, output)
    finally:
        print(f"\n{markdown(results, pairs)}")
    print(f"\nwritten to {path}")
