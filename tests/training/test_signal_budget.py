"""The shares of what has a learning signal: against their definition, over micro-batches, losses and rounds."""

import math
import time
from pathlib import Path

import pytest
import torch
from support import tiny
from support.training import make, train
from transformers import TrainerCallback

from trl_a3po import A3POTrainer
from trl_a3po.training.signal_budget import (
    REASONS,
    TOKEN_REASONS,
    SignalBudget,
    count_reasons,
    count_tokens,
    mismatch,
    mismatch_sums,
    parses_solutions,
    reward_reasons,
    rollout_reasons,
    trained_reasons,
)


NAN = math.nan


def named(numbers):
    return [list(REASONS)[number] for number in numbers.tolist()]


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ([[1.0, 1.0], [1.0, 1.0]], "all_right"),
        ([[1.0, NAN], [1.0, 1.0]], "signal"),  # 1 and 2
        ([[0.0, 0.0], [0.0, 0.0]], "all_wrong"),
        ([[-1.0, NAN], [-1.0, NAN]], "all_wrong"),
        ([[0.5, 0.5], [0.5, 0.5]], "all_equal"),
        ([[-0.5, 0.0], [-0.5, 0.0]], "all_equal"),
        ([[1.0, 0.0], [0.0, 1.0]], "all_equal"),  # the sums are equal
        ([[1.0, 0.0], [0.0, 0.0]], "signal"),
    ],
)
def test_the_reason_that_the_rewards_of_a_group_give(rewards, reason):
    rewards = torch.tensor(rewards)
    assert named(reward_reasons(rewards, torch.ones(2), [False, False], 2, by_function=False)) == [reason] * 2


@pytest.mark.parametrize("by_function", [False, True])
@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ([[1.0, 1.0], [1.0, 0.0]], "all_right"),
        ([[0.0, 0.3], [0.0, 0.3]], "all_wrong"),
        ([[0.5, 1.0], [0.5, 1.0]], "all_equal"),
        ([[0.0, 1.0], [1.0, 1.0]], "signal"),
    ],
)
def test_functions_of_weight_0_are_only_logged(rewards, reason, by_function):
    weights = torch.tensor([2.0, 0.0])
    assert named(reward_reasons(torch.tensor(rewards), weights, [False] * 2, 2, by_function)) == [reason] * 2


@pytest.mark.parametrize("by_function", [False, True])
def test_groups_that_only_functions_of_weight_0_scored_are_unscored(by_function):
    rewards, weights = torch.tensor([[NAN, 0.3], [NAN, 0.3]]), torch.tensor([2.0, 0.0])
    for parses, reason in (([True, False], "unparsable"), ([False, False], "unscored")):
        assert named(reward_reasons(rewards, weights, parses, 2, by_function)) == [reason] * 2


def test_a_completion_that_only_a_function_of_weight_0_scored_has_a_reward_of_0():
    """In TRL its sum counts, if the sums are normalized. If each function is, the completion is left out."""
    rewards, weights = torch.tensor([[NAN, 1.0], [1.0, 1.0]]), torch.tensor([2.0, 0.0])
    assert named(reward_reasons(rewards, weights, [False] * 2, 2, by_function=False)) == ["signal"] * 2
    assert named(reward_reasons(rewards, weights, [False] * 2, 2, by_function=True)) == ["all_right"] * 2


def test_functions_that_are_normalised_one_by_one_give_a_signal_each():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert named(reward_reasons(rewards, torch.ones(2), [False] * 2, 2, by_function=True)) == ["signal"] * 2


def test_completions_that_nothing_scored():
    rewards = torch.tensor([[NAN, NAN], [1.0, NAN], [NAN, NAN], [NAN, NAN]])
    reasons = reward_reasons(rewards, torch.ones(2), [True, False], 2, by_function=False)
    assert named(reasons) == ["unparsable", "all_right", "unparsable", "unparsable"]
    reasons = reward_reasons(rewards, torch.ones(2), [False, False], 2, by_function=False)
    assert named(reasons) == ["unscored", "all_right", "unscored", "unscored"]


