"""`trl-a3po train --worked_examples`: what the model is prompted with, and what is refused before training."""

import json
import re

import pytest
import trl

from trl_a3po.cli import main as cli
from trl_a3po.cli import train


PROBLEMS = [{"question": f"what is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]
EXAMPLES = [{"question": "2 + 2?", "answer": "\\boxed{4}"}, {"question": "3 + 4?", "answer": "\\boxed{7}"}]
seen = []


def noting_reward(prompts, completion_ids, **kwargs):
    seen.extend(prompts)
    return [float(sum(ids) % 2) for ids in completion_ids]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def line(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "GRPOTrainer", trl.GRPOTrainer)  # which the command replaces
    problems = write(tmp_path / "problems.jsonl", PROBLEMS)

    def line(examples, *options):
        small = "--use_cpu True --bf16 False --max_steps 1 --max_completion_length 4 --per_device_train_batch_size 8"
        files = ["--dataset_name", problems, "--worked_examples", write(tmp_path / "examples.jsonl", examples)]
        output = ["--output_dir", str(tmp_path / "output"), "--model_name_or_path", model_dir, "--report_to", "none"]
        return [*small.split(), *files, *output, "--instruction", "box it.", *options]

    return line


def test_they_stand_before_each_problem(line, capsys):
    seen.clear()
    train.train(line(EXAMPLES, "--problems", "--reward_funcs", f"{__name__}.noting_reward"))
    assert "8 problems to train on, 2 worked examples before each\n" in capsys.readouterr().out
    assert len(seen) == 8
    for prompt in seen:
        assert [message["content"] for message in prompt[:-1]] == [
            *("2 + 2?\nbox it.", "\\boxed{4}", "3 + 4?\nbox it.", "\\boxed{7}")
        ]
        assert prompt[-1]["content"].startswith("what is ")


def test_a_problem_to_evaluate_on_is_refused(line):
    examples = [*EXAMPLES, {"question": "what is  7 + 1?", "answer": "\\boxed{8}"}]
    evaluates = ["--problems", "--eval_strategy", "steps", "--eval_steps", "1"]
    slices = ["--dataset_train_split", "train[:4]", "--dataset_test_split", "train[4:]"]
    with pytest.raises(train.UsageError, match=r"Row 7 .* to evaluate on is row 2 of the worked examples: 'what is 7"):
        train.train(line(examples, *evaluates, *slices))


def test_a_problem_to_train_on_is_warned_of(line, caplog):
    examples = [*EXAMPLES, {"question": "what is 7 + 1?", "answer": "\\boxed{8}"}]
    train.train(line(examples, "--problems"))
    assert "1 of 8 problems for training are worked examples too" in caplog.text
    assert "row 7 (counted from 0)" in caplog.text


WRONG = [{"question": "1?", "answer": "#### 1"}]


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        (EXAMPLES, "--reward_funcs accuracy_reward", "`worked_examples` has an effect only on problems"),
        (WRONG, "--problems", "Row 0 .* does not score as correct"),
        (WRONG, "--problems --reward_funcs trl_a3po.rewards.accuracy_reward", "Row 0 .* does not score as correct"),
    ],
)
def test_what_does_not_work_is_refused_before_anything_starts(examples, options, message, line, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["train", *line(examples, *options.split())])
    assert error.value.code == 2
    refusal = capsys.readouterr().err
    assert re.search(message, refusal)


def test_a_streamed_evaluation_cannot_be_compared(line, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        write(folder / name, PROBLEMS)
    options = ["--problems", "--dataset_streaming", "--eval_strategy", "steps", "--eval_steps", "1"]
    with pytest.raises(SystemExit):
        cli.main(["train", *line(EXAMPLES, *options, "--dataset_name", str(folder))])
    assert "a stream cannot be read twice. Leave out `--dataset_streaming`" in capsys.readouterr().err
