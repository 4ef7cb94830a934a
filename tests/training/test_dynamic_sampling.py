"""Groups with nothing to learn from make room for groups of fresh prompts, and every row stays with its own."""

import math
import re
from collections import Counter
from itertools import islice

import pytest
import torch
import trl
from datasets import IterableDataset
from packaging.version import Version
from peft import PromptTuningConfig
from support import tiny
from support.runs import (
    ENVIRONMENTS,
    ROLLOUT_FUNCTION,
    TEXT_WITH_PROCESSOR,
    TOOLS,
    images,
    images_without_column,
    make_run,
    text_with_processor,
)
from support.training import SGD, Recorder, StopAfter, assert_same_update, gpt2, make, moved

from trl_a3po.training.dynamic_sampling import fresh_prompts, live_groups, pair_groups, swap_groups


COUNTS = ("rounds", "discarded", "unused", "unfilled")

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are using 'rollout_func':UserWarning", "ignore:You are using 'environment_factory':UserWarning"
)


# The pure functions


def test_prompts_are_drawn_in_an_order_of_each_step_without_end():
    drawn = list(islice(fresh_prompts(7, seed=3, step=5), 14))
    assert sorted(drawn[:7]) == sorted(drawn[7:]) == list(range(7))
    assert drawn[:7] != drawn[7:]
    assert list(islice(fresh_prompts(7, seed=3, step=5), 14)) == drawn
    assert list(islice(fresh_prompts(7, seed=3, step=6), 14)) != drawn
    assert list(islice(fresh_prompts(7, seed=4, step=5), 14)) != drawn


@pytest.mark.parametrize("size", [2, 3, 8])
def test_groups_are_live_that_have_a_spread_and_a_gradient(size):
    generator = torch.Generator().manual_seed(size)
    advantages = torch.randint(-1, 2, (200, size), generator=generator).float()
    has_gradient = torch.rand(200, size, generator=generator) < 0.3
    expected = [
        len(set(values)) > 1 and any(gradients)
        for values, gradients in zip(advantages.tolist(), has_gradient.tolist(), strict=True)
    ]
    assert live_groups(advantages.view(-1), has_gradient.view(-1), size) == expected
    assert len(set(expected)) == 2


def test_groups_are_paired_in_order():
    assert pair_groups([True, False, False], [False, True, True]) == [(1, 1), (2, 2)]
    assert pair_groups([False, True, False], [False, False, True]) == [(0, 2)]
    assert pair_groups([True, True], [True, True]) == []
    assert pair_groups([False, False], [False, False]) == []


def rollout_of(rows, pad_token_id):
    """As TRL makes it, of rows of Python lists."""
    prompt_width = max(len(row["prompt_ids"]) for row in rows)
    width = max(len(row["completion_ids"]) for row in rows)

    def padded(key, value, dtype=torch.float32):
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows], dtype=dtype)

    def left(key, value):
        return torch.tensor([[value] * (prompt_width - len(row[key])) + row[key] for row in rows])

    for row in rows:
        row["prompt_mask"] = [1] * len(row["prompt_ids"])
        row["completion_mask"] = [1] * len(row["completion_ids"])
    return {
        "prompt_ids": left("prompt_ids", pad_token_id),
        "prompt_mask": left("prompt_mask", 0),
        "completion_ids": padded("completion_ids", pad_token_id, torch.long),
        "completion_mask": padded("completion_mask", 0, torch.long),
        "tool_mask": padded("tool_mask", 1, torch.long),
        "old_per_token_logps": padded("logps", 0.0),
        "importance_sampling_ratio": padded("ratios", 1.0),  # of tokens; those of sequences are
        "sequence_ratio": torch.tensor([[row["ratios"][0]] for row in rows]),
        "advantages": torch.tensor([row["advantage"] for row in rows]),
        "text": [row["text"] for row in rows],
        "num_items_in_batch": torch.tensor(7),
        "rewards": None,
    }


def random_rows(count, longest, generator):
    rows = []
    for _ in range(count):
        prompt, length = (int(torch.randint(1, longest, (), generator=generator)) for _ in range(2))
        numbers = torch.randn(length, generator=generator).tolist()
        rows.append(
            {
                "prompt_ids": torch.randint(10, 99, (prompt,), generator=generator).tolist(),
                "completion_ids": torch.randint(10, 99, (length,), generator=generator).tolist(),
                "tool_mask": [int(number > 0) for number in numbers],
                "logps": numbers,
                "ratios": numbers,
                "advantage": numbers[-1],
                "text": str(numbers),
            }
        )
    return rows


