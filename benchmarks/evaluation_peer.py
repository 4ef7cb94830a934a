"""
Evaluates one model on the same problems with `trl-a3po eval` and with lm-evaluation-harness, and compares the two.

    pip install lm-eval
    python benchmarks/evaluation_peer.py --model MODEL_DIR --problems gsm8k_test.jsonl --output peer-results

The harness gets the same messages and applies the model's chat template itself. The program writes the completions of
both to the output directory, and compares the prompts, the greedy completions, and samples at temperature 0.6. Each
completion is scored twice: by the reward of this package, and by the rule of the harness's own GSM8K task, which takes
the last number.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.filters.extraction import RegexFilter
from transformers import AutoTokenizer

from trl_a3po.evaluation.metrics import Solved, metrics
from trl_a3po.evaluation.problems import load_problems
from trl_a3po.evaluation.runs import EvaluateArguments, evaluate, score
from trl_a3po.evaluation.worked_examples import load_worked_examples


# The pattern of "flexible-extract" in the harness's GSM8K task, which takes the last match.
LAST_NUMBER = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)

Completions = list[list[str]]


def ours(arguments: argparse.Namespace, problems: Dataset, examples: list, samples: int, output: Path) -> Completions:
    settings = EvaluateArguments(
        model_name_or_path=arguments.model,
        dataset_name=arguments.problems,
        output_dir=str(output),
        num_samples=samples,
        temperature=0.6 if samples > 1 else 0.0,
        max_completion_length=arguments.length,
        batch_size=arguments.batch_size,
        dtype="float32",
    )
    evaluate(settings, problems, worked_examples=examples)
    return [json.loads(line)["completions"] for line in (output / "samples.jsonl").read_text().splitlines()]


def theirs(
    arguments: argparse.Namespace, problems: Dataset, samples: int, output: Path
) -> tuple[list[str], Completions]:
    """The prompts as the harness renders them, and its completions, in the order of the problems."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "problems.jsonl"
    *turns, _ = problems[0]["prompt"]  # before every problem: worked examples
    asked = [{"question": row["prompt"][-1]["content"], "answer": str(row["solution"])} for row in problems]
    file.write_text("".join(json.dumps(each) + "\n" for each in asked))
    shots = [
        {"question": question["content"], "answer": answer["content"]}
        for question, answer in zip(turns[::2], turns[1::2], strict=True)
    ]
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 0}
    task: dict[str, Any] = {
        "task": "the_same_problems",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "fewshot_config": {"sampler": "first_n", "samples": shots},
        "num_fewshot": len(shots),
        "repeats": samples,
        "generation_kwargs": {
            "until": [],
            "max_gen_toks": arguments.length,
            **(sampling if samples > 1 else {"do_sample": False}),
        },
        "metric_list": [{"metric": "exact_match"}],
    }
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": arguments.model, "dtype": "float32"},
        tasks=[task],
        batch_size=arguments.batch_size,
        device="cpu",
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        log_samples=True,
        bootstrap_iters=0,
    )
    logged = sorted(results["samples"]["the_same_problems"], key=lambda each: each["doc_id"])
    completions = [each["resps"][0] for each in logged]
    (output / "completions.json").write_text(json.dumps(completions))
    return [each["arguments"][0][0] for each in logged], completions


def by_last_number(texts: Sequence[str], solution: Any) -> list[float]:
    """Scores completions by the rule of the harness's GSM8K task."""
    found = LAST_NUMBER.apply([[str(solution), *texts]], [{}])[0]
    expected, *answers = (number.replace(",", "").replace("$", "").removesuffix(".") for number in found)
    return [float(answer == expected) for answer in answers]


def figure(completions: Completions, problems: Dataset, rule) -> str:
    solved = [
        Solved(tuple(texts), tuple(rule(texts, solution)), tuple(texts))
        for texts, solution in zip(completions, problems["solution"], strict=True)
    ]
    return "   ".join(f"{name} {value}" for name, value in metrics(solved).items())


def compare(mine: Completions, peer: Completions, problems: Dataset) -> list[str]:
    lines = []
    for label, rule in (("math-verify", score), ("the last number", by_last_number)):
        lines.append(f"  {label:<16} trl-a3po  {figure(mine, problems, rule)}")
        lines.append(f"  {label:<16} lm-eval   {figure(peer, problems, rule)}")
    return lines


def differing(mine: Completions, peer: Completions) -> list[int]:
    """Problems whose greedy completions differ. The harness strips spaces at the end of some completions."""
    return [row for row, (a, b) in enumerate(zip(mine, peer, strict=True)) if a[0].strip() != b[0].strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a model with a chat template")
    parser.add_argument("--problems", required=True, help="file of problems, as for trl-a3po eval")
    parser.add_argument("--worked_examples", help="file of problems with solutions that stand before each problem")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max_problems", type=int, default=200)
    parser.add_argument("--samples", type=int, default=4, help="of each problem, for the sampled figures")
    parser.add_argument("--length", type=int, default=200, help="maximum tokens of a completion")
    parser.add_argument("--batch_size", type=int, default=16, help="for both; here it counts problems")
    arguments = parser.parse_args()

    examples = load_worked_examples(arguments.worked_examples, None) if arguments.worked_examples else []
    problems = load_problems(arguments.problems, "test", None, None, examples)
    problems = problems.select(range(min(arguments.max_problems, len(problems))))
    print(f"lm-eval {version('lm-eval')}, torch {torch.__version__}, {len(problems)} problems")

    mine = ours(arguments, problems, examples, 1, arguments.output / "greedy")
    prompts, peer = theirs(arguments, problems, 1, arguments.output / "greedy-peer")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rendered = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in problems["prompt"]
    ]
    print(f"prompts that differ: {sum(a != b for a, b in zip(rendered, prompts, strict=True))}")
    different = differing(mine, peer)
    print(f"greedy: {len(different)} completions differ, of problems {different}")
    print("\n".join(compare(mine, peer, problems)))

    mine = ours(arguments, problems, examples, arguments.samples, arguments.output / "sampled")
    _, peer = theirs(arguments, problems, arguments.samples, arguments.output / "sampled-peer")
    print(f"{arguments.samples} samples at temperature 0.6, top-p 0.95:")
    print("\n".join(compare(mine, peer, problems)))


if __name__ == "__main__":
    sys.exit(main())