def test_whose_none_says_that_a_solution_cannot_be_parsed():
    from trl.rewards import accuracy_reward, get_soft_overlong_punishment

    import trl_a3po.rewards

    assert parses_solutions(accuracy_reward)
    assert parses_solutions(trl_a3po.rewards.accuracy_reward)
    assert parses_solutions(get_soft_overlong_punishment(10, 5))
    assert not parses_solutions(tiny.sometimes_none_reward)
    assert not parses_solutions(tiny.model().bfloat16)


def test_masks_and_advantages():
    signal, wrong = 0, list(REASONS).index("all_wrong")
    rollout = {
        "completion_mask": torch.tensor([[1, 1], [0, 0], [1, 1], [1, 0], [1, 0]]),
        "tool_mask": torch.tensor([[1, 1], [1, 1], [0, 0], [1, 1], [1, 1]]),
        "advantages": torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]),
    }
    has_gradient = torch.tensor([True, False, False, False, False])
    reasons = rollout_reasons(torch.full((5,), signal), rollout, has_gradient)
    assert named(reasons) == ["signal", "truncated", "tools", "at_mean", "weight_zero"]
    reasons = rollout_reasons(torch.full((5,), wrong), rollout, has_gradient)
    assert named(reasons) == ["all_wrong", "truncated", "tools", "all_wrong", "all_wrong"]


def test_a_shaping_of_the_users_own_decides():
    wrong = torch.full((2,), list(REASONS).index("all_wrong"))
    advantages, mask = torch.zeros(2), torch.ones(2, 3)
    shaped = torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    assert named(trained_reasons(wrong, advantages, shaped, mask, True)) == ["signal", "all_wrong"]
    assert named(trained_reasons(wrong, advantages, shaped, mask, False)) == ["all_wrong"] * 2


def test_a_token_counts_once():
    tokens = torch.tensor([[True, True, True], [True, False, False]])
    first = torch.tensor([[True, False, False], [False, False, False]])
    counts = count_tokens(tokens, {"tools": first, "off_policy": torch.tensor([[True], [False]])})
    assert dict(zip(TOKEN_REASONS, counts.tolist(), strict=True)) == {
        **dict.fromkeys(TOKEN_REASONS, 0.0),
        "tools": 1.0,
        "off_policy": 2.0,
        "trained": 1.0,
    }


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_the_mismatch_against_its_definition(mode):
    generator = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(4, 5, generator=generator)
    sampling = logps + 0.5 * torch.randn(4, 5, generator=generator)
    sampling[0, 1] = NAN
    mask = torch.arange(5) < torch.tensor([5, 3, 0, 4])[:, None]
    ratio, outside, compared = mismatch(logps, sampling, mask, mode, 0.8, 1.5)
    parts = [mismatch_sums(ratio[rows], outside[rows], compared[rows]) for rows in (slice(0, 3), slice(3, 4))]
    tokens, total, squares, beyond = sum(sums for sums, _ in parts).tolist()
    highest, minus_lowest = torch.stack([most for _, most in parts]).amax(0).tolist()

    expected = []
    for row in range(4):
        differences = [
            float(logps[row, t] - sampling[row, t]) for t in range(5) if mask[row, t] and not sampling[row, t].isnan()
        ]
        if mode.startswith("sequence"):
            differences = [sum(differences)] * len(differences)
        expected += [math.exp(difference) for difference in differences]
    assert tokens == len(expected) == 11
    assert total == pytest.approx(sum(expected))
    assert squares == pytest.approx(sum(w * w for w in expected))
    assert beyond == sum(not 0.8 <= w <= 1.5 for w in expected)
    assert (highest, -minus_lowest) == pytest.approx((max(expected), min(expected)))