@pytest.mark.parametrize("widths", [(5, 9), (9, 5), (7, 7)], ids=str)
@pytest.mark.parametrize("swaps", [[], [(1, 0)], [(0, 2), (2, 3)], [(0, 0), (1, 1), (2, 2), (3, 3)]], ids=str)
def test_swapped_groups_are_what_would_have_been_padded_together(swaps, widths):
    generator = torch.Generator().manual_seed(0)
    rows, fresh_rows = (random_rows(12, longest, generator) for longest in widths)
    rollout, fresh = rollout_of(rows, pad_token_id=3), rollout_of(fresh_rows, pad_token_id=3)
    kept = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in rollout.items()}
    swapped = swap_groups(rollout, fresh, swaps, num_generations=3, pad_token_id=3)

    expected_rows = [rows[first : first + 3] for first in range(0, 12, 3)]
    for place, group in swaps:
        expected_rows[place] = fresh_rows[3 * group : 3 * group + 3]
    # With all rows of both, so that it is as wide, and then without the others.
    expected = rollout_of([row for group in expected_rows for row in group] + rows + fresh_rows, pad_token_id=3)
    assert swapped.keys() == expected.keys()
    for key, value in swapped.items():
        if isinstance(value, torch.Tensor) and value.dim():
            assert value.dtype == expected[key].dtype
            assert torch.equal(value, expected[key][:12]), key
        else:
            assert value == (expected[key][:12] if key == "text" else rollout[key])
    for key, value in kept.items():
        assert torch.equal(rollout[key], value) if isinstance(value, torch.Tensor) else rollout[key] == value


def test_rounds_that_do_not_hold_the_same_are_refused():
    rows = random_rows(4, 5, torch.Generator().manual_seed(0))
    rollout, fresh = rollout_of(rows, 0), rollout_of(rows, 0)
    del fresh["tool_mask"]
    with pytest.raises(ValueError, match=r"only one has `tool_mask`\. Return the same fields from every call of"):
        swap_groups(rollout, fresh, [(0, 1)], 2, 0)


# The trainer


def number(prompt):
    return int(prompt.split("+")[0])


def teaches(prompt):
    return number(prompt) % 3 != 0


def reward(prompts, completion_ids, **kwargs):
    """The same for all completions of every third prompt; of eight times 0.3 the mean in float32 is another number."""
    parity = tiny.parity_reward(completion_ids)
    return [value if teaches(prompt) else 0.3 for prompt, value in zip(prompts, parity, strict=True)]


def half_right(prompts, completion_ids, **kwargs):
    return [float(row % 2) for row in range(len(prompts))]


def ids_of(prompt, trainer):
    return [5] * (number(prompt) % 4) + trainer.processing_class(prompt)["input_ids"]


def rollout(prompts, trainer):
    """Prompts and completions of many lengths. Those of some prompts have no end: to TRL, they are truncated."""
    prompt_ids = [ids_of(prompt, trainer) for prompt in prompts]
    completion_ids = []
    for prompt in prompts:
        length = int(torch.randint(1, 12, ()))
        tokens = torch.randint(3, 40, (length,)).tolist()
        completion_ids.append([*tokens, 7 if number(prompt) % 5 == 1 else 1])
    logprobs = [[-3.0 - 0.1 * (t % 3) for t in range(len(ids))] for ids in completion_ids]
    env_mask = [[int(t % 4 != 1) for t in range(len(ids))] for ids in completion_ids]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs, "env_mask": env_mask}


class RoundsRecorder(Recorder):
    """Also keeps the prompts and rounds of each generation batch, and the rollout that was made of them."""

    def __init__(self, *args, **kwargs):
        self.prompts, self.rounds, self.rollouts = [], [], []
        super().__init__(*args, **kwargs)

    def _sample_round(self, inputs):
        output = super()._sample_round(inputs)
        self.prompts[-1].append([row["prompt"] for row in inputs])
        self.rounds[-1].append({**output})
        return output

    def _generate_and_score_completions(self, inputs):
        self.prompts.append([])
        self.rounds.append([])
        self.rollouts.append(super()._generate_and_score_completions(inputs))
        return self.rollouts[-1]


