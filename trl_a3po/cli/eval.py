r"""
Evaluate a model on problems with checkable answers. Report avg@k, pass@k and maj@k with 95 % intervals.

  trl-a3po eval --model_name_or_path gsm8k-a3po --dataset_name openai/gsm8k --dataset_config main --output_dir scores

The defaults are the evaluation settings of the A3PO authors' scripts: 8 samples at temperature 0.6, top-p 0.95. Every
completion is kept in `samples.jsonl`. To resume an interrupted evaluation, run the same command again. `trl-a3po
compare` compares the results of several models.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..evaluation.metrics import check_math_verify
from ..evaluation.problems import check_parseable, load_problems
from ..evaluation.runs import EvaluateArguments, estimates, evaluate, first_problems
from ..evaluation.worked_examples import check_no_overlap, load_worked_examples
from ..report.text import counted
from ..training.checkpoint_files import PREVIOUS, check_writable, checkpoints_in, is_marked, is_of_later_run
from .compare import compare_directories
from .main import exit_status
from .parser import Parser


NAMED = 5


def make_parser() -> Parser:
    return Parser("eval", __doc__, [EvaluateArguments])


def main(line: Sequence[str] | None = None) -> int:
    """
    Evaluates a model, or each checkpoint of a run.

    Args:
        line (`list[str]`, *optional*): The words of the line, by default those of the program.

    Returns:
        `int`: the exit status: 0, 2 if the options or their files are wrong, or that of a checkpoint that failed.
    """
    line = list(sys.argv[1:] if line is None else line)
    parser = make_parser()
    try:
        (arguments,) = parser.parse_args_and_config(line)
        check_math_verify()
        examples = []
        if arguments.worked_examples is not None:
            examples = load_worked_examples(arguments.worked_examples, arguments.instruction)
        problems = load_problems(
            arguments.dataset_name, arguments.dataset_split, arguments.dataset_config, arguments.instruction, examples
        )
        if arguments.max_problems is not None:
            problems = first_problems(problems, arguments.max_problems)
        check_no_overlap(problems, examples, "to evaluate on")
        check_writable(Path(arguments.output_dir))
        with _sigterm_raises():
            if arguments.checkpoints:
                return evaluate_checkpoints(Path(arguments.model_name_or_path), Path(arguments.output_dir), line)
            check_parseable(problems, "evaluation", "do not count")
            results = evaluate(arguments, problems, worked_examples=examples)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(lines_of(results)))
    print(f"\nwritten to {Path(arguments.output_dir) / 'results.json'}")
    return 0


def evaluate_checkpoints(run: Path, output: Path, line: Sequence[str]) -> int:
    """
    Evaluates each checkpoint of a run in its own process, so that all memory is freed, and shows the curve.

    Returns:
        `int`: 0, or the exit status of a checkpoint that could not be evaluated. The others are still evaluated.

    Raises:
        `ValueError`: the run has no complete checkpoint.
    """
    found = [path for path in reversed(checkpoints_in(run)) if path.suffix != PREVIOUS]
    complete = [path for path in found if not is_marked(path)]
    if not complete:
        raise ValueError(f"'{run}' contains no complete checkpoint.")
    # Those of a run that was here before: the present one has written a lower step after them.
    earlier = [
        path
        for number, path in enumerate(complete)
        if any(is_of_later_run(lower, path) for lower in complete[:number])
    ]
    if earlier:
        names = ", ".join(path.name for path in earlier)
        print(f"left out, because an earlier run in '{run}' wrote them: {names}")
        complete = [path for path in complete if path not in earlier]
    status, results = 0, []
    for checkpoint in complete:
        directory = output / checkpoint.name
        own = ["--checkpoints", "False", "--model_name_or_path", str(checkpoint), "--output_dir", str(directory)]
        print(f"\n{checkpoint}", flush=True)
        code = _run([sys.executable, "-m", "trl_a3po.cli", "eval", *line, *own])
        if code:
            code = exit_status([code], "evaluation")
        status = status or code
        results += [] if code else [directory]
    if len(results) > 1:
        compare_directories(results, output / "comparison.html")
    return status


def _run(command: Sequence[str]) -> int:
    """The exit status of a process. If this one is interrupted, the other ends first, and tidies up."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """In this context, SIGTERM ends what was started, and temporary files are removed."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield  # somebody else decides
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def lines_of(results: dict[str, Any]) -> list[str]:
    """The lines that the terminal shows of `results.json`."""
    samples = results["samples_per_problem"]
    of_each = f"{counted(results['problems'], 'problem')}, {counted(samples, 'sample')} of each"
    lines = ["", f"{of_each}; mean and 95 % interval over problems"]
    lines += [f"{name:<10} {value}" for name, value in estimates(results).items()]
    lines.append(f"{results['mean_tokens']:.0f} tokens a completion; {results['reached_the_end']:.1%} reached an end")
    if results["rows"] > results["problems"]:
        lines.append(f"{results['rows']} rows: rows with the same prompt are one problem with more samples")
    if examples := results["settings"]["worked_examples"]:
        lines.append(f"{counted(examples['count'], 'worked example')} before each problem")
    kwargs, source = results["settings"]["chat_template_kwargs"], results["chat_template_kwargs_from"]
    lines.append(f"chat_template_kwargs: {kwargs} ({source})")
    lines += uncounted(results)
    if several := results["problems_with_several_solutions"]:
        lines.append(f"with different solutions in their rows: {counted(several, 'problem')}")
    return lines


def uncounted(results: dict[str, Any]) -> list[str]:
    """The lines on rows that were not sampled or do not count."""
    lines = []
    if skipped := results["rows_not_sampled"]:
        lines.append(f"not sampled, and counted as unsolved: {counted(len(skipped), 'row')}")
        lines += [f"  row {row}: {reason}" for row, reason in list(skipped.items())[:NAMED]]
    if unparsed := results["rows_without_a_parseable_solution"]:
        rows = ", ".join(map(str, unparsed[:NAMED])) + (", ..." if len(unparsed) > NAMED else "")
        number = counted(len(unparsed), "row")
        lines.append(f"not counted, because math-verify cannot parse the solution: {number} ({rows})")
    return lines