def test_the_host_waits_for_nothing():
    # Tensors of the device "meta" have no values: whatever would make the host wait for one fails.
    rewards, mask = torch.empty(4, 1, device="meta"), torch.empty(4, 8, device="meta", dtype=torch.long)
    reasons = reward_reasons(rewards, torch.ones(1, device="meta"), [True], 2, by_function=False)
    advantages, logps = torch.empty(4, device="meta"), torch.empty(4, 8, device="meta")
    rollout = {"completion_mask": mask, "tool_mask": mask, "advantages": advantages}
    reasons = rollout_reasons(reasons, rollout, mask.any(1))
    reasons = trained_reasons(reasons, advantages, logps, mask, True)
    counts = count_reasons(reasons), count_tokens(mask.bool(), {"tools": ~mask.bool()})
    counts += mismatch_sums(*mismatch(logps, logps, mask, "sequence_truncate", -math.inf, 3.0))
    assert all(each.is_meta for each in counts)


# In training


def shares(entry, part):
    return {name.split("/")[-1]: value for name, value in entry.items() if name.startswith(f"signal/{part}/")}


def every_third_group(completions, **kwargs):
    """Of six groups of four: two all right, two all wrong, two with a signal in all of their completions."""
    return [float([True, False, row % 2][row // 4 % 3]) for row in range(len(completions))]


ROLLOUT = {"per_device_train_batch_size": 24, "max_steps": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), reward_funcs=every_third_group, **ROLLOUT).state.log_history


def test_shares_of_a_run(whole):
    for entry in whole[:-1]:
        found = shares(entry, "completions")
        assert {name: value for name, value in found.items() if value} == {
            name: pytest.approx(1 / 3) for name in ("signal", "all_right", "all_wrong")
        }
        assert shares(entry, "tokens") == {"trained": 1.0, "clipped_low": 0.0, "clipped_high": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6, "max_steps": 2},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6, "max_steps": 2, "trim_padding": False},
        {"per_device_train_batch_size": 8, "steps_per_generation": 3, "num_iterations": 2, "logging_steps": 6},
        {**ROLLOUT, "dynamic_sampling": 1},
    ],
    ids=["accumulated", "padded", "reused", "resampled"],
)
def test_shares_do_not_depend_on_how_the_update_is_split(options, tmp_path):
    options = {"max_steps": 6, **options}
    history = train(tmp_path, reward_funcs=every_third_group, **options).state.log_history
    for entry in history[:-1]:
        found = shares(entry, "completions")
        assert sum(found.values()) == pytest.approx(1)
        if "dynamic_sampling" in options:
            # Four groups have none, and a round of six has two with one.
            assert found["signal"] == pytest.approx(2 / 3)
            assert shares(entry, "sampled")["signal"] == pytest.approx(1 / 3)
        else:
            assert found["signal"] == pytest.approx(1 / 3)
            assert not shares(entry, "sampled")


def test_what_masks_tokens(tmp_path):
    entry = train(tmp_path, top_entropy_quantile=0.25, max_steps=1).state.log_history[0]
    found = shares(entry, "tokens")
    assert sum(found.values()) == pytest.approx(1)
    assert found["entropy_quantile"] == pytest.approx(0.75, abs=0.1)


def test_clipped_shares_are_those_of_trl(tmp_path):
    options = {"steps_per_generation": 1, "num_iterations": 3, "max_steps": 3, "epsilon": 0.01, "logging_steps": 3}
    entry = train(tmp_path, reward_funcs=lambda completions, **_: [0.0, 1.0] * 4, **options).state.log_history[0]
    found = shares(entry, "tokens")
    assert found["clipped_low"] > 0
    assert found["clipped_high"] > 0
    # TRL's is a mean over micro-batches of means over their tokens; all of these have the same tokens.
    assert found["clipped_low"] == pytest.approx(entry["clip_ratio/low_mean"])
    assert found["clipped_high"] == pytest.approx(entry["clip_ratio/high_mean"])