def sampler(output_dir, trainer_class=RoundsRecorder, arguments=None, **fields):
    """A trainer that replaces groups without a signal."""
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "num_generations": 8,
        "max_completion_length": 12,
        "dynamic_sampling": 3,
        **SGD,
    }
    arguments = {"train_dataset": tiny.prompts(24), **(arguments or {})}
    return make(output_dir, trainer_class, reward_funcs=reward, arguments=arguments, **{**defaults, **fields})


def sampled(*args, **kwargs):
    """The same, trained."""
    trainer = sampler(*args, **kwargs)
    trainer.train()
    return trainer


def rows_of(rollout):
    """The rows of a rollout without their padding."""
    rows = []
    for i, ids in enumerate(rollout["completion_ids"]):
        length = int((ids != 0).sum())
        row = {"prompt_ids": rollout["prompt_ids"][i][rollout["prompt_mask"][i].bool()].tolist()}
        for key in rollout.keys() - {"prompt_ids", "prompt_mask", "num_items_in_batch"}:
            value = rollout[key][i]
            row[key] = value[:length].tolist() if value.dim() else value.item()
        rows.append(row)
    return rows


def groups_of(rows, size):
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def rows_trained_on(batch):
    """What of each row is known of a micro-batch too."""
    completions = [tuple(ids[ids != 0].tolist()) for ids in batch["completion_ids"]]
    return list(zip(completions, batch["advantages"].tolist(), batch["rewards"].tolist(), strict=True))


def assert_trains_on(trainer, rollouts):
    """The loss gets every row of the rollouts as often as it is due, in whichever micro-batch."""
    args = trainer.args
    trained = [row for batch in trainer.batches for row in rows_trained_on(batch)]
    uses = args.steps_per_generation * trainer.num_iterations * args.per_device_train_batch_size
    assert len(trained) == args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size
    assert len(rollouts) == math.ceil(len(trained) / uses)
    for number, rollout in enumerate(rollouts):
        given = Counter(trained[number * uses : (number + 1) * uses])
        due = Counter(rows_trained_on(rollout) * trainer.num_iterations)
        assert given == due if given.total() == uses else given < due


def expected_batch(rounds, is_live, size):
    """By the definition, one group after the other."""
    batch, *others = (groups_of(rows_of(each), size) for each in rounds)
    for fresh in others:
        fresh = [group for group in fresh if is_live(group)]
        for place, group in enumerate(batch):
            if not is_live(group) and fresh:
                batch[place] = fresh.pop(0)
    return [row for group in batch for row in group]


def logged(trainer, name):
    """Of the steps that began with a generation batch."""
    name = f"a3po/dynamic_sampling/{name}"
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def counts(trainer):
    return {name: logged(trainer, name) for name in COUNTS}


RUNS = {
    **{loss: {"loss_type": loss} for loss in tiny.LOSS_TYPES},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "two iterations, plain": {"num_iterations": 2, "max_steps": 4, **tiny.PLAIN},
    "generation larger than accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 8},
    "generation smaller than accumulation": {"steps_per_generation": 4},
    "KL": {"beta": 0.1},
    "KL, plain": {"beta": 0.1, **tiny.PLAIN},
    "truncated completions masked": {"mask_truncated_completions": True, "num_iterations": 2},
    "rewards unscaled": {"scale_rewards": "none"},
    "positive samples alone": {"negative_weight": 0.0, "negative_high_scale": 1.0},
    "padding to a multiple": {"pad_to_multiple_of": 8},
}


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS.keys())
def test_every_row_is_that_of_the_definition(fields, model_dir, tmp_path):
    trainer = sampled(tmp_path, arguments={"model": model_dir, "rollout_func": rollout}, **fields)
    size = trainer.num_generations

    def is_live(group):
        return len({row["rewards"] for row in group}) > 1 and any(
            row["advantages"] * (row["advantages"] > 0 or trainer.args.negative_weight)
            and any(a and b for a, b in zip(row["completion_mask"], row["tool_mask"], strict=True))
            for row in group
        )

    prompt_of = {tuple(ids_of(prompt, trainer)): prompt for prompt in trainer.train_dataset["prompt"]}
    for rounds, batch in zip(trainer.rounds, trainer.rollouts, strict=True):
        rows = rows_of(batch)
        assert rows == expected_batch(rounds, is_live, size)
        assert len(rows) == len(rounds[0]["advantages"])
        for group in groups_of(rows, size):
            (prompt,) = {prompt_of[tuple(row["prompt_ids"])] for row in group}
            rewards = reward([prompt] * size, [row["completion_ids"] for row in group])
            assert [row["rewards"] for row in group] == pytest.approx(rewards)
        assert len(rounds) == 4 or all(is_live(group) for group in groups_of(rows, size))
        if len(rounds) > 1:
            masks = [zip(row["completion_mask"], row["tool_mask"], strict=True) for row in rows]
            assert batch["num_items_in_batch"].tolist() == sum(a * b for mask in masks for a, b in mask)
    assert any(len(rounds) > 1 for rounds in trainer.rounds)
    assert sum(logged(trainer, "discarded")) > 0
    assert_trains_on(trainer, trainer.rollouts)
    assert all(value.isfinite().all() for value in tiny.parameters(trainer).values())


