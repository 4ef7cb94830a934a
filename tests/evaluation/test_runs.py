"""`trl-a3po eval`: its metrics against their definitions, and the command on real models."""

import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_a3po.demo
from trl_a3po.cli import main as cli
from trl_a3po.demo import arithmetic
from trl_a3po.evaluation.evaluate import EvaluateArguments, evaluate, interval, majority_is_correct, metrics, pass_at_k
from trl_a3po.evaluation.problems import to_prompt_and_solution


START_MODEL = Path(trl_a3po.demo.__file__).parent / "start_model"


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([1] * correct + [0] * (samples - correct), k))
        assert pass_at_k(correct, samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["\\boxed{2}", "\\boxed{3}", "\\boxed{2}"], 0),
        (["\\boxed{3}", "\\boxed{0.5}", "$\\frac{1}{2}$", "\\boxed{3}", "\\boxed{\\frac{2}{4}}"], 1),  # one answer
        (["none", "\\boxed{2}", "none"], 1),  # no vote
        (["\\boxed{2}", "\\boxed{3}"], 0),  # as many votes
        (["none", ""], None),
    ],
)
def test_the_majority(answers, expected):
    correct = [float(index == expected) for index in range(len(answers))]
    assert majority_is_correct(answers, correct) == (0.0 if expected is None else 1.0)


def test_intervals_are_those_of_the_normal_approximation_where_it_holds():
    generator = np.random.default_rng(1)
    values = generator.normal(0.3, 1.0, 2000)
    low, high = interval(values)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)
    assert interval([0.5] * 10) == (0.5, 0.5)


def test_metrics():
    problems = [
        {"completions": ["\\boxed{1}"] * 4, "correct": [1.0] * 4},
        {"completions": ["\\boxed{1}", "\\boxed{2}", "\\boxed{2}", "\\boxed{2}"], "correct": [1.0, 0.0, 0.0, 0.0]},
    ]
    means = {name: value["mean"] for name, value in metrics(problems).items()}
    assert means == {"avg@4": 0.625, "pass@1": 0.625, "pass@2": 0.75, "pass@4": 1.0, "maj@4": 0.5}
    assert all(value["low"] <= value["mean"] <= value["high"] for value in metrics(problems).values())


# Runs


def guesses(prompts, seed):
    """What a model that only guesses would say: the same for the same prompts and seed."""
    generator = random.Random(f"{seed} {prompts}")
    return [[f"\\boxed{{{generator.randint(1, 3)}}}" for _ in range(4)] for _ in prompts]


@pytest.fixture
def problems():
    rows = [{"problem": f"{i}?", "answer": "2" if i != 3 else ""} for i in range(10)]
    return to_prompt_and_solution(Dataset.from_list(rows))


@pytest.fixture
def arguments(tmp_path):
    def make(name="scores", **fields):
        defaults = {"num_samples": 4, "batch_size": 4}
        return EvaluateArguments("model", "dataset", str(tmp_path / name), **{**defaults, **fields})

    return make


