"""`trl-a3po eval`: whole evaluations, resumed, refused where anything changed, and ended by no problem."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from support import adapters, tiny
from support.hub_server import Hub
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

import trl_a3po.demo
from trl_a3po.cli import eval as eval_command
from trl_a3po.cli import main as cli
from trl_a3po.cli.eval import make_parser
from trl_a3po.demo import arithmetic
from trl_a3po.evaluation import files, runs
from trl_a3po.evaluation.models import Chat
from trl_a3po.evaluation.problems import to_prompt_and_solution
from trl_a3po.evaluation.runs import EvaluateArguments, evaluate


START_MODEL = Path(trl_a3po.demo.__file__).parent / "start_model"
TOKENIZER = AutoTokenizer.from_pretrained(START_MODEL)


# Runs of an engine that guesses


@contextmanager
def guesses(arguments, subject, longest):
    """What a model that only guesses would say: by the random numbers of each request."""

    def complete(requests):
        assert all(len(each.prompt_ids) + each.max_tokens <= longest for each in requests)
        return [[*TOKENIZER(f"\\boxed{{{each.seed % 3 + 1}}}").input_ids, 256] for each in requests]

    yield complete


def no_engine(*_):
    pytest.fail("an engine was opened")


@pytest.fixture
def rows():
    return [{"problem": f"{i}?", "answer": "2" if i != 3 else "\\text{}"} for i in range(10)]


@pytest.fixture
def problems(rows):
    return to_prompt_and_solution(Dataset.from_list(rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return shutil.copytree(START_MODEL, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def arguments(tmp_path, model):
    def make(name="scores", **fields):
        defaults = {"model_name_or_path": str(model), "num_samples": 4, "batch_size": 4}
        return EvaluateArguments(dataset_name="-", output_dir=str(tmp_path / name), **{**defaults, **fields})

    return make


def samples(path):
    return [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]


def test_results(problems, arguments, tmp_path):
    results = evaluate(arguments(), problems, guesses)
    assert json.loads((tmp_path / "scores" / "results.json").read_text()) == results
    assert (results["problems"], results["rows_without_a_parseable_solution"]) == (9, [3])
    records = samples(tmp_path / "scores")
    assert [record["prompt"] for record in records] == list(problems["prompt"])
    assert records[3]["correct"] == [None] * 4
    correct = [[text == "\\boxed{2}" for text in record["completions"]] for record in records]
    del correct[3], records[3]
    assert [record["correct"] for record in records] == correct
    assert results["metrics"]["avg@4"]["mean"] == pytest.approx(np.mean(correct))
    assert 0 < np.mean(correct) < 1
    assert results["reached_the_end"] == 1
    assert results["mean_tokens"] == 10
    assert results["settings"]["temperature"] == 0.6
    assert results["settings"]["end_token_ids"] == [256]
    assert results["settings"]["dtype"] == "float32"
    assert results["base_revision"] is None
    assert {"trl", "transformers", "torch", "device"} <= results["versions"].keys()


@contextmanager
def reasons(arguments, subject, longest):
    """Of four samples, one says 2 in its reasoning and ends there, one says 2 after it, and two say 3 after it."""
    texts = ["\\boxed{2}", "so</think>\\boxed{2}", *["so</think>\\boxed{3}"] * 2]

    def complete(requests):
        return [[*TOKENIZER(texts[index % 4]).input_ids, 256] for index in range(len(requests))]

    yield complete


def test_only_what_follows_the_reasoning_is_scored(problems, arguments, tmp_path):
    whole = evaluate(arguments("whole"), problems, reasons)
    after = evaluate(arguments("after", reasoning_delimiters=["</think>", "</thought>"]), problems, reasons)
    assert [samples(tmp_path / name)[0]["correct"] for name in ("whole", "after")] == [
        [1.0, 1.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0],
    ]
    # In a tie the first answer counts. Without the first, 3 has the most votes.
    assert (whole["metrics"]["maj@4"]["mean"], after["metrics"]["maj@4"]["mean"]) == (1.0, 0.0)
    (record,) = samples(tmp_path / "after")[:1]
    assert record["answers"] == ["", "\\boxed{2}", "\\boxed{3}", "\\boxed{3}"]
    assert record["completions"] == samples(tmp_path / "whole")[0]["completions"]
    with pytest.raises(ValueError, match=r"started with reasoning_delimiters=\['</think>', '</thought>'\]\. Pass"):
        evaluate(arguments("after"), problems, no_engine)


def test_a_delimiter_of_a_file_is_one(tmp_path):
    (tmp_path / "config.yaml").write_text('reasoning_delimiters: "</think>"\n')
    line = ["--config", str(tmp_path / "config.yaml"), "--model_name_or_path", "m", "--dataset_name", "d"]
    (parsed,) = make_parser().parse_args_and_config([*line, "--output_dir", "o"])
    assert parsed.reasoning_delimiters == ["</think>"]


@pytest.mark.parametrize("left", ["in the batch", "in a line", "nothing"])
def test_an_interrupted_evaluation_ends_as_one_at_one_go(left, problems, arguments, tmp_path):
    whole = evaluate(arguments("whole"), problems, guesses)
    expected = (tmp_path / "whole" / "samples.jsonl").read_text()
    sampled = []

    @contextmanager
    def interrupted(*args):
        with guesses(*args) as complete:

            def first_only(requests):
                if sampled:
                    raise KeyboardInterrupt
                sampled.extend(requests)
                return complete(requests)

            yield first_only

    with pytest.raises(KeyboardInterrupt):
        evaluate(arguments(), problems, interrupted)
    path = tmp_path / "scores" / "samples.jsonl"
    lines = expected.splitlines(keepends=True)
    assert path.read_text() == "".join(lines[:4])
    assert not (tmp_path / "scores" / "results.json").exists()
    if left != "nothing":
        path.write_text("".join(lines[:6]) + (lines[6][:20] if left == "in a line" else ""))
    # Also with another batch size, on which no sample depends.
    results = evaluate(arguments(batch_size=3), problems, guesses)
    assert path.read_text() == expected
    assert results["metrics"] == whole["metrics"]
    evaluate(arguments(), problems, no_engine)  # all is there


def test_samples_depend_neither_on_the_order_of_problems_nor_on_their_batch(problems, arguments, tmp_path):
    evaluate(arguments("whole"), problems, guesses)
    evaluate(arguments("shuffled", batch_size=1), problems.shuffle(seed=1), guesses)
    whole, shuffled = (
        {record["problem"]: record["completions"] for record in samples(tmp_path / name)}
        for name in ("whole", "shuffled")
    )
    assert whole == shuffled


def test_rows_with_one_prompt_are_one_problem_with_samples_of_their_own(arguments, tmp_path):
    rows = [{"problem": "1?", "answer": "2"}] * 16 + [{"problem": "2?", "answer": "2"}] * 16
    problems = to_prompt_and_solution(Dataset.from_list(rows))
    results = evaluate(arguments(max_completion_length=40, temperature=2.0), problems)
    assert (results["problems"], results["rows"], results["samples_per_problem"]) == (2, 32, 64)
    assert list(results["metrics"]) == ["avg@64", *(f"pass@{2**i}" for i in range(7)), "maj@64"]
    texts = [text for record in samples(tmp_path / "scores")[:16] for text in record["completions"]]
    assert len(set(texts)) > 50  # of long answers to one question


def test_solutions_that_contradict_each_other_are_counted(arguments):
    rows = [{"problem": "1?", "answer": "2"}, {"problem": "1?", "answer": "3"}, {"problem": "2?", "answer": "3"}]
    assert (
        evaluate(arguments(), to_prompt_and_solution(Dataset.from_list(rows)), guesses)[
            "problems_with_several_solutions"
        ]
        == 1
    )


# Never stale


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 1.0}, "temperature=0.6"),
        ({"top_p": 0.5}, "top_p=0.95"),
        ({"top_k": 3}, "top_k=0"),
        ({"num_samples": 5}, "num_samples=4"),
        ({"seed": 1}, "seed=0"),
        ({"max_completion_length": 7}, "max_completion_length=4096"),
        ({"max_model_len": 64}, "max_model_len=2048"),
        ({"dtype": "bfloat16"}, "dtype='float32'"),
        ({"trust_remote_code": True}, "trust_remote_code=False"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "interrupted"])
def test_other_settings_than_before_are_refused(fields, message, whole, problems, arguments, tmp_path):
    evaluate(arguments(), problems, guesses)
    if not whole:
        interrupt(tmp_path / "scores")
    with pytest.raises(ValueError, match=rf"started with {message}. Pass the same .* delete this one"):
        evaluate(arguments(**fields), problems, guesses)


def interrupt(directory):
    path = directory / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    (directory / "results.json").unlink()


def test_other_weights_under_the_same_path_are_refused(problems, arguments, tmp_path):
    model = shutil.copytree(START_MODEL, tmp_path / "model")
    evaluate(arguments(model_name_or_path=str(model)), problems, guesses)
    weights = load_file(model / "model.safetensors")
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="started with different weights of the model"):
        evaluate(arguments(model_name_or_path=str(model)), problems, guesses)


def test_a_model_that_was_moved_is_the_same(problems, arguments, tmp_path):
    evaluate(arguments(), problems, guesses)
    moved = shutil.copytree(START_MODEL, tmp_path / "moved")
    evaluate(arguments(model_name_or_path=str(moved)), problems, no_engine)


def test_an_evaluation_may_lie_in_the_directory_of_the_model(problems, arguments, tmp_path):
    model = shutil.copytree(START_MODEL, tmp_path / "model")
    evaluate(arguments(name="model", model_name_or_path=str(model)), problems, guesses)
    evaluate(arguments(name="model", model_name_or_path=str(model)), problems, no_engine)


def test_another_tokenizer_is_refused_whatever_its_files_are(problems, arguments, tmp_path, monkeypatch):
    evaluate(arguments(), problems, guesses)
    monkeypatch.setattr(Chat, "encode", lambda self, prompt: [1, 2, 3])
    with pytest.raises(ValueError, match="started with different tokens of the problems of the model"):
        evaluate(arguments(), problems, guesses)


@pytest.mark.parametrize("change", ["longer", "shorter", "edited", "solution", "order"])
def test_other_problems_are_refused(change, rows, problems, arguments):
    evaluate(arguments(), problems, guesses)
    changed = {
        "longer": [*rows, {"problem": "10?", "answer": "2"}],
        "shorter": rows[:-1],
        "edited": [{"problem": "0 ?", "answer": "2"}, *rows[1:]],
        "solution": [{"problem": "0?", "answer": "3"}, *rows[1:]],
        "order": rows[::-1],
    }[change]
    with pytest.raises(ValueError, match=r"started with .*different problems"):
        evaluate(arguments(), to_prompt_and_solution(Dataset.from_list(changed)), guesses)


def test_other_libraries_are_refused_only_where_samples_are_missing(problems, arguments, tmp_path, monkeypatch):
    evaluate(arguments(), problems, guesses)
    monkeypatch.setattr(runs, "versions", lambda use_vllm: {"transformers": "99"})
    evaluate(arguments(), problems, no_engine)
    interrupt(tmp_path / "scores")
    with pytest.raises(ValueError, match=r"started with .*transformers \d"):
        evaluate(arguments(), problems, guesses)


def test_results_whose_samples_were_moved_are_not_replaced_by_others(problems, arguments, tmp_path):
    evaluate(arguments(), problems, guesses)
    results = tmp_path / "scores" / "results.json"
    before = results.read_bytes()
    (tmp_path / "scores" / "samples.jsonl").unlink()
    with pytest.raises(ValueError, match=r"contains another evaluation\. It was started with temperature=0\.6"):
        evaluate(arguments(temperature=1.0), problems, guesses)
    with pytest.raises(ZeroDivisionError):
        evaluate(arguments(), problems, lambda *_: 1 / 0)
    assert results.read_bytes() == before
    evaluate(arguments(), problems, guesses)
    assert results.read_bytes() == before


def test_samples_of_something_else_are_refused(problems, arguments, tmp_path):
    evaluate(arguments(), problems, guesses)
    path = tmp_path / "scores" / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:4]))
    with pytest.raises(ValueError, match=r"samples.jsonl' is not the file that '.*results.json' was computed from"):
        evaluate(arguments(), problems, guesses)
    (tmp_path / "scores" / "results.json").unlink()
    with pytest.raises(ValueError, match="does not contain these problems in this order"):
        evaluate(arguments(), problems, guesses)
    (tmp_path / "scores" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"contains `samples.jsonl` but no `run.json`"):
        evaluate(arguments(), problems, guesses)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("samples.jsonl", '{"question": "1 + 1", "answer": "2"}'),  # without an end of line, so cut off
        ("samples.jsonl", '{"question": "1 + 1", "answer": "2"}\n{"question": "1 + 2", "answer": "3"}'),
        ("results.json", '{"accuracy": 0.5}'),
        ("run.json", '{"learning_rate": 1e-6}'),
    ],
)
def test_files_of_something_else_stay_as_they_are(name, text, problems, arguments, tmp_path):
    path = tmp_path / "scores" / name
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"`{name}` but no `run.json`|run.json' is damaged: it has no model"):
        evaluate(arguments(), problems, guesses)
    other = path.with_name("results.json")
    if name != "run.json" and name != other.name:
        other.write_text("[]")
        with pytest.raises(ValueError, match=r"`samples.jsonl` and `results.json` but no `run.json`"):
            evaluate(arguments(), problems, guesses)
        other.unlink()
    assert path.read_text() == text
    assert {each.name for each in path.parent.iterdir()} <= {name, ".lock"}


@pytest.mark.parametrize("text", ["", "[]", "{}"])
@pytest.mark.parametrize("name", ["run.json", "samples.jsonl"])
def test_a_damaged_file_is_named(name, text, problems, arguments, tmp_path):
    evaluate(arguments(), problems, guesses)
    interrupt(tmp_path / "scores")
    (tmp_path / "scores" / name).write_text(f"{text}\n")
    with pytest.raises(ValueError, match=rf"scores/{name}' is damaged: it .*Delete"):
        evaluate(arguments(), problems, guesses)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": "x"}, "Line 2 of '.*samples.jsonl' is damaged: it is not a sample"),
        ({"correct": ["x"] * 4}, "Line 2 of '.*samples.jsonl' is damaged: it is not a sample"),
        ({"correct": [1.0] * 3}, "Line 2 of '.*samples.jsonl' is damaged: it is not a sample"),
        ({"tokens": []}, "Line 2 of '.*samples.jsonl' is damaged: it is not a sample"),
        ({"answers": ["1"] * 3}, "Line 2 of '.*samples.jsonl' is damaged: it is not a sample"),
        ({"completions": [1] * 4}, "Line 2 of '.*samples.jsonl' is damaged: it is not a sample"),
        (b"\xff", "'.*samples.jsonl' is damaged: it is not UTF-8 .* Delete the file to sample again"),
    ],
)
def test_damaged_samples_are_named(change, message, problems, arguments, tmp_path):
    evaluate(arguments(), problems, guesses)
    interrupt(tmp_path / "scores")
    path = tmp_path / "scores" / "samples.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1] = change if isinstance(change, bytes) else json.dumps(json.loads(lines[1]) | change).encode()
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        evaluate(arguments(), problems, guesses)


def test_a_second_evaluation_in_the_directory_is_refused_until_the_first_ends(problems, arguments, tmp_path):
    (tmp_path / "scores").mkdir()
    program = "import pathlib, runpy, sys\nwriter = runpy.run_path(sys.argv[1])['only_writer']\n"
    program += "with writer(pathlib.Path(sys.argv[2])):\n    print(flush=True)\n    sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, files.__file__, str(tmp_path / "scores")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        with pytest.raises(
            ValueError, match=rf"Process {process.pid} on \S+ is writing an evaluation into '.*scores'"
        ):
            evaluate(arguments(), problems, no_engine)
        process.kill()
    evaluate(arguments(), problems, guesses)


def test_a_date_in_the_prompts_is_that_of_the_start(problems, arguments, tmp_path, monkeypatch):
    model = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny.save(model))
    tokenizer.chat_template = "{{ strftime_now('%d') ~ strftime_now(\"%m %H\") }}" + tiny.CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    prompts = []

    @contextmanager
    def kept(*_):
        yield lambda requests: [prompts.append(tokenizer.decode(each.prompt_ids)) or [4, 1] for each in requests]

    def on(day, name="scores"):
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: datetime(2026, 1, day)))
        monkeypatch.setattr(runs, "today", lambda: f"2026-01-0{day}")
        return evaluate(arguments(name, model_name_or_path=str(model), max_completion_length=4), problems, kept)

    assert on(1)["settings"]["date"] == "2026-01-01"
    assert on(2)["settings"]["date"] == "2026-01-01"
    interrupt(tmp_path / "scores")
    on(3)
    assert {prompt.replace(" ", "")[:6] for prompt in prompts} == {"010100"}
    assert on(3, "other")["settings"]["date"] == "2026-01-03"


def test_an_engine_that_does_not_start_holds_no_directory(problems, arguments):
    def broken(*_):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        evaluate(arguments(temperature=1.0), problems, broken)
    evaluate(arguments(), problems, guesses)


# Nothing ends it


def test_problems_without_any_parseable_solution_are_an_error(problems, arguments):
    with pytest.raises(ValueError, match="could not parse any of the solutions"):
        evaluate(arguments(), problems.select([3]), guesses)


HOSTILE = [
    "",
    " ",
    "\x00",
    "\u202e\u2028\ufeff",
    "<|end|><|assistant|>\\boxed{2}",
    "{{ messages }}{% raw %}",
    "\\boxed{" * 200,
    "𝟛" * 100,
    "a" * 3000,
]


def test_no_problem_ends_it(arguments, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": text}], "solution": "$2$"} for text in [*HOSTILE, "1+1=?"]]
    results = evaluate(arguments(max_completion_length=8, num_samples=2), Dataset.from_list(rows))
    assert results["problems"] == len(HOSTILE) + 1
    assert results["rows_not_sampled"] == {"8": "it has 3003 tokens, but the context has 2048"}
    records = samples(tmp_path / "scores")
    assert records[8]["correct"] == [0, 0]
    assert all(len(record["completions"]) == 2 for record in records)


def test_rows_are_numbered_as_in_the_dataset(arguments, tmp_path):
    rows = [
        {"problem": "0?", "answer": ""},
        {"problem": "1?", "answer": "2"},
        {"problem": "a" * 3000, "answer": "2"},
        {"problem": "3?", "answer": "\\text{}"},
    ]
    results = evaluate(arguments(), to_prompt_and_solution(Dataset.from_list(rows)), guesses)
    assert list(results["rows_not_sampled"]) == ["2"]
    assert results["rows_without_a_parseable_solution"] == [3]
    assert [record["row"] for record in samples(tmp_path / "scores")] == [1, 2, 3]


def test_a_problem_that_the_template_refuses_is_named(arguments):
    rows = [
        {"prompt": [{"role": "user", "content": "1+1=?"}], "solution": "$2$"},
        {"prompt": [{"role": "user", "content": None}], "solution": "$2$"},
    ]
    results = evaluate(arguments(), Dataset.from_list(rows), guesses)
    [(row, reason)] = results["rows_not_sampled"].items()
    assert row == "1"
    assert reason.startswith("it cannot be tokenized: ")


def test_a_tokenizer_with_tokens_that_the_model_does_not_have_is_refused(arguments, tmp_path):
    model = tiny.save(tmp_path / "model", vocab_size=10)
    rows = [{"prompt": [{"role": "user", "content": text}], "solution": "$2$"} for text in ("1", "1+1")]
    with pytest.raises(ValueError, match=r"has token 13, but the vocabulary of the model has 10 tokens"):
        evaluate(arguments(model_name_or_path=model), Dataset.from_list(rows), no_engine)


def test_if_no_problem_can_be_sampled_the_first_reason_is_said(arguments):
    rows = [{"prompt": [{"role": "user", "content": "a" * 3000}], "solution": "$2$"}]
    with pytest.raises(
        ValueError, match=r"No problem can be sampled\. The first: it has 3003 tokens, but the context"
    ):
        evaluate(arguments(), Dataset.from_list(rows), no_engine)


def test_a_prompt_with_its_completion_stays_within_the_context(arguments, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "1" * length}], "solution": "$2$"}
        for length in (3, 20, 56, 59, 60, 61)
    ]
    evaluate(arguments(max_model_len=64, max_completion_length=16, num_samples=2), Dataset.from_list(rows))
    limits = [max(record["tokens"]) for record in samples(tmp_path / "scores")]
    assert limits[2] <= 5
    assert limits[3] <= 2
    assert limits[4:] == [1, 0]


@pytest.mark.parametrize("text", ["\x00" * 50, "\\boxed{" * 3000, "\\boxed{\ud800}", "\\boxed{9^{9^{9^9}}}"])
def test_what_a_model_says_is_scored_whatever_it_is(text):
    assert runs.score([text, "\\boxed{2}"], "$2$") == [0.0, 1.0]


@pytest.mark.slow
def test_a_killed_evaluation_loses_at_most_a_batch(tmp_path):
    file = write(
        tmp_path / "problems.jsonl", [arithmetic.row(problem) for problem in arithmetic.problems("test")[:24]]
    )
    line = [sys.executable, "-m", "trl_a3po.cli", "eval", "--model_name_or_path", str(START_MODEL)]
    line += ["--dataset_name", file, "--batch_size", "2", "--num_samples", "2", "--max_completion_length", "40"]
    output = tmp_path / "scores"
    process = subprocess.Popen([*line, "--output_dir", str(output)], stdout=subprocess.PIPE, text=True)
    for progress in process.stdout:
        if progress == "6/24 rows\n":
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    kept = samples(output)
    assert len(kept) >= 6
    assert not (output / "results.json").exists()
    started = time.time()
    assert cli.main([*line[3:], "--output_dir", str(output)]) == 0
    assert cli.main([*line[3:], "--output_dir", str(tmp_path / "whole")]) == 0
    assert samples(output) == samples(tmp_path / "whole")
    assert (output / "results.json").stat().st_mtime > started


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
    assert 0.1 < means["pass@1"] < 0.5 < means["pass@8"] < 1
    assert results["settings"]["temperature"] == 0.6
    assert results["settings"]["top_p"] == 0.95
    assert results["settings"]["num_samples"] == 8


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
@pytest.mark.parametrize("kind", ["lora", "prompt tuning"])
def test_an_adapter_is_evaluated(kind, tmp_path):
    config = adapters.PROMPT_TUNING if kind == "prompt tuning" else adapters.MERGED[kind][0]
    adapter = adapters.save(tmp_path, config)
    rows = [{"problem": f"{i}+1=", "answer": "2"} for i in range(4)]
    options = ["--dataset_name", write(tmp_path / "problems.jsonl", rows), "--max_completion_length", "8"]
    completions = []
    for model in (adapter, tmp_path / "base"):
        output = tmp_path / f"scores of {model.name}"
        cli.main(["eval", "--model_name_or_path", str(model), *options, "--output_dir", str(output)])
        completions.append([record["completions"] for record in samples(output)])
        assert {path.name for path in output.iterdir()} == {".lock", "run.json", "samples.jsonl", "results.json"}
    assert completions[0] != completions[1]


def test_an_adapter_that_cannot_be_merged_is_refused_by_vllm(tmp_path, capsys):
    adapter = adapters.save(tmp_path, adapters.PROMPT_TUNING)
    file = write(tmp_path / "problems.jsonl", [{"problem": "1+1=", "answer": "2"}])
    line = [
        "eval",
        "--model_name_or_path",
        str(adapter),
        "--dataset_name",
        file,
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit):
        cli.main([*line, "--use_vllm"])
    assert "and vLLM needs a merged model. Evaluate it without" in capsys.readouterr().err


def test_arguments_of_the_chat_template_are_recorded_and_compared(tmp_path, capsys):
    model = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny.save(model))
    tokenizer.chat_template = (
        tiny.CHAT_TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %}7{% endif %}"
    )
    tokenizer.save_pretrained(model)
    file = write(tmp_path / "problems.jsonl", [{"problem": f"{i}+1=", "answer": "2"} for i in range(3)])
    line = ["eval", "--model_name_or_path", str(model), "--dataset_name", file, "--max_completion_length", "8"]
    line += ["--output_dir", str(tmp_path / "scores")]
    without = ["--chat_template_kwargs", '{"enable_thinking": false}']
    assert cli.main([*line, *without]) == 0
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["settings"]["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs: {'enable_thinking': False} (option)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(line)
    assert "chat_template_kwargs={'enable_thinking': False}. Pass the same" in capsys.readouterr().err
    # A model that was trained with them is evaluated with them.
    torch.save(tiny.config(tmp_path, chat_template_kwargs={"enable_thinking": False}), model / "training_args.bin")
    assert cli.main(line) == 0
    assert "(training_args.bin)" in capsys.readouterr().out


@pytest.mark.slow
def test_an_adapter_on_the_hub_is_evaluated_as_the_one_on_the_disk(tmp_path):
    adapter = adapters.save(tmp_path, adapters.MERGED["lora"][0])
    file = write(tmp_path / "problems.jsonl", [{"problem": f"{i}+1=", "answer": "2"} for i in range(4)])
    line = ["--dataset_name", file, "--max_completion_length", "8", "--output_dir"]
    assert cli.main(["eval", "--model_name_or_path", str(adapter), *line, str(tmp_path / "disk")]) == 0
    hub = Hub({"hf_writes": "write"}, [])
    base = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    trained = hub.commit("user/base", "initial commit", base).oid
    hub.commit("user/base", "another model", {"model.safetensors": b""})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "user/base"}))
    torch.save(tiny.config(tmp_path, model_init_kwargs={"revision": trained}), adapter / "training_args.bin")
    hub.commit("user/adapter", "initial commit", {path.name: path.read_bytes() for path in adapter.iterdir()})
    with hub.serve():
        command = [sys.executable, "-m", "trl_a3po.cli", "eval", "--model_name_or_path", "user/adapter", *line]
        done = subprocess.run(
            [*command, str(tmp_path / "hub")], env=hub.environment(tmp_path / "home"), capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    texts = [[record["completions"] for record in samples(tmp_path / name)] for name in ("hub", "disk")]
    assert texts[0] == texts[1]
    assert json.loads((tmp_path / "hub" / "results.json").read_text())["base_revision"] == trained
    model = [json.loads((tmp_path / name / "run.json").read_text())["model"] for name in ("hub", "disk")]
    assert {name for name in model[0] if model[0][name] != model[1][name]} == {"adapter"}  # which names its base


def test_checkpoints_of_a_run_make_a_curve(tmp_path, capsys, monkeypatch):
    def run_here(command):
        """In place of a process of its own, whose start takes seconds."""
        try:
            return cli.main(command[3:])
        except SystemExit as error:
            return error.code

    monkeypatch.setattr(eval_command, "_run", run_here)
    run = tmp_path / "run"
    for step, seed in [(10, 1), (2, 0)]:
        torch.manual_seed(seed)
        tiny.save(run / f"checkpoint-{step}")
    tiny.save(run / "checkpoint-7")
    (run / "checkpoint-7.incomplete").touch()
    for name in ("checkpoint-²", "checkpoint-٣", "checkpoint-2.previous", "checkpoint-last"):
        (run / name).mkdir()
    rows = [{"problem": f"{i}+1=", "answer": "2"} for i in range(3)]
    line = ["eval", "--model_name_or_path", str(run), "--dataset_name", write(tmp_path / "problems.jsonl", rows)]
    line += ["--output_dir", str(tmp_path / "curve"), "--checkpoints", "--max_completion_length", "4"]
    assert cli.main(line) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^\| (checkpoint-\d+) \|", out, re.M) == ["checkpoint-2", "checkpoint-10"]
    assert "checkpoint-10 minus checkpoint-2, 3 problems, paired" in out
    assert (tmp_path / "curve" / "comparison.html").exists()
    # One that cannot be evaluated ends nothing.
    (run / "checkpoint-2" / "config.json").unlink()
    tiny.save(run / "checkpoint-12")
    assert cli.main(line) == 2
    out = capsys.readouterr()
    assert "checkpoint-2' contains no model" in out.err
    assert "checkpoint-12 minus checkpoint-10" in out.out


def test_checkpoints_of_an_earlier_run_are_no_part_of_the_curve(tmp_path, capsys, monkeypatch):
    evaluated = []
    monkeypatch.setattr(eval_command, "_run", lambda command: evaluated.append(command[-3]) or 2)
    for second, (step, loss) in enumerate([(1, 0.1), (2, 0.1), (3, 0.1), (1, 0.2)]):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir(exist_ok=True)
        log = [{"step": each, "loss": loss} for each in range(1, step + 1)]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
        os.utime(checkpoint / "trainer_state.json", (second, second))
    rows = write(tmp_path / "problems.jsonl", [{"problem": "1+1=", "answer": "2"}])
    line = ["eval", "--model_name_or_path", str(tmp_path), "--dataset_name", rows, "--checkpoints"]
    assert cli.main([*line, "--output_dir", str(tmp_path / "curve")]) == 2
    assert evaluated == [str(tmp_path / "checkpoint-1")]
    assert "left out, because an earlier run in" in (out := capsys.readouterr().out)
    assert "wrote them: checkpoint-2, checkpoint-3\n" in out


def test_sigterm_ends_the_evaluation_of_a_checkpoint_too(tmp_path, monkeypatch):
    tiny.save(tmp_path / "run" / "checkpoint-1")
    rows = write(tmp_path / "problems.jsonl", [{"problem": "1+1=", "answer": "2"}])
    child = tmp_path / "python"
    child.write_text(
        f"#!/bin/sh\ntrap 'kill $sleeper; touch {tmp_path}/ended; exit' TERM\nsleep 60 & sleeper=$!\n"
        "sleep 0.5\nkill $PPID\nwait\n"
    )
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    line = ["eval", "--model_name_or_path", str(tmp_path / "run"), "--dataset_name", rows, "--checkpoints"]
    with pytest.raises(SystemExit, match="143"):
        cli.main([*line, "--output_dir", str(tmp_path / "curve")])
    assert (tmp_path / "ended").exists()  # in its own way, and before this process


def test_sigterm_leaves_no_temporary_files(tmp_path, monkeypatch):
    adapter = adapters.save(tmp_path, adapters.lora())

    def terminated(*_, **__):
        assert list((tmp_path / "scores").glob("temporary-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs, "transformers_engine", terminated)
    line = ["eval", "--model_name_or_path", str(adapter), "--output_dir", str(tmp_path / "scores")]
    with pytest.raises(SystemExit, match="143"):
        cli.main([*line, "--dataset_name", write(tmp_path / "problems.JSONL", [{"problem": "1+1=", "answer": "2"}])])
    assert not list((tmp_path / "scores").glob("temporary-*"))


def test_solutions_are_checked_before_anything_is_sampled(tmp_path, capsys):
    rows = write(tmp_path / "problems.jsonl", [{"problem": "1+1=", "answer": "a\nb"}])
    line = ["eval", "--model_name_or_path", "nothing", "--dataset_name", rows, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        cli.main(line)
    assert "cannot parse any of the 1 solutions for evaluation, such as '$a\\nb$'" in capsys.readouterr().err


def test_a_dataset_is_checked_before_any_checkpoint_is_evaluated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_command, "_run", lambda _: pytest.fail("a process was started"))
    for step in (1, 2):
        tiny.save(tmp_path / "run" / f"checkpoint-{step}")
    line = ["eval", "--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path), "--checkpoints"]
    with pytest.raises(SystemExit):
        cli.main([*line, "--dataset_name", write(tmp_path / "problems.jsonl", [{"text": "2"}])])
    assert "The dataset has the columns ['text']" in capsys.readouterr().err


@pytest.mark.parametrize("texts", [[3], [], [""], ["</think>", None]])
def test_reasoning_delimiters_are_texts(texts, arguments):
    with pytest.raises(ValueError, match="`reasoning_delimiters` must be texts that are not empty, got "):
        arguments("scores", reasoning_delimiters=texts)


@pytest.mark.parametrize(
    "name", ["model_name_or_path", "dataset_name", "output_dir", "dataset_split", "worked_examples"]
)
def test_empty_text_as_of_an_unset_variable_is_refused(name, arguments):
    fields = {"model_name_or_path": "model", "dataset_name": "rows.jsonl", "output_dir": "scores", name: ""}
    with pytest.raises(ValueError, match=f"`{name}` is empty"):
        EvaluateArguments(**fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "the following arguments are required: --model_name_or_path"),
        ("{all} --num_samples 0", "`num_samples` must be 1 or more, got 0"),
        ("{all} --temperature -1", "`temperature` must be 0.01 or more, or 0 for the most likely token, got -1"),
        ("{all} --temperature 1e-39", "`temperature` must be 0.01 or more, or 0 for the most likely token, got 1e-39"),
        ("{all} --temperature 0", "`temperature=0` gives the same completion every time. Set `num_samples=1`"),
        ("{all} --top_p 0", "`top_p` must be above 0 and not above 1, got 0"),
        ("{all} --max_problems 0", "`max_problems` must be 1 or more, got 0"),
        ("{all} --top_k -1", "`top_k` must be 0 or more, got -1"),
        ("{all} --max_model_len 1", "`max_model_len` must be 2 or more, got 1"),
        ("{all} --max_model_len 99999 --model_name_or_path {model}", "`max_model_len` is 99999, but the context of"),
        ("{all} --gpu_memory_utilization 1.5", "`gpu_memory_utilization` must be above 0 and not above 1, got 1.5"),
        ("{all} --dtype int8", "`dtype` must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ("{all} --chat_template_kwargs nothink", "`chat_template_kwargs` must be a JSON object such as"),
        ("{all} --use_vllm --model_name_or_path {model}", "pip install 'trl[vllm]'"),
        ("{all} --checkpoints", "'nowhere' contains no complete checkpoint"),
        ("{all} --samples 3", "--samples"),
        ("{all} --dataset_name nowhere.jsonl", "nowhere.jsonl"),
        ("{all} --dataset_name texts.jsonl", "The dataset has the columns ['text']"),
        ("{all} --model_name_or_path nowhere/at/all", "nowhere/at/all"),
        (
            "{all} --output_dir texts.jsonl",
            "Cannot write to `output_dir='texts.jsonl'` (File exists). Name a directory",
        ),
    ],
)
def test_bad_lines_are_refused(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "problems.jsonl", [{"problem": "1 + 1?", "answer": "2"}])
    write(tmp_path / "texts.jsonl", [{"text": "2"}])
    everything = "--model_name_or_path nowhere --dataset_name problems.jsonl --output_dir scores"
    with pytest.raises(SystemExit) as error:
        cli.main(["eval", *options.format(all=everything, model=START_MODEL).split()])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
