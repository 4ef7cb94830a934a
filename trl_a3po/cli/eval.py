r"""
Evaluate a model on problems with checkable answers: avg@k, pass@k and maj@k, each with its interval.

  trl-a3po eval --model_name_or_path gsm8k-a3po --dataset_name openai/gsm8k --dataset_config main --output_dir scores

The defaults are the evaluation settings of the A3PO authors' scripts: 8 samples at temperature 0.6, top-p 0.95. Every
completion is kept in `samples.jsonl`; the same command, run again, goes on where it was interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trl import TrlParser

from ..evaluation.evaluate import EvaluateArguments, evaluate, transformers_sampler, vllm_sampler
from ..evaluation.problems import load_problems
from .main import parser_of


def make_parser() -> TrlParser:
    return parser_of("eval", __doc__, [EvaluateArguments])


def main(line: Sequence[str] | None = None) -> int:
    parser = make_parser()
    try:
        (arguments,) = parser.parse_args_and_config(list(sys.argv[1:] if line is None else line))
        problems = load_problems(
            arguments.dataset_name, arguments.dataset_split, arguments.dataset_config, arguments.instruction
        )
        if arguments.max_problems is not None:
            problems = problems.select(range(min(arguments.max_problems, len(problems))))
        make_sampler = vllm_sampler if arguments.use_vllm else transformers_sampler
        results = evaluate(arguments, problems, lambda: make_sampler(arguments))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"\n{results['problems']} problems, mean and 95 % interval over them")
    for name, value in results["metrics"].items():
        print(f"{name:<10} {value['mean']:.3f}  [{value['low']:.3f}, {value['high']:.3f}]")
    if results["without_a_parseable_solution"]:
        print(f"{results['without_a_parseable_solution']} more have a solution that math-verify cannot parse")
    print(f"\nwritten to {Path(arguments.output_dir) / 'results.json'}")
    return 0