class Rescoring(RoundsRecorder):
    """Computes the log-probabilities of each batch again, before it is trained on."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        ids, mask = (
            torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], dim=1) for what in ("ids", "mask")
        )
        with torch.no_grad():
            logps, *_ = self._get_per_token_logps_and_entropies(
                self.model, ids, mask, batch["completion_ids"].shape[1]
            )
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            counts = batch["completion_mask"].bool() & (self.state.global_step == 0 or name.startswith("old"))
            torch.testing.assert_close(batch[name][counts], logps[counts], rtol=0, atol=1e-4)
        return batch


def test_in_another_batch_log_probabilities_are_the_same(model_dir, tmp_path):
    arguments = {"model": model_dir, "rollout_func": rollout}
    trainer = sampled(tmp_path, Rescoring, arguments, num_iterations=2, beta=0.1, max_steps=4)
    widths = [{each["prompt_ids"].shape[1] for each in rounds} for rounds in trainer.rounds]
    assert any(len(each) > 1 for each in widths)


def test_all_that_is_trained_on_teaches(tmp_path):
    """Of completions that the model samples."""
    trainer = sampled(tmp_path, dynamic_sampling=8, max_steps=4)
    assert logged(trainer, "unfilled") == [0, 0, 0, 0]
    assert max(logged(trainer, "rounds")) > 0
    assert_trains_on(trainer, trainer.rollouts)
    for batch in trainer.rollouts:
        assert (batch["advantages"].view(-1, 8) != 0).any(1).all()


def test_the_counts_add_up(tmp_path):
    trainer = sampled(tmp_path, max_steps=18, dynamic_sampling=2)
    for rounds, batch, *numbers in zip(trainer.rounds, trainer.rollouts, *counts(trainer).values(), strict=True):
        of_batch, *of_rounds = (
            live_groups(each["advantages"], each["advantages"] != 0, 8) for each in (batch, *rounds)
        )
        dead = sum(live.count(False) for live in of_rounds)
        discarded = dead - of_batch.count(False)
        assert numbers == [len(rounds) - 1, discarded, 4 * (len(rounds) - 1) - discarded, of_batch.count(False)]
    assert {len(rounds) for rounds in trainer.rounds} >= {2, 3}


def test_rounds_that_find_nothing_leave_the_ordinary_batch(tmp_path):
    arguments = {"reward_funcs": tiny.equal_reward}
    trainer = sampled(tmp_path, arguments=arguments, dynamic_sampling=2)
    plain = sampled(tmp_path, arguments=arguments, dynamic_sampling=0)
    for rounds, prompts, batch in zip(trainer.rounds, trainer.prompts, trainer.rollouts, strict=True):
        assert len(rounds) == 3
        assert len({tuple(each) for each in prompts}) == 3
        assert rows_of(batch) == rows_of(rounds[0])
    assert [each[0] for each in trainer.prompts] == [each[0] for each in plain.prompts]
    assert counts(trainer) == {"rounds": [2] * 3, "discarded": [8] * 3, "unused": [0] * 3, "unfilled": [4] * 3}
    assert not moved(trainer)


def test_where_all_groups_teach_it_is_off_to_the_last_bit(tmp_path):
    on, off = (
        sampled(tmp_path, arguments={"reward_funcs": half_right}, dynamic_sampling=rounds, num_iterations=2)
        for rounds in (3, 0)
    )
    assert_same_update(on, off)
    assert counts(on) == {"rounds": [0, 0], "discarded": [0, 0], "unused": [0, 0], "unfilled": [0, 0]}
    for ours, theirs in zip(on.state.log_history[:-1], off.state.log_history[:-1], strict=True):
        added = ("a3po/dynamic_sampling/", "signal/sampled/")
        assert {name for name in ours if not name.startswith(added)} == theirs.keys()
        assert all(ours[name] == theirs[name] for name in theirs if not name.startswith("step_time"))


def test_metrics_of_trl_are_those_of_all_that_was_sampled(tmp_path):
    trainer = sampled(tmp_path, arguments={"rollout_func": rollout}, max_steps=4)
    assert {len(rounds) for rounds in trainer.rounds} >= {2}
    for rounds, entry in zip(trainer.rounds, trainer.state.log_history[:-1], strict=True):
        assert entry["reward"] == pytest.approx(float(torch.cat([each["rewards"] for each in rounds]).mean()))


def test_evaluation_takes_what_comes(tmp_path):
    trainer = sampler(
        tmp_path,
        arguments={"reward_funcs": tiny.equal_reward, "eval_dataset": tiny.prompts(4)},
        per_device_eval_batch_size=8,
    )
    metrics = trainer.evaluate()
    assert [len(rounds) for rounds in trainer.rounds] == [1] * 4
    assert not any("dynamic_sampling" in name for name in metrics)


@pytest.mark.parametrize("fields", [tiny.PLAIN, {"num_iterations": 2}], ids=["plain", "reused"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(fields, model_dir, tmp_path):
    fields = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch", **fields}
    whole = sampled(tmp_path / "whole", arguments={"model": model_dir}, **fields)
    sampled(tmp_path / "parts", arguments={"model": model_dir, "callbacks": [StopAfter(4)]}, **fields)
    resumed = sampler(tmp_path / "parts", arguments={"model": model_dir}, **fields)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.prompts == whole.prompts[-len(resumed.prompts) :]
    assert any(len(prompts) > 1 for prompts in resumed.prompts)
    assert_same_update(resumed, whole)
    assert counts(resumed) == counts(whole)


@pytest.mark.parametrize("fields", [RUNS["two iterations"], {"steps_per_generation": 16, "max_steps": 4}], ids=str)
def test_the_update_is_the_same_from_fewer_cells(fields, tmp_path):
    plain, saved = (
        sampled(tmp_path, arguments={"rollout_func": rollout}, **fields, **savings) for savings in (tiny.PLAIN, {})
    )
    assert max(logged(plain, "rounds")) > 0
    start = dict(tiny.model().named_parameters())
    for name, value in tiny.parameters(plain).items():
        assert not torch.equal(start[name], value)
        torch.testing.assert_close(tiny.parameters(saved)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", [ROLLOUT_FUNCTION, TOOLS, ENVIRONMENTS, TEXT_WITH_PROCESSOR])
def test_other_rollouts(run, tmp_path):
    trainer = make_run(run, tmp_path, RoundsRecorder, dynamic_sampling=4, num_generations=2)
    trainer.train()
    assert max(logged(trainer, "rounds")) > 0
    assert max(logged(trainer, "unfilled")) == 0
    for rounds, batch in zip(trainer.rounds, trainer.rollouts, strict=True):
        assert "tool_mask" in batch or run is text_with_processor
        assert batch["advantages"].view(-1, 2).any(1).all()
        sampled = [row for each in rounds for row in rows_of(each)]
        assert all(row in sampled for row in rows_of(batch))


# What is refused


def refusal(model_dir, output_dir, run):
    if run == "stream":
        if Version(trl.__version__) < Version("1.9"):
            pytest.skip("this TRL refuses it itself")
        stream = IterableDataset.from_generator(lambda: iter([{"prompt": "1+1="}]))
        return sampler(output_dir, arguments={"model": model_dir, "train_dataset": stream})
    if run == "positions":
        return sampler(output_dir, arguments={"model": gpt2()})
    if run == "virtual tokens":
        adapter = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        return sampler(output_dir, arguments={"model": model_dir, "peft_config": adapter})
    return make_run(images, output_dir, dynamic_sampling=3)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("stream", "a dataset without an index (`IterableDataset`). Pass a `Dataset`, or set `dynamic_sampling=0`."),
        ("positions", "models or adapters whose output depends on padding"),
        ("virtual tokens", "models or adapters whose output depends on padding"),
        ("images", "images. Train on text only, or set `dynamic_sampling=0`."),
    ],
)
def test_refuses_at_construction(run, message, model_dir, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"`dynamic_sampling=3` does not work with {message}")):
        refusal(model_dir, tmp_path, run)


def test_refuses_images_that_no_column_names(tmp_path):
    trainer = make_run(images_without_column, tmp_path, dynamic_sampling=3)
    with pytest.raises(ValueError, match=re.escape("`dynamic_sampling=3` does not work with images.")):
        trainer.train()