def test_results(problems, arguments, tmp_path):
    results = evaluate(arguments(), problems, lambda: guesses)
    assert json.loads((tmp_path / "scores" / "results.json").read_text()) == results
    assert (results["problems"], results["without_a_parseable_solution"]) == (9, 1)
    samples = [json.loads(line) for line in (tmp_path / "scores" / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == list(problems["prompt"])
    correct = [[text == "\\boxed{2}" for text in sample["completions"]] for sample in samples]
    assert correct.pop(3) != [None] * 4 == samples.pop(3)["correct"]
    assert [sample["correct"] for sample in samples] == correct
    assert results["metrics"]["avg@4"]["mean"] == pytest.approx(np.mean(correct))


@pytest.mark.parametrize("left", ["in the batch", "in a line"])
def test_an_interrupted_evaluation_ends_as_one_at_one_go(left, problems, arguments, tmp_path):
    whole = evaluate(arguments("whole"), problems, lambda: guesses)

    def interrupted(prompts, seed):
        if "4?" in str(prompts):
            raise KeyboardInterrupt
        return guesses(prompts, seed)

    with pytest.raises(KeyboardInterrupt):
        evaluate(arguments(), problems, lambda: interrupted)
    path, expected = tmp_path / "scores" / "samples.jsonl", tmp_path / "whole" / "samples.jsonl"
    assert len(path.read_text().splitlines()) == 4
    lines = expected.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + (lines[6][:20] if left == "in a line" else ""))
    seeds = []

    def noting(prompts, seed):
        seeds.append(seed)
        return guesses(prompts, seed)

    assert evaluate(arguments(), problems, lambda: noting) == whole
    assert path.read_text() == expected.read_text()
    assert seeds == [4, 8]
    evaluate(arguments(), problems, pytest.fail)  # all is there


def test_other_settings_than_before_are_refused(problems, arguments):
    evaluate(arguments(), problems, lambda: guesses)
    with pytest.raises(ValueError, match=r"was begun with temperature=0\.6\. Pass the same again"):
        evaluate(arguments(temperature=1.0), problems, lambda: guesses)


def test_problems_without_any_parseable_solution_are_an_error(problems, arguments):
    with pytest.raises(ValueError, match="solution of none of the problems"):
        evaluate(arguments(), problems.select([3]), lambda: guesses)


# The command


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_model_of_the_demo(tmp_path, capsys):
    rows = [arithmetic.row(problem) for problem in arithmetic.problems("test")[:48]]
    options = ["--dataset_name", write(tmp_path / "problems.jsonl", rows), "--output_dir", str(tmp_path / "scores")]
    line = ["eval", "--model_name_or_path", str(START_MODEL), *options, "--max_completion_length", "40"]
    assert cli.main(line) == 0
    printed = dict(re.findall(r"^(\S+@\d) +(\S+)", capsys.readouterr().out, re.M))
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    means = {name: value["mean"] for name, value in results["metrics"].items()}
    assert printed == {name: f"{mean:.3f}" for name, mean in means.items()}
    assert means["avg@8"] == pytest.approx(means["pass@1"])
    assert 0.1 < means["pass@1"] < 0.6 < means["pass@8"] < 1
    assert results["settings"]["temperature"] == 0.6
    assert results["settings"]["top_p"] == 0.95
    assert results["settings"]["num_samples"] == 8


def test_an_adapter_completes_as_the_model_that_it_is_merged_into(tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(START_MODEL), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    model.save_pretrained(adapter)
    model.merge_and_unload().save_pretrained(merged)
    for directory in (adapter, merged):
        AutoTokenizer.from_pretrained(START_MODEL).save_pretrained(directory)
    rows = [arithmetic.row(problem) for problem in arithmetic.problems("test")[:4]]
    file = write(tmp_path / "problems.jsonl", rows)
    completions = {}
    for path in (START_MODEL, adapter, merged):
        output = tmp_path / f"scores of {path.name}"
        options = ["--dataset_name", file, "--output_dir", str(output), "--temperature", "0", "--num_samples", "1"]
        cli.main(["eval", "--model_name_or_path", str(path), *options, "--max_completion_length", "20"])
        samples = (output / "samples.jsonl").read_text().splitlines()
        completions[path] = [json.loads(line)["completions"] for line in samples]
    assert completions[adapter] == completions[merged] != completions[START_MODEL]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "the following arguments are required: --model_name_or_path"),
        ("{all} --num_samples 0", "`num_samples` must be 1 or more, got 0"),
        ("{all} --temperature -1", "`temperature` must be 0 or more, got -1"),
        ("{all} --temperature 0", "`temperature=0` gives the same completion every time. Pass `num_samples=1`"),
        ("{all} --top_p 0", "`top_p` must be above 0 and not above 1, got 0"),
        ("{all} --max_problems 0", "`max_problems` must be 1 or more, got 0"),
        ("{all} --samples 3", "--samples"),
        ("{all} --dataset_name nowhere.jsonl", "nowhere.jsonl"),
        ("{all} --dataset_name texts.jsonl", "The dataset has the columns ['text']"),
        ("{all} --model_name_or_path nowhere/at/all", "nowhere/at/all"),
    ],
)
def test_bad_lines_are_refused(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "problems.jsonl", [{"problem": "1 + 1?", "answer": "2"}])
    write(tmp_path / "texts.jsonl", [{"text": "2"}])
    everything = "--model_name_or_path nowhere --dataset_name problems.jsonl --output_dir scores"
    with pytest.raises(SystemExit) as error:
        cli.main(["eval", *options.format(all=everything).split()])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