@pytest.mark.parametrize("delta", [None, 1.1, 1.5])
def test_clipped_tokens_are_those_whose_loss_has_no_gradient(delta, tmp_path):
    args = {"epsilon": 0.2, "epsilon_high": 0.3, "delta": delta}
    budget = SignalBudget(make(tmp_path, **args))
    log_ratio = torch.linspace(0.5, 2, 40).log().repeat(2, 1).requires_grad_()
    advantages = torch.tensor([[1.0], [-1.0]])
    ratio = log_ratio.exp()
    bounded = ratio.clamp(max=math.inf if delta is None else delta)
    torch.minimum(bounded * advantages, ratio.clamp(0.8, 1.3) * advantages).sum().backward()
    old_logps = torch.zeros_like(log_ratio)
    inputs = {"advantages": advantages, "old_per_token_logps": old_logps}
    removed = budget._removed(inputs, torch.ones_like(log_ratio), log_ratio.detach())
    assert torch.equal(removed["clipped_low"] | removed["clipped_high"], log_ratio.grad == 0)
    assert not (removed["clipped_low"] & removed["clipped_high"]).any()


def test_a_shaping_that_learns_from_equal_rewards(tmp_path):
    class AllWrong(A3POTrainer):
        def shape_advantages(self, advantages, rewards, **batch):
            return rewards - 1

    options = {"reward_funcs": lambda completions, **_: [0.0] * len(completions), "max_steps": 1}
    entry = train(tmp_path, AllWrong, **options).state.log_history[0]
    assert shares(entry, "completions")["signal"] == 1
    assert shares(entry, "completions")["all_wrong"] == 0


def test_a_polarity_of_weight_0(tmp_path):
    options = {"negative_weight": 0.0, "reward_funcs": lambda completions, **_: [0.0, 1.0] * 4, "max_steps": 1}
    entry = train(tmp_path, **options).state.log_history[0]
    found = shares(entry, "completions")
    assert (found["signal"], found["weight_zero"]) == (0.5, 0.5)


def test_evaluations_count_nothing(tmp_path):
    arguments = {"eval_dataset": tiny.prompts(4)}
    options = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2, "max_steps": 2}
    history = train(tmp_path, arguments=arguments, **options).state.log_history
    assert not any(name.startswith("eval_signal") for entry in history for name in entry)
    (entry,) = [entry for entry in history if "signal/completions/signal" in entry]
    assert sum(shares(entry, "completions").values()) == pytest.approx(1)


def test_the_document_names_every_metric():
    page = (Path(__file__).parents[2] / "docs" / "findings.md").read_text(encoding="utf-8")
    names = [f"completions/{reason}" for reason in REASONS] + [f"tokens/{reason}" for reason in TOKEN_REASONS]
    assert all(f"`signal/{name}`" in page for name in names)


class LogsBetween(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.trainer.log({"of the callback": 1.0})


def test_a_log_of_a_callback_takes_its_part_of_the_times(tmp_path):
    callback = LogsBetween()
    trainer = make(tmp_path, max_steps=3, logging_steps=3, arguments={"callbacks": [callback]})
    callback.trainer = trainer
    trainer.train()
    logs = [log for log in trainer.state.log_history if "step_time" in log]
    assert len(logs) == 2
    for log in logs:
        parts = [log[f"step_time/{part}"] for part in ("generation", "rewards", "update")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(log["step_time"])


@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 1, "steps_per_generation": 2}], ids=str)
def test_the_parts_of_a_step_add_up_to_its_time(fields, tmp_path):
    def slow_reward(**batch):
        time.sleep(0.2)
        return tiny.parity_reward(**batch)

    trainer = train(tmp_path, reward_funcs=slow_reward, max_steps=4, logging_steps=2, **fields)
    logs = trainer.state.log_history[:-1]
    assert len(logs) == 2
    for log in logs:
        parts = [log[f"step_time/{part}"] for part in ("generation", "rewards", "update")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(log["step_time"])
        assert parts[1] >= 0.2 / fields.get("steps_per_generation", 1)
