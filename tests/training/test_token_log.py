"""What is logged of single tokens is what the shaping gave; it is bounded, and nothing where it is off."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from support import processes, tiny
from support.training import Recorder, assert_same_update, make, train

from trl_a3po.training import token_log
from trl_a3po.training.input_checks import total_rewards
from trl_a3po.training.token_log import TokenLog, token_texts
from trl_a3po.training.token_log_format import MAX_LINE_BYTES, MAX_TOKEN_CHARACTERS, TOKENS_FILE, LoggedCompletion


def rows_by_step(trainer):
    """By step, each completion that was trained on: its tokens, and what the shaping made of them."""
    rows = defaultdict(list)
    for batch in trainer.batches:
        old_per_token_logps = batch.get("old_per_token_logps", batch["per_token_logps"])
        mask = batch["completion_mask"].bool()
        for i, advantage in enumerate(batch["advantages"].tolist()):
            counts = mask[i]
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            rows[batch["step"] + 1].append(
                {
                    "prompt": trainer.processing_class.decode(prompt),
                    "ids": batch["completion_ids"][i][counts].tolist(),
                    "advantage": advantage,
                    "weights": (batch["shaped"][i].expand(len(counts))[counts] / advantage).tolist(),
                    "probs": old_per_token_logps[i][counts].exp().tolist(),
                    "entropies": batch["entropies"][i][counts].tolist(),
                }
            )
    return rows


def logging_trainer(output_dir, **fields):
    """A recorder that logs tokens at every other step."""
    fields = {"log_tokens": 2, "max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 16, **fields}
    return make(output_dir, Recorder, **fields)


def logging_run(output_dir, resume=None, **fields):
    """The same, trained."""
    trainer = logging_trainer(output_dir, **fields)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(output_dir):
    with Path(output_dir, TOKENS_FILE).open("rb") as lines:
        return [LoggedCompletion.from_line(line) for line in lines]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"num_iterations": 2, **tiny.PLAIN},
        {"token_metric": "entropy", "mask_truncated_completions": True, "max_completion_length": 24},
        {"importance_sampling_level": "sequence", "num_iterations": 2},
        {"positive_low_scale": 1.0, "negative_high_scale": 1.0, "positive_weight": 2.0},
    ],
    ids=str,
)
def test_the_values_are_those_of_the_shaping(fields, tmp_path):
    trainer = logging_run(tmp_path, scale_decay="constant", **fields)
    rows = rows_by_step(trainer)
    completions = logged(tmp_path)
    assert {completion.step for completion in completions} == {2, 4}
    for completion in completions:
        (row,) = [  # of two equal completions of a prompt, one
            row
            for row in rows[completion.step]
            if row["prompt"] == completion.prompt
            and row["advantage"] == pytest.approx(completion.advantage)
            and row["probs"] == pytest.approx(completion.probs, rel=1e-3)
        ][:1]
        assert "".join(completion.tokens) == trainer.processing_class.decode(row["ids"])
        assert completion.length == len(completion.tokens) == len(row["ids"])
        assert completion.weights == pytest.approx(row["weights"], rel=1e-3)
        assert completion.entropies == pytest.approx(row["entropies"], rel=1e-3)
        assert completion.reward == tiny.parity_reward([row["ids"]])[0]
    assert any(weight != 1 for completion in completions for weight in completion.weights)


def test_of_each_prompt_the_most_telling_completions_of_both_polarities(tmp_path):
    trainer = logging_run(tmp_path, num_generations=8, reward_funcs=tiny.digit_reward)
    rows = rows_by_step(trainer)
    by_prompt = defaultdict(list)
    for completion in logged(tmp_path):
        by_prompt[completion.step, completion.prompt].append(completion.advantage)
    assert Counter(step for step, _ in by_prompt) == {2: 2, 4: 2}
    for (step, prompt), advantages in by_prompt.items():
        of_all = sorted(row["advantage"] for row in rows[step] if row["prompt"] == prompt)
        positive, negative = [a for a in of_all if a > 0], [a for a in of_all if a < 0]
        assert positive
        assert negative
        assert advantages == pytest.approx([*positive[:-3:-1], *negative[:2]], rel=1e-3)


def test_of_equal_completions_one_is_written(tmp_path):
    log = TokenLog(str(tmp_path), 1, tiny.tokenizer())
    ids = torch.tensor([[5, 6], [5, 6], [6, 5], [7, 7]])
    ones, floats = torch.ones_like(ids), torch.ones(4, 2)
    inputs = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": ids, "completion_mask": ones}
    log.add({**inputs, "rewards": floats[:, 0]}, torch.tensor([1.0, 1.0, 0.5, 0.25]), floats, floats, floats)
    log.write(1)
    assert [completion.advantage for completion in logged(tmp_path)] == [1.0, 0.5]


@pytest.mark.parametrize(
    "fields",
    [
        {"per_device_train_batch_size": 16},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 16, "dynamic_sampling": 2},
        {"per_device_train_batch_size": 8, "steps_per_generation": 2, "num_iterations": 2},
    ],
    ids=str,
)
def test_groups_with_one_question_are_not_mixed(fields, tmp_path):
    """As with different pictures: neither the token ids of prompts nor the positions of rows tell groups apart."""
    levels = itertools.count(1)

    def reward(completion_ids, **kwargs):
        """Shows the group in the reward: another hundred in each."""
        values = []
        for start in range(0, len(completion_ids), 4):
            level = 100.0 * next(levels)
            values += [level + sum(ids) % 2 for ids in completion_ids[start : start + 4]]
        return values

    question = tiny.prompts().map(lambda row: {"prompt": "which one?"})
    arguments = {"train_dataset": question}
    train(tmp_path, reward_funcs=reward, arguments=arguments, max_steps=4, log_tokens=4, **fields)
    groups = defaultdict(list)
    for completion in logged(tmp_path):
        groups[completion.step, completion.group].append(completion.reward // 100)
    assert all(len({*levels}) == 1 for levels in groups.values())
    by_step = [[levels[0] for (step, _), levels in groups.items() if step == each] for each in (1, 2, 3, 4)]
    assert all(len({*levels}) == len(levels) for levels in by_step)
    assert max(map(len, by_step)) > 1
    assert max(map(len, groups.values())) > 1


def test_completions_without_an_advantage_are_left_out(tmp_path):
    logging_run(tmp_path, reward_funcs=tiny.equal_reward)
    assert not (tmp_path / TOKENS_FILE).exists()


def test_off_leaves_nothing(tmp_path):
    trainer = logging_run(tmp_path, log_tokens=0)
    assert not (tmp_path / TOKENS_FILE).exists()
    assert not any(isinstance(callback, TokenLog) for callback in trainer.callback_handler.callbacks)


def test_training_is_the_same_to_the_last_bit(tmp_path):
    on, off = (logging_run(tmp_path / str(prompts), log_tokens=prompts) for prompts in (2, 0))
    assert_same_update(on, off)


def test_the_host_waits_at_logs_alone(tmp_path):
    # Tensors of the device "meta" have no values: whatever would make the host wait for one fails.
    log = TokenLog(str(tmp_path), 2, tiny.tokenizer())
    matrix = torch.empty(4, 8, device="meta")
    rows = torch.empty(4, device="meta")
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    log.add({**dict.fromkeys(names, matrix), "rewards": rows}, rows, matrix, matrix, matrix)
    total_rewards(torch.empty(4, 2, device="meta"), torch.empty(2, device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        log.write(1)


def test_evaluation_is_not_logged(tmp_path):
    fields = {"log_tokens": 4, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 8}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = logging_trainer(tmp_path, arguments={"eval_dataset": tiny.prompts(8)}, **fields, **evaluation)
    trainer.train()
    trainer.evaluate()
    assert {completion.step for completion in logged(tmp_path)} == {1, 2}
    assert len(logged(tmp_path)) <= 2 * 2 * 4
    assert len(trainer.batches) > 2  # it is shaped as well


# Bounds


class Shouting:
    """A tokenizer whose every token is long."""

    def decode(self, ids, **kwargs):
        return "".join(chr(0x1F600 + number) * 1000 for number in ids)


def test_a_line_is_bounded(tmp_path):
    log = TokenLog(str(tmp_path), 1, Shouting())
    ids = torch.arange(5000)[None] % 50
    ones, floats = torch.ones_like(ids), torch.full(ids.shape, -math.pi * 1e-9)
    inputs = {"prompt_ids": ids, "prompt_mask": ones, "completion_ids": ids, "completion_mask": ones}
    log.add({**inputs, "rewards": floats[:, 0]}, -floats[:, 0], floats, floats, floats)
    log.write(1)
    (line,) = (tmp_path / TOKENS_FILE).read_bytes().splitlines()
    assert len(line) < MAX_LINE_BYTES
    completion = LoggedCompletion.from_line(line)
    assert completion.length == 5000
    assert len(completion.tokens) == len(completion.probs) == 1024
    assert {len(text) for text in completion.tokens} == {MAX_TOKEN_CHARACTERS}
    assert len(completion.prompt) == token_log.MAX_PROMPT_CHARACTERS


def test_what_is_not_finite_or_does_not_count_is_not_a_number(tmp_path):
    log = TokenLog(str(tmp_path), 1, tiny.tokenizer())
    ids = torch.tensor([[5, 6, 7, 0]])
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.tensor([[0, 1, 1, 1]]),
        "completion_ids": ids,
        "completion_mask": torch.tensor([[1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1]]),
        "rewards": torch.tensor([math.inf]),
    }
    shaped, entropies = torch.tensor([[2.0, 0.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, math.nan, 1.0]])
    log.add(inputs, torch.ones(1), shaped, torch.zeros(1, 4), entropies)
    log.write(1)
    (completion,) = logged(tmp_path)
    assert completion.reward is None
    assert (completion.weights, completion.probs) == ([2.0, None, 1.0], [1.0, None, 1.0])
    assert completion.entropies == [1.0, None, None]


def test_total_rewards_are_those_of_trl():
    nan = math.nan
    rewards = total_rewards(torch.tensor([[1.0, 2.0], [nan, 2.0], [nan, nan]]), torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(rewards, torch.tensor([2.0, 1.0, nan]), equal_nan=True)


class Bytes:
    """A tokenizer whose tokens are bytes, and that leaves out a space in front."""

    def decode(self, ids, **kwargs):
        return bytes(ids).decode(errors="replace").removeprefix(" ")


def test_token_texts_join_to_the_text():
    text = "Grüße, 日本 👩‍🔬  a"
    texts = token_texts(Bytes(), list(text.encode()))
    assert "".join(texts) == text
    assert texts[2:6] == ["", "ü", "", "ß"]
    assert token_texts(Bytes(), [0xFF, 0x41]) == ["", "\N{REPLACEMENT CHARACTER}A"]
    assert token_texts(Bytes(), [0x41, 0xE2]) == ["A", "\N{REPLACEMENT CHARACTER}"]
    assert token_texts(Bytes(), []) == []


# The file over a life of training


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    logging_run(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    whole = logged(tmp_path)
    with (tmp_path / TOKENS_FILE).open("ab") as file:
        file.write(b'{"step": 6, "prom')  # torn by a crash
    logging_run(tmp_path, max_steps=6, save_strategy="steps", save_steps=2, resume=str(tmp_path / "checkpoint-4"))
    resumed = logged(tmp_path)
    assert [completion.step for completion in resumed] == sorted(completion.step for completion in resumed)
    until_the_checkpoint = [completion for completion in whole if completion.step <= 4]
    assert resumed[: len(until_the_checkpoint)] == until_the_checkpoint
    assert {completion.step for completion in resumed} == {2, 4, 6}
    assert not list(tmp_path.glob("*.partial"))


def test_a_new_run_in_the_directory_starts_anew(tmp_path):
    for _ in range(2):
        logging_run(tmp_path, logging_strategy="epoch", max_steps=5)
    steps = [completion.step for completion in logged(tmp_path)]
    assert steps == sorted(steps)
    assert max(Counter(steps).values()) <= 8


@pytest.mark.slow
def test_of_two_processes_the_main_one_writes(model_dir, tmp_path):
    worker = Path(__file__).parents[1] / "engines" / "distributed_worker.py"
    launcher = [sys.executable, *processes.torchrun()]
    cases = json.dumps({"logged": {"log_tokens": 8}})
    subprocess.run([*launcher, worker, model_dir, tmp_path, cases], capture_output=True, timeout=300)
    assert (tmp_path / "1.pt").exists()
    completions = logged(tmp_path)
    steps = Counter(completion.step for completion in completions)
    # It has the four rows of one of the two prompts.
    assert steps.keys() <= {2, 4}
    assert steps
    assert max(steps.values()) <= 4
    assert {completion.reward for completion in completions} == {0.0, 1.0}
    for completion in completions:
        assert (completion.advantage > 0) == (completion.reward == 1.0)


# A line


LINE = LoggedCompletion(3, "1+1=", 1.0, 0.5, 1, ["\ud800\u2028\n<"], [2.0], [0.25], [None])


def test_a_line_of_an_earlier_release_has_no_group():
    line = LINE.to_line()
    assert '"group":0' in line
    assert LoggedCompletion.from_line(line.replace(',"group":0', "")) == LINE


def test_a_line_is_ascii_and_comes_back():
    line = LINE.to_line()
    assert line.isascii()
    assert line.count("\n") == 1
    assert LoggedCompletion.from_line(line) == LINE


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        LINE.to_line()[:-9],
        LINE.to_line().replace('"step":3', '"step":"3"'),
        LINE.to_line().replace('"step":3', '"step":-3'),
        LINE.to_line().replace('"step":3', '"step":true'),
        LINE.to_line().replace('"step":3', f'"step":1{"0" * 5000}'),
        LINE.to_line().replace("[2.0]", "[2.0,2.0]"),
        LINE.to_line().replace("[2.0]", "[NaN]"),
        LINE.to_line().replace("[2.0]", f"[1{'0' * 400}]"),
        LINE.to_line().replace("[2.0]", '["<b>"]'),
        LINE.to_line().replace("[2.0]", "2.0"),
        LINE.to_line().replace('"advantage":0.5', '"advantage":null'),
        LINE.to_line().replace('"prompt":"1+1="', '"prompt":{}'),
        LINE.to_line().replace('"group":0', '"group":-1'),
    ],
    ids=range(19),
)
def test_whatever_else_is_refused(line):
    with pytest.raises(ValueError, match=r"^not a logged completion"):
        LoggedCompletion.from_line(line)
